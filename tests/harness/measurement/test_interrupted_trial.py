"""A trial that was interrupted or whose code changed: nothing that was complete is measured twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.environment import ROOT
from forge.training.system.errors import ConfigurationError, LockedError
from harness.measurement import key
from harness.measurement.results import Outcome, RunSpec, Store
from harness.measurement.trial import read_trial, run_trial
from tests.support.fake_runs import OTHER as B
from tests.support.fake_runs import SPEC as A
from tests.support.fake_runs import Arms, ids, measure_trial


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def interrupt(store: Store, at_run: int, num_pairs: int = 3, **more: Any) -> str:
    run = Arms({at_run: {"kill": True}})
    with pytest.raises(KeyboardInterrupt):
        measure_trial(store, run, num_pairs, **more)
    return run.order


def test_a_pair_of_which_only_one_run_is_there_is_measured_anew(store: Store) -> None:
    assert interrupt(store, at_run=4) == "ABBA"
    run = Arms()
    done = measure_trial(store, run)
    assert run.order == "BAAB"
    assert ids(done) == ["01 02", "05 04", "06 07"]
    assert len(store.run_ids()) == 7  # the first half of the interrupted pair stays


def test_a_pair_that_another_trial_has_taken_is_not_taken_twice(store: Store) -> None:
    interrupt(store, at_run=1, num_pairs=1, name="first")  # before its first run ended: the store is empty
    run_trial("second", A, B, 1, store, run=Arms())
    run = Arms()
    done = measure_trial(store, run, num_pairs=1, name="first")
    assert run.order == "AB"
    assert ids(done) == ["03 04"]


def test_a_pair_that_was_complete_when_the_gate_was_killed_is_not_measured_again(store: Store) -> None:
    measure_trial(store, Arms(), num_pairs=2)
    path = store.trial_path("speed")
    state = json.loads(path.read_text())
    second = state["pairs"].pop()
    state["open_pair"] = {"index": 2, "order": "BA", "after": state["pairs"][0]["candidate"]}
    path.write_text(json.dumps(state))  # as it is between the run's outcome and the trial's note of it
    run = Arms()
    done = measure_trial(store, run, num_pairs=2)
    assert run.order == ""
    assert [o.run_id for o in done.pairs[1]] == [second["baseline"], second["candidate"]]


DRIVER = """
import functools, sys
from harness.measurement.results import Store
from harness.measurement.trial import run_trial
from harness.measurement.runner import run_once
from tests.support.fake_runs import OTHER, SPEC, fake
store, num_pairs, slow = Store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def command(spec, run_dir):  # the run after so many of them takes longer than anybody waits
    return fake(sleep=60 if len(store.run_ids()) == slow else 0.05)(spec, run_dir)
run = functools.partial(run_once, command=command)
done = run_trial("speed", SPEC, OTHER, num_pairs, store, run=run, announce=print)
print("complete", done.stopped is None)
"""


def drive(store: Store, num_pairs: int, slow: int = -1) -> subprocess.Popen[str]:
    """A gate of its own process; its temporary files are beside the store."""
    command = [sys.executable, "-c", DRIVER, str(store.directory), str(num_pairs), str(slow)]
    scratch = store.directory.with_name("tmp")
    scratch.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def is_free(store: Store) -> bool:
    try:
        with store.lock():
            return True
    except LockedError:
        return False


def test_a_gate_killed_in_the_middle_is_resumed_and_measures_nothing_complete_twice(store: Store) -> None:
    scratch = store.directory.with_name("tmp")
    process = drive(store, 3, slow=3)
    wait_for(lambda: len(store.run_ids()) == 3 and list(scratch.glob("*/run")))
    process.kill()
    process.communicate()
    wait_for(lambda: is_free(store))  # a child killed between fork and exec holds the lock a moment longer
    before = store.run_ids()
    assert len(before) == 3
    assert list(scratch.iterdir())  # of the run that was killed

    with pytest.raises(ConfigurationError, match="began with 3 pairs and is now asked for 5"):
        measure_trial(store, Arms(), num_pairs=5)
    output = drive(store, 3).communicate(timeout=60)[0]
    assert "complete True" in output
    assert output.count(" after ") == 4  # pairs 2 and 3
    assert store.run_ids()[:3] == before
    assert not list(scratch.iterdir())
    done = read_trial("speed", store)
    assert done is not None
    assert ids(done) == ["01 02", "05 04", "06 07"]


def test_two_gates_on_one_store_at_once_are_refused_with_exit_code_9(store: Store) -> None:
    process = drive(store, 2, slow=1)
    wait_for(store.run_ids)
    with pytest.raises(LockedError, match=f"in use by process {process.pid}") as caught:
        measure_trial(store, Arms(), num_pairs=2)
    assert caught.value.exit_code == 9
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert measure_trial(store, Arms(), num_pairs=2).stopped is None


# Put away and taken up again


def test_what_changed_is_measured_anew_said_and_the_old_trial_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_trial(store, Arms(), num_pairs=1)
    monkeypatch.setattr(key, "code_sha256", lambda: "0123456789abcdef" * 4)
    lines: list[str] = []
    run = Arms()
    done = measure_trial(
        store, run, num_pairs=2, announce=lines.append
    )  # other numbers may be asked for: nothing is kept
    assert run.order == "ABBA"
    assert ids(done) == ["03 04", "06 05"]
    assert any(line.startswith("  baseline code: ") and line.endswith("-> 01234567") for line in lines)
    old = json.loads((store.directory / "trials" / "old" / "speed.1.json").read_text())
    assert old["num_pairs"] == 1


def test_a_trial_that_was_put_away_is_resumed_where_what_it_measures_is_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sessions of one gate may get an H100, an H200 and an H100: nothing complete is measured twice."""
    first = measure_trial(store, Arms(), num_pairs=1)
    interrupt(store, at_run=2, num_pairs=2, name="other")  # an open pair is put away too
    monkeypatch.setattr(key, "describe_gpu", lambda: {"name": "Another GPU"})
    between = measure_trial(store, Arms(), num_pairs=1)
    assert [ids(done) for done in (first, between)] == [["01 02"], ["04 05"]]
    measure_trial(store, Arms(), num_pairs=2, name="other")
    monkeypatch.undo()
    lines: list[str] = []
    run = Arms()
    assert measure_trial(store, run, num_pairs=1, announce=lines.append) == first
    assert run.order == ""
    assert lines[-1] == "speed: taken up again with 1 of 1 pairs, as it was put away"
    with pytest.raises(ConfigurationError, match="began with 1 pairs and is now asked for 2"):
        measure_trial(store, Arms(), num_pairs=2)
    other = measure_trial(store, run, num_pairs=2, name="other")
    assert ids(other) == ["10 11", "13 12"], "the half of long ago counts in no pair"
    assert len(list((store.directory / "trials" / "old").iterdir())) == 2


def test_a_trial_of_other_code_is_not_read_for_a_verdict_on_this(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    done = measure_trial(store, Arms(), num_pairs=1)
    assert read_trial("speed", store, specs=(A, B)) == done
    assert read_trial("speed", store, specs=(A, A)) is None
    monkeypatch.setattr(key, "code_sha256", lambda: "0" * 64)
    assert read_trial("speed", store, specs=(A, B)) is None
    assert read_trial("speed", store) == done


def test_code_that_changes_between_two_pairs_is_noticed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Arms()

    def run_and_edit(spec: RunSpec, **more: Any) -> Outcome:
        if len(run.order) == 2:
            monkeypatch.setattr(key, "code_sha256", lambda: "0" * 64)
        return run(spec, **more)

    with pytest.raises(ConfigurationError, match="changed while it was measured"):
        measure_trial(store, run_and_edit)
