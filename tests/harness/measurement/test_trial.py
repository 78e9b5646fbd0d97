"""Interleaved pairs: their order, what an interruption costs (nothing that was complete), what is refused."""

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
from forge.training.system.errors import CheckError, ConfigurationError, DataError, ForgeError, LockedError
from harness.measurement import key as identity
from harness.measurement import resume
from harness.measurement.results import Monitor, Outcome, RunSpec, Store
from harness.measurement.runner import run_once
from harness.measurement.trial import (
    Trial,
    WorkMismatch,
    _disturbance,
    check_same_work,
    measure,
    read_trial,
    run_single,
    run_trial,
)
from tests.support.fake_training import OTHER, SPEC, fake, make_record, make_steps

A, B = SPEC, OTHER  # baseline and candidate: one workload, two plans


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


class Arms:
    """Runs real quick children through the real worker and notes which arm ran.

    ``script``: for the n-th run from 1, options of its child (:func:`tests.support.fake_training.fake`) and the
    figures of a monitor that stand in for the GPU's.
    """

    def __init__(self, script: dict[int, dict[str, Any]] | None = None) -> None:
        self.script = script or {}
        self.order = ""
        self.num_runs = 0

    def __call__(self, spec: RunSpec, *, store: Store, time_limit_seconds: float) -> Outcome:
        self.order += "A" if spec == A else "B"
        self.num_runs += 1
        options = dict(self.script.get(self.num_runs, {}))
        states = options.pop("gpu", None)
        probe = iter(states).__next__ if states else lambda: None
        if options.pop("kill", False):
            raise KeyboardInterrupt
        limit = options.pop("limit", time_limit_seconds)
        return run_once(
            spec, store=store, time_limit_seconds=limit, command=fake(**options), probe=probe, grace_seconds=0.5
        )


def gpu(**during: Any) -> dict[str, Any]:
    """A script entry: nobody on the GPU before, then this for as long as the child runs."""
    before = {"num_other_processes": 0, "memory_used_bytes": 1 << 28, "throttle_reasons": []}
    return {"sleep": 0.5, "gpu": [before] + [before | during] * 1000}


def trial(store: Store, run: Any, num_pairs: int = 3, name: str = "speed", **more: Any) -> Trial:
    return run_trial(name, A, B, num_pairs, store, run=run, time_limit_seconds=60, **more)


def ids(trial: Trial) -> list[str]:
    """The two runs of each pair in the order baseline, candidate, by their counts."""
    return [f"{a.run_id[-2:]} {b.run_id[-2:]}" for a, b in trial.pairs]


# Order


def test_pairs_alternate(store: Store) -> None:
    run = Arms()
    done = trial(store, run, num_pairs=4)
    assert run.order == "ABBAABBA"
    assert ids(done) == ["01 02", "04 03", "05 06", "08 07"]
    assert done.is_complete
    assert all(a.spec == A and b.spec == B for a, b in done.pairs)
    assert (done.baseline_statuses, done.candidate_statuses) == (["completed"] * 4, ["completed"] * 4)
    assert (done.set_aside, done.failure, done.stopped) == ([], None, None)


def test_a_complete_trial_is_not_measured_again_and_can_be_read(store: Store) -> None:
    first = trial(store, Arms())
    again = Arms()
    assert trial(store, again) == first == read_trial("speed", Store(store.directory))
    assert again.order == ""
    assert read_trial("other", store) is None


def test_the_control_runs_one_arm_against_itself(store: Store) -> None:
    run = Arms()
    done = run_trial("control", A, A, 2, store, run=run)
    assert run.order == "AAAA"
    assert len({o.run_id for pair in done.pairs for o in pair}) == 4
    assert len({o.key for pair in done.pairs for o in pair}) == 1


# Interruption


def interrupt(store: Store, at_run: int, num_pairs: int = 3, **more: Any) -> str:
    run = Arms({at_run: {"kill": True}})
    with pytest.raises(KeyboardInterrupt):
        trial(store, run, num_pairs, **more)
    return run.order


def test_a_lone_half_is_kept_if_nothing_came_after_it(store: Store) -> None:
    assert interrupt(store, at_run=4) == "ABBA"
    run = Arms()
    done = trial(store, run)
    assert run.order == "AAB"
    assert ids(done) == ["01 02", "04 03", "05 06"]


def test_a_lone_half_after_which_something_else_ran_is_measured_anew(store: Store) -> None:
    interrupt(store, at_run=4)
    other = run_once(A.model_copy(update={"overrides": ("lora.rank=8",)}), store=store, command=fake())
    run = Arms()
    done = trial(store, run)
    assert run.order == "BAAB"
    assert ids(done) == ["01 02", "06 05", "07 08"]
    assert len(store.run_ids()) == 8  # the orphan and the other one stay
    assert store.read(other.run_id) == other


def test_a_lone_half_of_another_machine_is_measured_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(store, at_run=4)
    monkeypatch.setattr(resume, "machine_id", lambda: "f" * 16)
    run = Arms()
    assert ids(trial(store, run))[:2] == ["01 02", "05 04"]
    assert run.order == "BAAB"


def test_a_lone_half_that_another_trial_has_taken_is_not_taken_twice(store: Store) -> None:
    interrupt(store, at_run=1, num_pairs=1, name="first")  # before its first run ended: the store is empty
    run_trial("second", A, B, 1, store, run=Arms())
    run = Arms()
    done = trial(store, run, num_pairs=1, name="first")
    assert run.order == "AB"
    assert ids(done) == ["03 04"]


def test_a_pair_that_was_complete_when_the_gate_was_killed_is_not_measured_again(store: Store) -> None:
    trial(store, Arms(), num_pairs=2)
    path = store.trial_path("speed")
    state = json.loads(path.read_text())
    second = state["pairs"].pop()
    state["open_pair"] = {"index": 2, "order": "BA", "after": state["pairs"][0]["candidate"]}
    path.write_text(json.dumps(state))  # as it is between the run's outcome and the trial's note of it
    run = Arms()
    done = trial(store, run, num_pairs=2)
    assert run.order == ""
    assert [o.run_id for o in done.pairs[1]] == [second["baseline"], second["candidate"]]


DRIVER = """
import functools, sys
from harness.measurement.results import Store
from harness.measurement.trial import run_trial
from harness.measurement.runner import run_once
from tests.support.fake_training import OTHER, SPEC, fake
store, num_pairs, slow = Store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def command(spec, run_dir):  # the run after so many of them takes longer than anybody waits
    return fake(sleep=60 if len(store.run_ids()) == slow else 0.05)(spec, run_dir)
run = functools.partial(run_once, command=command)
done = run_trial("speed", SPEC, OTHER, num_pairs, store, run=run, announce=print)
print("complete", done.is_complete)
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


def test_a_gate_killed_in_the_middle_goes_on_and_measures_nothing_complete_twice(store: Store) -> None:
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
        trial(store, Arms(), num_pairs=5)
    said = drive(store, 3).communicate(timeout=60)[0]
    assert "complete True" in said
    assert said.count(" after ") == 3  # the second half of pair 2, and pair 3
    assert store.run_ids()[:3] == before
    assert not list(scratch.iterdir())
    done = read_trial("speed", store)
    assert done is not None
    assert ids(done) == ["01 02", "04 03", "05 06"]
    assert done.num_pairs_planned == 3


def test_two_gates_on_one_store_at_once_are_refused_with_exit_code_9(store: Store) -> None:
    process = drive(store, 2, slow=1)
    wait_for(store.run_ids)
    with pytest.raises(LockedError, match=f"in use by process {process.pid}") as caught:
        trial(store, Arms(), num_pairs=2)
    assert caught.value.exit_code == 9
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert trial(store, Arms(), num_pairs=2).is_complete


# What is fixed before the first pair


@pytest.mark.parametrize("num_pairs", [2, 4])
def test_another_number_of_pairs_is_refused_even_when_complete(store: Store, num_pairs: int) -> None:
    trial(store, Arms())
    with pytest.raises(ConfigurationError, match=f"began with 3 pairs and is now asked for {num_pairs}") as caught:
        trial(store, Arms(), num_pairs)
    assert str(store.trial_path("speed")) in str(caught.value)


def test_other_arms_under_the_same_name_are_refused(store: Store) -> None:
    trial(store, Arms(), num_pairs=1)
    other = B.model_copy(update={"plan_overrides": ("micro_batch=1",)})
    with pytest.raises(ConfigurationError, match=r"began with other arms:\n.*candidate.*micro_batch: 2 -> 1"):
        run_trial("speed", A, other, 1, store, run=Arms())


def test_what_changed_is_measured_anew_said_and_the_old_trial_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial(store, Arms(), num_pairs=1)
    monkeypatch.setattr(identity, "code_sha256", lambda: "0123456789abcdef" * 4)
    said: list[str] = []
    run = Arms()
    done = trial(store, run, num_pairs=2, announce=said.append)  # other numbers may be asked for: nothing is kept
    assert run.order == "ABBA"
    assert ids(done) == ["03 04", "06 05"]
    assert any(line.startswith("  baseline code: ") and line.endswith("-> 01234567") for line in said)
    old = json.loads((store.directory / "trials" / "old" / "speed.1.json").read_text())
    assert old["num_pairs"] == 1


def test_a_trial_that_was_put_away_goes_on_where_what_it_measures_is_there_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate in stretches may meet an H100, an H200 and an H100: nothing complete is measured twice."""
    first = trial(store, Arms(), num_pairs=1)
    interrupt(store, at_run=2, num_pairs=2, name="other")  # an open pair is put away too
    monkeypatch.setattr(identity, "describe_gpu", lambda: {"name": "Another GPU"})
    between = trial(store, Arms(), num_pairs=1)
    assert [ids(done) for done in (first, between)] == [["01 02"], ["04 05"]]
    trial(store, Arms(), num_pairs=2, name="other")
    monkeypatch.undo()
    said: list[str] = []
    run = Arms()
    assert trial(store, run, num_pairs=1, announce=said.append) == first
    assert run.order == ""
    assert said[-1] == "speed: taken up again with 1 of 1 pairs, as it was put away"
    with pytest.raises(ConfigurationError, match="began with 1 pairs and is now asked for 2"):
        trial(store, Arms(), num_pairs=2)
    other = trial(store, run, num_pairs=2, name="other")
    assert ids(other) == ["10 11", "13 12"], "the half of long ago counts in no pair"
    assert len(list((store.directory / "trials" / "old").iterdir())) == 2


def test_a_trial_of_other_code_is_not_read_for_a_verdict_on_this(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    done = trial(store, Arms(), num_pairs=1)
    assert read_trial("speed", store, specs=(A, B)) == done
    assert read_trial("speed", store, specs=(A, A)) is None
    monkeypatch.setattr(identity, "code_sha256", lambda: "0" * 64)
    assert read_trial("speed", store, specs=(A, B)) is None
    assert read_trial("speed", store) == done


def test_code_that_changes_between_two_pairs_is_noticed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Arms()

    def run_and_edit(spec: RunSpec, **more: Any) -> Outcome:
        if run.num_runs == 2:
            monkeypatch.setattr(identity, "code_sha256", lambda: "0" * 64)
        return run(spec, **more)

    with pytest.raises(ConfigurationError, match="changed since the trial was taken up"):
        trial(store, run_and_edit)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a.b"])
def test_a_name_that_would_leave_the_store_is_refused(store: Store, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a trial"):
        trial(store, Arms(), name=name)


# Failures


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"exit_code": 5, "record": {"status": "out_of_memory"}}, "out_of_memory"),
        ({"exit_code": 7, "record": {"status": "diverged"}}, "diverged"),
        ({"exit_code": 1}, "crashed"),
        ({"sleep": 60, "limit": 1.0}, "timeout"),
    ],
)
def test_a_failing_candidate_ends_the_trial_at_once_and_for_good(
    store: Store, options: dict[str, Any], status: str
) -> None:
    run = Arms({3: options})
    done = trial(store, run)
    assert run.order == "ABB"
    assert done.failure is not None
    assert (done.failure.status, done.failed_role) == (status, "candidate")
    assert done.candidate_statuses == ["completed", status]
    assert done.baseline_statuses == ["completed"]
    assert done.stopped == f"the candidate failed: {status}"
    assert not done.is_complete
    again = Arms()
    resumed = run_trial("speed", A, B, 3, store, run=again, time_limit_seconds=1.0)
    assert again.order == ""
    assert resumed == done


def test_a_failing_baseline_is_told_from_a_failing_candidate_even_in_a_control(store: Store) -> None:
    done = run_trial("control", A, A, 2, store, run=Arms({1: {"exit_code": 5}}))
    assert done.failed_role == "baseline"
    assert done.baseline_statuses == ["out_of_memory"]
    assert done.candidate_statuses == []


def test_a_run_stopped_for_its_time_is_tried_again_with_more(store: Store) -> None:
    trial(store, Arms({2: {"sleep": 60, "limit": 1.0}}), num_pairs=1)
    done = trial(store, Arms(), num_pairs=1)
    assert done.is_complete
    assert [reason for _, reason in done.set_aside] == ["stopped at a time limit that was raised since"]


def test_a_refused_run_is_an_error_with_its_reason_and_nothing_is_lost(store: Store) -> None:
    with pytest.raises(ForgeError, match=r"micro_batch=2\) was refused") as caught:
        trial(store, Arms({2: {"exit_code": 3}}), num_pairs=1)
    assert caught.value.exit_code == 3
    run = Arms()
    assert trial(store, run, num_pairs=1).is_complete
    assert run.order == "AB"  # something ran after the first half


# Disturbance


def test_a_pair_that_met_a_foreign_process_is_set_aside_and_run_again(store: Store) -> None:
    run = Arms({2: gpu(num_other_processes=2)})
    done = trial(store, run, num_pairs=1)
    assert run.order == "ABAB"
    assert ids(done) == ["03 04"]
    assert len(done.set_aside) == 1
    runs, reason = done.set_aside[0]
    assert [run_id[-2:] for run_id in runs] == ["01", "02"]
    assert reason.startswith("a foreign process on the GPU during ")


def test_a_pair_whose_run_was_slowed_by_heat_is_set_aside_and_the_power_cap_is_normal(store: Store) -> None:
    hot = gpu(num_other_processes=1, throttle_reasons=["thermal, hardware", "power cap"])
    run = Arms({1: hot, 2: gpu(num_other_processes=1, throttle_reasons=["power cap"])})
    done = trial(store, run, num_pairs=1)
    assert run.order == "AAB"
    assert [reason.partition("(")[2] for _, reason in done.set_aside] == ["thermal, hardware)"]


def test_a_moments_slowdown_of_a_healthy_gpu_costs_no_pair() -> None:
    """On an H200 at full load bits other than the power cap's were seen for single samples."""
    seen = Monitor(throttle_reasons=["hardware slowdown", "power cap"], disturbed_share=0.02)
    assert _disturbance(outcome(monitor=seen)) is None
    for share in (0.021, None):  # None: a store of before, which says no more than that it was seen
        longer = seen.model_copy(update={"disturbed_share": share})
        assert "hardware slowdown" in str(_disturbance(outcome(monitor=longer)))


def test_a_pair_disturbed_three_times_stops_the_trial_with_the_reason(store: Store) -> None:
    run = Arms(dict.fromkeys((1, 2, 3), gpu(num_other_processes=2)))
    done = trial(store, run, num_pairs=1)
    assert run.order == "AAA"
    assert len(done.set_aside) == 3
    assert (done.stopped or "").startswith("pair 1 was disturbed 3 times, the last by a foreign process")
    assert not done.is_complete
    assert trial(store, Arms(), num_pairs=1).stopped == done.stopped


def test_a_candidate_that_fails_while_disturbed_has_not_failed(store: Store) -> None:
    run = Arms({2: gpu(num_other_processes=2) | {"exit_code": 5}})
    assert trial(store, run, num_pairs=1).is_complete


# Deadline


def test_a_pair_that_cannot_end_before_the_deadline_is_not_started(store: Store) -> None:
    slow = Arms({number: {"sleep": 0.9} for number in range(1, 9)})
    done = trial(store, slow, num_pairs=1, name="earlier")
    pair_seconds = sum(outcome.wall_seconds for outcome in done.pairs[0])
    run = Arms()
    stopped = trial(store, run, deadline=time.monotonic() + pair_seconds * 0.9)
    assert run.order == ""
    assert (stopped.stopped or "").startswith("no time left for pair 1, which takes about ")
    assert not stopped.is_complete
    # enough for one pair and not, by what a pair takes, for two
    some = trial(store, slow, deadline=time.monotonic() + pair_seconds * 2.0)
    assert len(some.pairs) == 1
    assert trial(store, Arms(), deadline=time.monotonic() + 600).is_complete


def test_a_pair_is_parted_only_where_it_may_be_and_its_second_half_comes_first(store: Store) -> None:
    """The next session follows at once on this machine: else each would lose up to a pair's time at its end."""
    soon = {"deadline": time.monotonic() + 100, "unseen_seconds": 60}
    run = Arms()
    assert not trial(store, run, num_pairs=2, **soon).is_halved
    assert run.order == ""
    halved = trial(store, run, num_pairs=2, may_halve=True, **soon)
    assert (run.order, halved.is_halved, halved.pairs) == ("A", True, [])
    assert halved.stopped == "the second half of pair 1 comes first next"
    done = trial(store, run, num_pairs=2, may_halve=True, deadline=time.monotonic() + 100)
    assert (run.order, done.is_halved) == ("ABBA", False)
    assert ids(done) == ["01 02", "04 03"]
    assert trial(store, run, num_pairs=1, name="late", may_halve=True, deadline=time.monotonic() - 1).stopped
    assert run.order == "ABBA"


def test_what_was_never_measured_is_not_begun_when_it_is_not_expected_to_end(store: Store) -> None:
    """Else the first pair of a trial would be begun in a session's last second, and its machine be gone."""
    run = Arms()
    soon = time.monotonic() + 100
    stopped = trial(store, run, num_pairs=1, deadline=soon, unseen_seconds=60)
    assert (run.order, stopped.stopped) == ("", "no time left for pair 1, which takes about 120 seconds")
    assert run_single(A, store, run=run, deadline=soon, unseen_seconds=100) is None
    assert run_single(A, store, run=run, deadline=soon, unseen_seconds=60) is not None
    assert trial(store, run, num_pairs=1, deadline=soon, unseen_seconds=60).is_complete, "now it knows better"


def test_a_single_run_stopped_for_its_time_is_tried_again_with_more(store: Store) -> None:
    run = Arms({1: {"sleep": 60, "limit": 1.0}})
    first = run_single(A, store, run=run, time_limit_seconds=1.0)
    assert first is not None
    assert first.status == "timeout"
    assert run_single(A, store, run=run, time_limit_seconds=1.0) == first
    second = run_single(A, store, run=run, time_limit_seconds=60)
    assert second is not None
    assert (second.status, run.order) == ("completed", "AA")


def test_a_second_half_needs_only_its_own_time(store: Store) -> None:
    slow = Arms({number: {"sleep": 0.9} for number in range(1, 4)} | {4: {"kill": True}})
    with pytest.raises(KeyboardInterrupt):
        trial(store, slow)
    run = Arms()
    assert trial(store, run, deadline=time.monotonic() + 1.9).stopped  # enough for one run of a second, not for two
    assert run.order == "A"


# Damage


def test_a_damaged_trial_or_run_is_an_error_that_names_the_file(store: Store) -> None:
    done = trial(store, Arms(), num_pairs=1)
    run = store.directory / "runs" / f"{done.pairs[0][1].run_id}.json"
    good = run.read_text()
    run.write_text(good[: len(good) // 2])
    with pytest.raises(DataError, match=f"trial speed, pair 1: {run}"):
        trial(store, Arms(), num_pairs=1)
    run.unlink()
    with pytest.raises(DataError, match=f"{run} is missing"):
        read_trial("speed", store)
    run.write_text(good)
    path = store.trial_path("speed")
    path.write_text(path.read_text().replace('"AB"', '"XY"'))
    with pytest.raises(DataError, match=rf"{path} is not the TrialState it should be: pairs\.0\.order"):
        trial(store, Arms(), num_pairs=1)


# Single runs


def test_a_single_run_is_measured_once_and_disturbed_ones_do_not_count(store: Store) -> None:
    run = Arms({1: gpu(num_other_processes=2)})
    first = run_single(A, store, run=run)
    assert first is not None
    assert first.status == "refused"
    second = run_single(A, store, run=run)
    assert second is not None
    assert (second.status, run.order) == ("completed", "AA")
    assert run_single(A, store, run=run) == second
    assert run.order == "AA"
    assert run_single(B, store, run=run, deadline=time.monotonic() - 1) is None


# The same work


def outcome(record: dict[str, Any] | None = None, steps: dict[str, Any] | None = None, **more: Any) -> Outcome:
    return Outcome(
        **{
            "run_id": "0123456789ab-0001",
            "key": "0123456789ab",
            "key_parts": {},
            "spec": A,
            "status": "completed",
            "exit_code": 0,
            "started_at": "2026-11-24T12:00:00+00:00",
            "wall_seconds": 3.0,
            "machine": "0" * 16,
            "monitor": Monitor(),
            "log_tail": "",
            "record": make_record(**(record or {})).model_dump(mode="json"),
            "steps": make_steps(**(steps or {})),
            **more,
        }
    )


def test_the_same_work_passes_however_it_is_laid_out() -> None:
    check_same_work(outcome(), outcome(record={"plan": {"micro_batch": 8}, "backend": "legacy"}, spec=B))


INPUTS = make_record().inputs.model_dump()
TRAINABLE = {"num_parameters": 30_000, "names_sha256": "f" * 64, "dtype": "float32"}


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ({"record": {"workload_sha256": "9" * 64}}, f"workload_sha256: {'a' * 64} | {'9' * 64}"),
        ({"record": {"seed": 7}}, "seed: 42 | 7"),
        ({"record": {"num_steps": 2}}, "num_steps: 3 | 2"),
        ({"record": {"inputs": INPUTS | {"base_sha256": "9"}}}, f"inputs.base_sha256: {'b' * 64} | 9"),
        ({"record": {"inputs": INPUTS | {"tokenizer_sha256": "9"}}}, f"inputs.tokenizer_sha256: {'c' * 64} | 9"),
        ({"record": {"inputs": INPUTS | {"train_examples_sha256": "9"}}}, "inputs.train_examples_sha256: "),
        ({"record": {"trainable": TRAINABLE | {"names_sha256": "9"}}}, f"trainable.names_sha256: {'f' * 64} | 9"),
        ({"record": {"trainable": TRAINABLE | {"num_parameters": 1}}}, "trainable.num_parameters: 30000 | 1"),
        ({"record": {"batch_digests": ["1" * 64, "9", "9"]}}, "batch_digests, step 2: "),
        ({"record": {"batch_digests": ["1" * 64]}}, "batch_digests: 3 steps | 1 steps"),
        ({"steps": {"trained_tokens": 99}}, "trained_tokens, step 1: 100 | 99 (and 2 further steps)"),
        ({"steps": {"tokens": 401}}, "  tokens, step 1: 400 | 401 (and 2 further steps)"),
        ({"steps": {"documents": 5}}, "documents, step 1: 4 | 5 (and 2 further steps)"),
        ({"record": {"trainable": None}}, f"trainable.names_sha256: {'f' * 64} | None"),
    ],
)
def test_other_work_is_refused_showing_both_values(other: dict[str, Any], shown: str) -> None:
    with pytest.raises(WorkMismatch) as caught:
        check_same_work(outcome(), outcome(**other))
    assert shown in caught.value.message
    assert caught.value.exit_code == 8


def test_what_neither_side_has_recorded_is_not_the_same() -> None:
    empty = outcome(steps=None, record={"trainable": None, "batch_digests": []})
    with pytest.raises(WorkMismatch) as caught:
        check_same_work(empty, empty)
    assert "trainable.names_sha256: None | None" in caught.value.message
    assert "batch_digests: 0 steps | 0 steps" in caught.value.message


def test_a_workload_that_changes_between_the_arms_is_refused_by_the_trial(store: Store) -> None:
    run = Arms({2: {"record": {"workload_sha256": "9" * 64, "seed": 7}}})
    with pytest.raises(WorkMismatch) as caught:
        trial(store, run)
    assert run.order == "AB"  # not one pair more
    assert f"workload_sha256: {'a' * 64} | {'9' * 64}" in caught.value.message
    assert "seed: 42 | 7" in caught.value.message
    with pytest.raises(WorkMismatch):
        trial(store, run)
    assert run.order == "AB"


# Metrics


def test_metrics_are_those_of_the_record_the_steps_and_the_monitor() -> None:
    seen = Monitor(device_used_before_bytes=1 << 30, device_used_peak_bytes=9 << 30)
    run = outcome(monitor=seen)
    figures = {
        metric: measure(run, metric, num_warmup_steps=1)
        for metric in (
            *("measured_seconds", "seconds_per_document", "peak_allocated_bytes", "peak_reserved_bytes"),
            *("device_used_bytes", "last_train_loss"),
        )
    }
    assert figures == {
        "measured_seconds": 1.0,
        "seconds_per_document": 0.125,
        "peak_allocated_bytes": 5 << 30,
        "peak_reserved_bytes": 7 << 30,
        "device_used_bytes": 8 << 30,
        "last_train_loss": 1.25,
    }
    assert measure(run, "measured_seconds", num_warmup_steps=0) == 3.0
    with pytest.raises(ValueError, match="no metric 'speed'"):
        measure(run, "speed", num_warmup_steps=0)


def test_evaluations_in_the_step_log_are_no_steps() -> None:
    lines = make_steps()
    lines.insert(2, {"step": 2, "validation_loss": 3.0})
    assert measure(outcome().model_copy(update={"steps": lines}), "measured_seconds", num_warmup_steps=2) == 0.5


@pytest.mark.parametrize("metric", ["measured_seconds", "device_used_bytes", "peak_allocated_bytes"])
def test_what_was_not_measured_is_no_number(metric: Any) -> None:
    with pytest.raises(CheckError, match=f"{metric} was not measured in run 0123456789ab-0001"):
        measure(outcome(record={"memory": []}), metric, num_warmup_steps=3)


# The rooms


def test_the_gate_measures_without_importing_torch() -> None:
    code = "import sys, harness.measurement.trial; print({'torch', 'transformers', 'scipy'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown == "set()\n"
