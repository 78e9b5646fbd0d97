"""A verdict passes what is true, catches what is not, and says so when it does not know."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.training.system.environment import ROOT
from harness.perf.claims import CLAIMS, Claim, judge
from harness.perf.simulation import CONTROL, MEMORY, NOISES, SPEED, draw_trials, judge_trial, verdict_rates
from harness.verdict import CANNOT_RUN, Verdict

GIB = 2**30
NOISE = [1.004, 0.997, 1.001, 0.995, 1.003]  # five runs of one arm, sd 0.4%

values = st.floats(1e-3, 1e12)
complete_pairs = st.lists(st.tuples(values, values), min_size=1, max_size=8)
claims = st.sampled_from(CLAIMS)


def judged(
    claim: Claim,
    baseline: list[float],
    candidate: list[float],
    *,
    planned: int = 5,
    baseline_statuses: list[str] | None = None,
    candidate_statuses: list[str] | None = None,
) -> Verdict:
    done = ["completed"] * len(baseline)
    return judge(
        claim,
        baseline,
        candidate,
        num_pairs_planned=planned,
        baseline_statuses=done if baseline_statuses is None else baseline_statuses,
        candidate_statuses=done if candidate_statuses is None else candidate_statuses,
    )


@pytest.fixture
def statuses_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of verdicts without the pairs that INCONCLUSIVE asks for: no status depends on them, and they take long."""
    monkeypatch.setattr("harness.perf.claims.pairs_needed", lambda *_: None)


def at_most_often(count: int, trials: int, rate: float) -> bool:
    """Whether ``count`` is no more than ``rate`` and four binomial standard errors allow."""
    return count <= rate * trials + 4 * math.sqrt(rate * (1 - rate) * trials)


# The table


def test_the_acceptance_table_is_the_agreed_one() -> None:
    assert [(c.name, c.trial, c.metric, c.direction, c.bar) for c in CLAIMS] == [
        ("legacy_256_speed", "legacy_256", "measured_seconds", "at_least", 2.0),
        ("genome_full_speed", "genome_full", "measured_seconds", "at_least", 2.0),
        ("genome_full_peak_allocated", "genome_full", "peak_allocated_bytes", "at_most", 0.20),
        ("genome_full_peak_reserved", "genome_full", "peak_reserved_bytes", "at_most", 0.20),
        ("genome_full_device_used", "genome_full", "device_used_bytes", "at_most", 0.20),
        ("control_aa", "control_aa", "measured_seconds", "contains", 1.0),
    ]
    assert all(claim.statement.endswith(".") for claim in CLAIMS)


@pytest.mark.parametrize(
    "wrong", [{"direction": "about"}, {"bar": 0.0}, {"bar": math.nan}, {"direction": "contains", "bar": 2.0}]
)
def test_a_claim_without_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Claim"):
        Claim(**{**SPEED.model_dump(), **wrong})


# Speed


def test_three_times_as_fast_passes_twice_as_fast() -> None:
    verdict = judged(SPEED, [30 * n for n in NOISE], [10 * n for n in reversed(NOISE)])
    assert verdict.status == "PASS"
    assert verdict.figures["estimate"] == pytest.approx(3.0, rel=0.01)
    assert verdict.figures["low"] > 2.9
    assert "clears the bar of at least 2" in verdict.reason


def test_a_planted_1_9_is_caught() -> None:
    verdict = judged(SPEED, [19 * n for n in NOISE], [10 * n for n in reversed(NOISE)])
    assert verdict.status == "FAIL"
    assert verdict.figures["estimate"] == pytest.approx(1.9, rel=0.01)
    assert "misses the bar of at least 2" in verdict.reason


def test_a_planted_1_9_without_noise_fails() -> None:
    verdict = judged(SPEED, [19.0] * 5, [10.0] * 5)
    assert verdict.status == "FAIL"
    assert "the pairs do not vary" in verdict.reason


def test_a_candidate_twice_as_slow_is_not_twice_as_fast() -> None:
    assert judged(SPEED, [10 * n for n in NOISE], [20 * n for n in NOISE]).status == "FAIL"


@pytest.mark.usefixtures("statuses_alone")
@pytest.mark.parametrize("log_sd", [0.005, 0.02, 0.05])
def test_a_planted_1_9_passes_almost_never_whatever_the_noise(log_sd: float) -> None:
    rates = verdict_rates(np.random.default_rng(3), 2000, 5, SPEED, 1.9, log_sd)
    assert at_most_often(round(2000 * rates["PASS"]), 2000, 0.025)
    if log_sd < 0.05:
        assert rates["PASS"] == 0


@pytest.mark.usefixtures("statuses_alone")
@pytest.mark.parametrize("num_pairs", [3, 5, 10])
def test_a_ratio_on_the_bar_passes_and_fails_in_one_trial_of_forty(num_pairs: int) -> None:
    trials = 4000
    rates = verdict_rates(np.random.default_rng([4, num_pairs]), trials, num_pairs, SPEED, 2.0, 0.05)
    for status in ("PASS", "FAIL"):
        assert abs(rates[status] - 0.025) < 4 * math.sqrt(0.025 * 0.975 / trials), rates


@pytest.mark.usefixtures("statuses_alone")
@pytest.mark.parametrize("noise", ["drift of 5 sd over the trial", "the second run of every pair slower by 2 sd"])
def test_drift_and_order_do_not_make_a_false_pass(noise: str) -> None:
    rates = verdict_rates(np.random.default_rng(5), 2000, 5, SPEED, 2.0, 0.05, NOISES[noise])
    assert at_most_often(round(2000 * rates["PASS"]), 2000, 0.025)


@pytest.mark.usefixtures("statuses_alone")
@pytest.mark.parametrize(("ratio", "least"), [(2.2, 0.8), (3.0, 0.999), (5.0, 0.999)])
def test_what_is_faster_than_the_bar_passes(ratio: float, least: float) -> None:
    assert verdict_rates(np.random.default_rng(6), 1000, 5, SPEED, ratio, 0.05)["PASS"] >= least


def test_exactly_the_bar_without_noise_passes_whatever_the_unit() -> None:
    for unit in (1e-9, 0.1, 1.0, 3600.0, 1e12):
        assert judged(
            SPEED, [2 * unit * x for x in (1, 3, 7, 11, 13)], [unit * x for x in (1, 3, 7, 11, 13)]
        ).status == ("PASS")
    assert judged(SPEED, [1.999999999] * 5, [1.0] * 5).status == "FAIL"


# Memory


def test_a_planted_tenth_more_memory_is_caught() -> None:
    baseline = [74.5 * GIB * n for n in NOISE]
    before = judged(MEMORY, baseline, [0.19 * 74.5 * GIB * n for n in reversed(NOISE)])
    after = judged(MEMORY, baseline, [0.209 * 74.5 * GIB * n for n in reversed(NOISE)])
    assert (before.status, after.status) == ("PASS", "FAIL")
    assert after.figures["estimate"] == pytest.approx(0.209, rel=0.01)
    assert "misses the bar of at most 0.2" in after.reason


def test_memory_that_never_varies_is_judged_to_the_byte() -> None:
    limit = 15 * GIB
    assert judged(MEMORY, [5.0 * limit] * 5, [float(limit)] * 5).status == "PASS"
    assert judged(MEMORY, [5.0 * limit] * 5, [float(limit + 1)] * 5).status == "FAIL"


@pytest.mark.usefixtures("statuses_alone")
def test_more_memory_than_the_bar_passes_almost_never() -> None:
    for log_sd in (0.002, 0.01, 0.05):
        rates = verdict_rates(np.random.default_rng(7), 1500, 5, MEMORY, 0.21, log_sd)
        assert at_most_often(round(1500 * rates["PASS"]), 1500, 0.025)
        assert log_sd > 0.01 or rates["FAIL"] > 0.99
        assert log_sd < 0.05 or rates["INCONCLUSIVE"] > 0.4


def test_less_memory_than_the_bar_passes() -> None:
    assert verdict_rates(np.random.default_rng(7), 1000, 5, MEMORY, 0.19, 0.01)["PASS"] > 0.99
    unclear = judged(MEMORY, [100.0] * 5, [19.0, 22.0, 20.5, 18.5, 21.5])
    assert unclear.status == "INCONCLUSIVE"
    assert "straddles the bar of at most 0.2" in unclear.reason


# The control


def test_an_arm_against_itself_passes_in_95_of_100_trials() -> None:
    trials = 4000
    rates = verdict_rates(np.random.default_rng(8), trials, 5, CONTROL, 1.0, 0.02)
    assert abs(rates["PASS"] - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials), rates
    assert rates["INCONCLUSIVE"] == 0


@pytest.mark.parametrize("bias", [0.97, 1.03])
def test_a_biased_measurement_fails_the_control(bias: float) -> None:
    verdict = judged(CONTROL, [10 * n for n in NOISE], [10 * bias * n for n in NOISE])
    assert verdict.status == "FAIL"
    assert "does not hold 1" in verdict.reason


def test_equal_runs_pass_the_control_and_one_pair_does_not() -> None:
    assert judged(CONTROL, [10.0, 11.0, 12.0], [10.0, 11.0, 12.0], planned=3).status == "PASS"
    assert judged(CONTROL, [10.0], [10.0], planned=1).status == "INCONCLUSIVE"


def test_a_control_too_noisy_to_see_a_fifth_shows_nothing() -> None:
    noisy = judged(CONTROL, [10.0, 10.0, 10.0], [8.0, 10.0, 12.5], planned=3)
    assert noisy.figures["low"] < 1 < noisy.figures["high"], "it holds 1, as any interval that is wide enough"
    assert noisy.status == "INCONCLUSIVE"
    assert "too wide to exclude a bias of 20%" in noisy.reason


# Not knowing


def test_noise_around_the_bar_is_inconclusive_and_says_how_many_pairs_would_decide() -> None:
    verdict = judged(SPEED, [19.0, 23.0, 21.0, 20.0, 22.0], [10.0] * 5)
    assert verdict.status == "INCONCLUSIVE"
    assert verdict.figures["low"] < 2 < verdict.figures["high"]
    assert f"a new trial of {verdict.figures['pairs_needed']} pairs" in verdict.reason


def test_the_pairs_asked_for_decide_in_nine_trials_of_ten() -> None:
    # logs -+ 0.05 about 2.1: the noise and the ratio that the new trials have
    logs = [0.05, -0.05, 0.05, -0.05]
    asked = judged(SPEED, [2.1 * math.exp(x) for x in logs], [1.0] * 4, planned=4).figures["pairs_needed"]
    log_sd = 0.05 * math.sqrt(4 / 3)
    rates = verdict_rates(np.random.default_rng(9), 2000, asked, SPEED, 2.1, log_sd)
    fewer = verdict_rates(np.random.default_rng(9), 2000, asked - 2, SPEED, 2.1, log_sd)
    assert rates["PASS"] > 0.9 - 4 * math.sqrt(0.09 / 2000)
    assert fewer["PASS"] < 0.9


def test_an_estimate_on_the_bar_asks_for_no_number_of_pairs() -> None:
    verdict = judged(SPEED, [1.0, 4.0, 1.0, 4.0], [1.0] * 4, planned=4)
    assert (verdict.status, verdict.figures["pairs_needed"]) == ("INCONCLUSIVE", None)
    assert "no number" in verdict.reason


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_fewer_pairs_than_planned_are_incomplete_however_good(claim: Claim) -> None:
    for num_pairs in (0, 1, 4):
        verdict = judged(claim, [100.0] * num_pairs, [1.0 if claim.bar != 1 else 100.0] * num_pairs)
        assert verdict.status == "INCOMPLETE"
        assert verdict.reason == f"{num_pairs} of 5 pairs measured"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_single_planned_pair_is_never_a_pass_nor_a_fail(claim: Claim) -> None:
    for candidate in (1.0, 100.0, 1e4):
        verdict = judged(claim, [100.0], [candidate], planned=1)
        assert verdict.status == "INCONCLUSIVE"
        assert [verdict.figures[key] for key in ("low", "high", "pairs_needed")] == [None] * 3


def test_more_pairs_than_planned_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^legacy_256_speed: 6 pairs where 5 were planned"):
        judged(SPEED, [30.0] * 6, [10.0] * 6)


# Runs that fail


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
@pytest.mark.parametrize("status", CANNOT_RUN)
def test_a_candidate_that_cannot_run_fails(claim: Claim, status: str) -> None:
    for num_pairs in (0, 2, 5):
        done = ["completed"] * num_pairs
        verdict = judged(
            claim,
            [100.0] * num_pairs,
            [1.0] * num_pairs,
            baseline_statuses=[*done, "completed"],
            candidate_statuses=[*done, status],
        )
        assert verdict.status == "FAIL"
        assert verdict.reason == f"the candidate cannot run this: {status}"
        assert verdict.figures["estimate"] is None


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
@pytest.mark.parametrize("status", CANNOT_RUN)
def test_a_baseline_that_cannot_run_is_never_a_pass_nor_an_infinite_ratio(claim: Claim, status: str) -> None:
    for num_pairs in (0, 2, 5):
        done = ["completed"] * num_pairs
        verdict = judged(
            claim,
            [100.0] * num_pairs,
            [1.0] * num_pairs,
            baseline_statuses=[status, *done],
            candidate_statuses=[*done, "completed"],
        )
        assert verdict.status == "INCONCLUSIVE"
        assert verdict.reason == f"the baseline cannot run this: {status}"
        assert [verdict.figures[key] for key in ("estimate", "high", "pairs_needed")] == [None] * 3


def test_where_neither_arm_can_run_the_candidate_has_failed() -> None:
    assert judged(SPEED, [], [], baseline_statuses=["out_of_memory"], candidate_statuses=["diverged"]).status == "FAIL"


@pytest.mark.parametrize("refused", ["baseline", "candidate"])
def test_a_refused_run_says_nothing_about_its_arm(refused: str) -> None:
    statuses = {"baseline_statuses": ["completed"] * 2, "candidate_statuses": ["completed"] * 2}
    statuses[f"{refused}_statuses"] = ["completed", "completed", "refused"]
    verdict = judged(SPEED, [30.0] * 2, [10.0] * 2, **statuses)  # type: ignore[arg-type]
    assert verdict.status == "INCOMPLETE"
    assert "refused" in verdict.reason


def test_values_without_completed_runs_behind_them_are_refused() -> None:
    with pytest.raises(ValueError, match="5 values from 4 completed runs"):
        judged(SPEED, [30.0] * 5, [10.0] * 5, candidate_statuses=["completed"] * 4)
    with pytest.raises(ValueError, match="unknown status 'ok'"):
        judged(SPEED, [30.0] * 5, [10.0] * 5, candidate_statuses=["ok"] * 5)
    with pytest.raises(ValueError, match="5 baseline values for 4"):
        judged(SPEED, [30.0] * 5, [10.0] * 4)
    with pytest.raises(ValueError, match="not a finite number"):
        judged(SPEED, [30.0] * 5, [10.0, 10.0, math.nan, 10.0, 10.0])


# Every verdict


@given(complete_pairs, claims, st.integers(0, 2), st.sampled_from(["completed", "refused", *CANNOT_RUN]))
def test_a_verdict_survives_json(pairs: list[tuple[float, float]], claim: Claim, short: int, last: str) -> None:
    baseline, candidate = [a for a, _ in pairs], [b for _, b in pairs]
    done = ["completed"] * len(pairs)
    verdict = judged(claim, baseline, candidate, planned=len(pairs) + short, candidate_statuses=[*done, last])
    text = json.dumps(verdict.to_dict(), allow_nan=False)
    assert Verdict.model_validate(json.loads(text)) == verdict
    assert verdict.figures["claim"] == claim.model_dump()


@given(complete_pairs, claims, st.floats(1e-6, 1e6), st.randoms(use_true_random=False))
def test_neither_unit_nor_order_of_pairs_changes_a_verdict(
    pairs: list[tuple[float, float]], claim: Claim, unit: float, random: Any
) -> None:
    one = judged(claim, [a for a, _ in pairs], [b for _, b in pairs], planned=len(pairs))
    random.shuffle(pairs)
    other = judged(claim, [a * unit for a, _ in pairs], [b * unit for _, b in pairs], planned=len(pairs))
    assert (one.status, one.figures["num_pairs"]) == (other.status, other.figures["num_pairs"])


@given(complete_pairs, claims)
def test_a_pass_has_its_whole_interval_on_the_right_side(pairs: list[tuple[float, float]], claim: Claim) -> None:
    verdict = judged(claim, [a for a, _ in pairs], [b for _, b in pairs], planned=len(pairs))
    low, estimate, high, needed = (verdict.figures[key] for key in ("low", "estimate", "high", "pairs_needed"))
    if verdict.status == "PASS":
        slack = 1 + 1e-9
        assert low <= estimate * slack
        assert estimate <= high * slack
        assert low * slack >= claim.bar or claim.direction != "at_least"
        assert high <= claim.bar * slack or claim.direction != "at_most"
        assert (low <= slack and high * slack >= 1) or claim.direction != "contains"
    if verdict.status == "INCONCLUSIVE" and needed is not None:
        assert needed > verdict.figures["num_pairs"]


def test_a_value_beside_the_bar_is_not_printed_as_the_bar() -> None:
    verdict = judged(SPEED, [1.9999997] * 5, [1.0] * 5)
    assert verdict.status == "FAIL"
    assert "1.9999997 to 1.9999997 misses the bar of at least 2" in verdict.reason


# The simulation itself


def test_simulated_trials_have_the_ratio_the_noise_and_the_order_they_claim() -> None:
    rng = np.random.default_rng(10)
    for name, noise in NOISES.items():
        if "second run" in name or "drift" in name:
            continue  # these two do shift single trials: that is what they are for
        baseline, candidate = draw_trials(rng, 40_000, 5, 2.0, 0.05, noise)
        logs = np.log(baseline / candidate)
        assert logs.mean() == pytest.approx(math.log(2), abs=0.001), name
    baseline, candidate = draw_trials(rng, 40_000, 5, 2.0, 0.05)
    assert np.log(baseline / candidate).std() == pytest.approx(0.05, rel=0.01)
    baseline, candidate = draw_trials(
        rng, 1, 5, 1.0, 1e-3, lambda _rng, trials, runs: np.arange(runs) * np.ones((trials, 1))
    )
    place = np.log(np.stack([baseline[0], candidate[0]])) / (1e-3 / math.sqrt(2))
    assert place.round().astype(int).tolist() == [[0, 3, 4, 7, 8], [1, 2, 5, 6, 9]]  # A B, B A, A B, B A, A B


def test_the_simulation_command_prints_every_table() -> None:
    command = [sys.executable, "-m", "harness.perf.simulation", "--trials", "4"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.count("**") == 2 * 7
    assert shown.count("| n=3 |") == 7
    assert "nan" not in shown


def test_a_judged_trial_is_judged_as_complete() -> None:
    assert judge_trial(SPEED, [3.0, 3.1], [1.0, 1.0]).figures["num_pairs_planned"] == 2
