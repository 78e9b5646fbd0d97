"""The store: outcomes are only added, damage is named, one process measures at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.training.system.errors import DataError, DiskError, LockedError
from harness.measurement.results import Outcome, Store
from harness.measurement.runner import run_once
from tests.support.fake_runs import OTHER, SPEC, fake


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def run(store: Store, command: Any, **more: Any) -> Outcome:
    return run_once(SPEC, store=store, command=command, **{"time_limit_seconds": 60, "grace_seconds": 1, **more})


def test_run_ids_count_up_in_a_store_and_an_outcome_is_never_replaced(store: Store) -> None:
    first = run(store, fake())
    second = run_once(OTHER, store=store, command=fake())
    assert [run_id.partition("-")[2] for run_id in store.run_ids()] == ["0001", "0002"]
    assert first.run_id.startswith(first.key[:12])
    assert store.with_key(second.key) == [second]
    with pytest.raises(DiskError, match="exists already"):
        store.append(first)


@pytest.mark.parametrize("content", ['{"run_id": "x', "[]", '{"schema_version": 2}', ""])
def test_a_damaged_file_is_an_error_that_names_it(store: Store, content: str) -> None:
    outcome = run(store, fake())
    path = store.directory / "runs" / f"{outcome.run_id}.json"
    path.write_text(content)
    with pytest.raises(DataError, match=str(path)):
        store.outcomes()
    path.rename(path.with_name("notes.json"))
    with pytest.raises(DataError, match=r"notes\.json is not a run"):
        store.outcomes()


def test_two_gates_on_one_store_do_not_mix(store: Store) -> None:
    with store.lock(), store.lock():
        with pytest.raises(LockedError) as caught:
            run_once(SPEC, store=Store(store.directory), command=fake())
        assert caught.value.exit_code == 9
        assert run(store, fake()).status == "completed"
    assert run_once(SPEC, store=Store(store.directory), command=fake()).status == "completed"
