"""Interleaved pairs: their order, what is fixed before the first, what ends a trial, what is set aside."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.errors import ConfigurationError, DataError
from harness.measurement.metrics import WorkMismatch
from harness.measurement.results import Monitor, Store
from harness.measurement.trial import _disturbance, read_trial, run_single, run_trial
from tests.support.fake_runs import OTHER as B
from tests.support.fake_runs import SPEC as A
from tests.support.fake_runs import Arms, gpu, ids, make_outcome, measure_trial


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# Order


def test_pairs_alternate(store: Store) -> None:
    run = Arms()
    done = measure_trial(store, run, num_pairs=4)
    assert run.order == "ABBAABBA"
    assert ids(done) == ["01 02", "04 03", "05 06", "08 07"]
    assert done.stopped is None
    assert all(a.spec == A and b.spec == B for a, b in done.pairs)
    assert (done.statuses("baseline"), done.statuses("candidate")) == (["completed"] * 4, ["completed"] * 4)
    assert (done.set_aside, done.failure, done.stopped) == ([], None, None)


def test_a_complete_trial_is_not_measured_again_and_can_be_read(store: Store) -> None:
    first = measure_trial(store, Arms())
    again = Arms()
    assert measure_trial(store, again) == first == read_trial("speed", Store(store.directory))
    assert again.order == ""
    assert read_trial("other", store) is None


def test_the_control_runs_one_arm_against_itself(store: Store) -> None:
    run = Arms()
    done = run_trial("control", A, A, 2, store, run=run)
    assert run.order == "AAAA"
    assert len({o.run_id for pair in done.pairs for o in pair}) == 4
    assert len({o.key for pair in done.pairs for o in pair}) == 1


# What is fixed before the first pair


@pytest.mark.parametrize("num_pairs", [2, 4])
def test_another_number_of_pairs_is_refused_even_when_complete(store: Store, num_pairs: int) -> None:
    measure_trial(store, Arms())
    with pytest.raises(ConfigurationError, match=f"began with 3 pairs and is now asked for {num_pairs}") as caught:
        measure_trial(store, Arms(), num_pairs)
    assert str(store.trial_path("speed")) in str(caught.value)


def test_other_arms_under_the_same_name_are_refused(store: Store) -> None:
    measure_trial(store, Arms(), num_pairs=1)
    other = B.model_copy(update={"plan_overrides": ("micro_batch=1",)})
    with pytest.raises(ConfigurationError, match=r"began with other arms:\n.*candidate.*micro_batch: 2 -> 1"):
        run_trial("speed", A, other, 1, store, run=Arms())


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a.b"])
def test_a_name_that_would_leave_the_store_is_refused(store: Store, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a trial"):
        measure_trial(store, Arms(), name=name)


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
    done = measure_trial(store, run)
    assert run.order == "ABB"
    assert done.failure is not None
    assert (done.failure.status, done.failed_role) == (status, "candidate")
    assert done.statuses("candidate") == ["completed", status]
    assert done.statuses("baseline") == ["completed"]
    assert done.stopped == f"the candidate failed: {status}"
    assert done.stopped is not None
    again = Arms()
    resumed = run_trial("speed", A, B, 3, store, run=again, time_limit_seconds=1.0)
    assert again.order == ""
    assert resumed == done


def test_a_failing_baseline_is_told_from_a_failing_candidate_even_in_a_control(store: Store) -> None:
    done = run_trial("control", A, A, 2, store, run=Arms({1: {"exit_code": 5}}))
    assert done.failed_role == "baseline"
    assert done.statuses("baseline") == ["out_of_memory"]
    assert done.statuses("candidate") == []


def test_a_run_stopped_for_its_time_is_tried_again_with_more(store: Store) -> None:
    measure_trial(store, Arms({2: {"sleep": 60, "limit": 1.0}}), num_pairs=1)
    done = measure_trial(store, Arms(), num_pairs=1)
    assert done.stopped is None
    assert [reason for _, reason in done.set_aside] == ["stopped at a time limit that was raised since"]


def test_a_refused_run_stops_the_trial_with_its_reason_until_the_next_session(store: Store) -> None:
    done = measure_trial(store, Arms({2: {"exit_code": 3}}), num_pairs=1)
    assert "micro_batch=2) was refused" in (done.stopped or "")
    assert (done.pairs, done.failure, done.statuses("candidate")) == ([], None, [])
    run = Arms()
    assert measure_trial(store, run, num_pairs=1).stopped is None
    assert run.order == "AB"


# Disturbance


def test_a_pair_that_met_a_foreign_process_is_set_aside_and_run_again(store: Store) -> None:
    run = Arms({2: gpu(num_other_processes=2)})
    done = measure_trial(store, run, num_pairs=1)
    assert run.order == "ABAB"
    assert ids(done) == ["03 04"]
    assert len(done.set_aside) == 1
    runs, reason = done.set_aside[0]
    assert [run_id[-2:] for run_id in runs] == ["01", "02"]
    assert reason.startswith("a foreign process on the GPU during ")


def test_a_pair_whose_run_was_slowed_by_heat_is_set_aside_and_the_power_cap_is_normal(store: Store) -> None:
    hot = gpu(num_other_processes=1, throttle_reasons=["thermal, hardware", "power cap"])
    run = Arms({1: hot, 2: gpu(num_other_processes=1, throttle_reasons=["power cap"])})
    done = measure_trial(store, run, num_pairs=1)
    assert run.order == "AAB"
    assert [reason.partition("(")[2] for _, reason in done.set_aside] == ["thermal, hardware)"]


def test_a_moments_slowdown_of_a_healthy_gpu_costs_no_pair() -> None:
    """On an H200 at full load bits other than the power cap's were seen for single samples."""
    seen = Monitor(throttle_reasons=["hardware slowdown", "power cap"], disturbed_share=0.02)
    assert _disturbance(make_outcome(monitor=seen)) is None
    for share in (0.021, None):  # None: a store of before, which says no more than that it was seen
        longer = seen.model_copy(update={"disturbed_share": share})
        assert "hardware slowdown" in str(_disturbance(make_outcome(monitor=longer)))


def test_a_pair_disturbed_three_times_stops_the_trial_with_the_reason(store: Store) -> None:
    run = Arms(dict.fromkeys((1, 2, 3), gpu(num_other_processes=2)))
    done = measure_trial(store, run, num_pairs=1)
    assert run.order == "AAA"
    assert len(done.set_aside) == 3
    assert (done.stopped or "").startswith("pair 1 was disturbed 3 times, the last by a foreign process")
    assert done.stopped is not None
    assert measure_trial(store, Arms(), num_pairs=1).stopped == done.stopped


def test_a_candidate_that_fails_while_disturbed_has_not_failed(store: Store) -> None:
    run = Arms({2: gpu(num_other_processes=2) | {"exit_code": 5}})
    assert measure_trial(store, run, num_pairs=1).stopped is None


# Deadline


def test_a_pair_that_cannot_end_before_the_deadline_is_not_started(store: Store) -> None:
    slow = Arms({number: {"sleep": 0.9} for number in range(1, 9)})
    done = measure_trial(store, slow, num_pairs=1, name="earlier")
    pair_seconds = sum(outcome.wall_seconds for outcome in done.pairs[0])
    run = Arms()
    stopped = measure_trial(store, run, deadline=time.monotonic() + pair_seconds * 0.9)
    assert run.order == ""
    assert (stopped.stopped or "").startswith("no time left for pair 1, which takes about ")
    assert stopped.stopped is not None
    # enough for one pair and not, by what a pair takes, for two
    some = measure_trial(store, slow, deadline=time.monotonic() + pair_seconds * 2.0)
    assert len(some.pairs) == 1
    assert measure_trial(store, Arms(), deadline=time.monotonic() + 600).stopped is None


def test_what_was_never_measured_is_not_begun_when_it_is_not_expected_to_end(store: Store) -> None:
    """Else the first pair of a trial would be begun in a session's last second, and its machine be gone."""
    run = Arms()
    soon = time.monotonic() + 100
    stopped = measure_trial(store, run, num_pairs=1, deadline=soon, unseen_seconds=60)
    assert (run.order, stopped.stopped) == ("", "no time left for pair 1, which takes about 120 seconds")
    assert run_single(A, store, run=run, deadline=soon, unseen_seconds=100) is None
    assert run_single(A, store, run=run, deadline=soon, unseen_seconds=60) is not None
    known = measure_trial(store, run, num_pairs=1, deadline=soon, unseen_seconds=60)
    assert known.stopped is None, "now it knows better"


def test_a_single_run_stopped_for_its_time_is_tried_again_with_more(store: Store) -> None:
    run = Arms({1: {"sleep": 60, "limit": 1.0}})
    first = run_single(A, store, run=run, time_limit_seconds=1.0)
    assert first is not None
    assert first.status == "timeout"
    assert run_single(A, store, run=run, time_limit_seconds=1.0) == first
    second = run_single(A, store, run=run, time_limit_seconds=60)
    assert second is not None
    assert (second.status, run.order) == ("completed", "AA")


# Damage


def test_a_damaged_trial_or_run_is_an_error_that_names_the_file(store: Store) -> None:
    done = measure_trial(store, Arms(), num_pairs=1)
    run = store.directory / "runs" / f"{done.pairs[0][1].run_id}.json"
    good = run.read_text()
    run.write_text(good[: len(good) // 2])
    with pytest.raises(DataError, match=f"trial speed, pair 1: {run}"):
        measure_trial(store, Arms(), num_pairs=1)
    run.unlink()
    with pytest.raises(DataError, match=f"{run} is missing"):
        read_trial("speed", store)
    run.write_text(good)
    path = store.trial_path("speed")
    path.write_text(path.read_text().replace('"AB"', '"XY"'))
    with pytest.raises(DataError, match=rf"{path} is not the TrialState it should be: pairs\.0\.order"):
        measure_trial(store, Arms(), num_pairs=1)


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


def test_a_workload_that_changes_between_the_arms_is_refused_by_the_trial(store: Store) -> None:
    run = Arms({2: {"record": {"workload_sha256": "9" * 64, "seed": 7}}})
    with pytest.raises(WorkMismatch) as caught:
        measure_trial(store, run)
    assert run.order == "AB"  # not one pair more
    assert f"workload_sha256: {'a' * 64} | {'9' * 64}" in caught.value.message
    assert "seed: 42 | 7" in caught.value.message
    with pytest.raises(WorkMismatch):
        measure_trial(store, run)
    assert run.order == "AB"
