"""Processes side by side: how many at a time, what becomes of their failures, and that runs stay apart."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.errors import DataError, ForgeError
from harness.measurement.results import Outcome, RunSpec, Store
from harness.measurement.runner import run_once
from harness.parity.session import Ladder
from harness.parity.side_by_side import Job, run_side_by_side
from harness.session import Session
from tests.support.fake_runs import fake


class Watched:
    """Jobs that count how many and how much run at the same time; ``together``: none ends before so many have begun."""

    def __init__(self, together: int = 1) -> None:
        self.lock, self.barrier = threading.Lock(), threading.Barrier(together)
        self.now: list[int] = []
        self.most = self.heaviest = 0
        self.sums: set[int] = set()

    def job(self, weight: int) -> Job[int]:
        def call() -> int:
            with self.lock:
                self.now.append(weight)
                self.most, self.heaviest = max(self.most, len(self.now)), max(self.heaviest, sum(self.now))
                self.sums.add(sum(self.now))
            self.barrier.wait(timeout=30)
            with self.lock:
                self.now.remove(weight)
            return weight

        return Job(call, weight)


def test_as_many_run_as_are_allowed_and_never_more() -> None:
    watched = Watched(together=3)
    assert run_side_by_side([watched.job(1) for _ in range(6)], most=3, memory=10) == [1] * 6
    assert watched.most == 3


def test_there_is_never_more_on_the_gpu_than_its_memory_holds_but_what_runs_alone() -> None:
    watched = Watched()
    weights = [6, 6, 4, 6, 30, 1]
    assert run_side_by_side([watched.job(w) for w in weights], most=9, memory=10) == weights
    assert watched.heaviest == 30
    assert watched.sums - {30} <= set(range(11))


def test_a_failure_is_its_jobs_answer_and_a_bug_is_raised() -> None:
    def fail() -> int:
        raise DataError("no such document")

    def bug() -> int:
        raise ZeroDivisionError

    first, second = run_side_by_side([Job(fail), Job(lambda: 2)], most=2, memory=9)
    assert isinstance(first, DataError)
    assert second == 2
    with pytest.raises(ZeroDivisionError):
        run_side_by_side([Job(bug), Job(lambda: 2)], most=1, memory=9)


def make_ladder(where: Path, command: Callable[[RunSpec, Path], list[str]]) -> Ladder:
    (where / "base").mkdir()
    row = '{"instruction": "Recite %d.", "input": "", "output": "Ship %d came by night."}\n'
    (where / "train.jsonl").write_text("".join(row % (i, i) for i in range(230)))

    def run(spec: RunSpec, **more: Any) -> Outcome:
        return run_once(spec, command=command, **more)

    session = Session(store=Store(where / "store"), train=where / "train.jsonl", run_one=run)
    return Ladder(session, base=str(where / "base"), num_side_by_side=4)


def test_runs_made_side_by_side_are_stored_apart_and_not_made_again(tmp_path: Path) -> None:
    ladder = make_ladder(tmp_path, fake(sleep=0.3))
    specs = [ladder.spec("trl", seed) for seed in range(6)]
    outcomes = ladder.outcomes(specs)
    assert [outcome.status for outcome in outcomes] == ["completed"] * 6
    assert [outcome.spec for outcome in outcomes] == [spec.portable() for spec in specs]
    assert len({outcome.run_id for outcome in outcomes}) == len(ladder.session.store.run_ids()) == 6
    assert ladder.outcomes(specs) == outcomes


def test_what_finds_no_memory_beside_others_is_run_again_alone_and_only_then_believed(tmp_path: Path) -> None:
    ladder = make_ladder(tmp_path, fake(exit_code=5, record={"status": "out_of_memory"}))
    (outcome,) = ladder.outcomes([ladder.spec("trl", 1), ladder.spec("trl", 2)])
    assert outcome.status == "out_of_memory"
    assert [o.status for o in ladder.session.store.outcomes()] == ["refused", "refused", "out_of_memory"]
    assert "beside others: out_of_memory" in str(ladder.session.store.outcomes()[0].message)


def test_a_probe_that_fails_beside_others_is_asked_once_more_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = make_ladder(tmp_path, fake())
    seen: list[tuple[str, bool]] = []

    def run_probe(name: str, backend: str, arguments: tuple[str, ...], *_: Any, is_alone: bool, **__: Any) -> Any:
        seen.append((arguments[0], is_alone))
        if arguments[0] == "broken" or (arguments[0] == "large" and not is_alone):
            raise ForgeError("no memory")
        return {"of": arguments[0]}

    monkeypatch.setattr("harness.session.run_probe", run_probe)
    calls: list[Any] = [("trl", (name,)) for name in ("small", "large", "broken", "small")]
    assert ladder.probes("first_step", calls, is_prefetch=True)[0] == {"of": "small"}
    assert {is_alone for _, is_alone in seen} == {False}
    answers = ladder.probes("first_step", calls)
    assert answers[:2] + answers[3:] == [{"of": "small"}, {"of": "large"}, {"of": "small"}]
    assert isinstance(answers[2], ForgeError)
    assert [name for name, is_alone in seen if is_alone] == ["large", "broken"]
    assert seen.count(("broken", False)) == 1, "what failed beside others is not tried there again"
