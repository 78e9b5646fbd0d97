"""The gate's statistics agree with independent references and keep their promises on simulated pairs."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from harness.perf.simulation import SIZES, coverage, equivalence_rate
from harness.stats import corpus_seconds, pairs_needed, ratio_interval, tost, tost_pairs_needed, tost_power

# Extra hours of sleep under two drugs, ten patients (Student 1908; `sleep` in R), drug 2 less drug 1.
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]

positive = st.floats(1e-6, 1e12)
pairs = st.lists(st.tuples(positive, positive), min_size=1, max_size=12)
noisy_pairs = st.lists(st.tuples(positive, positive), min_size=2, max_size=12, unique=True)


def arms(drawn: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in drawn], [b for _, b in drawn]


def within(share: float, wanted: float, trials: int) -> bool:
    """Four standard errors of a binomial share: a right function fails once in 16,000 seeds."""
    return abs(share - wanted) <= 4 * math.sqrt(wanted * (1 - wanted) / trials)


# The interval of a ratio


def test_the_interval_is_students_of_1908_on_his_own_data() -> None:
    # published: t = 4.0621, 9 degrees of freedom, mean 1.58, 95% interval 0.7001142 to 2.4598858
    interval = ratio_interval([math.exp(x) for x in SLEEP], [1.0] * 10)
    assert math.log(interval.estimate) == pytest.approx(1.58)
    assert math.log(interval.low) == pytest.approx(0.7001142, abs=5e-8)
    assert math.log(interval.high) == pytest.approx(2.4598858, abs=5e-8)
    assert interval.log_sd is not None
    assert 1.58 / interval.log_sd * math.sqrt(10) == pytest.approx(4.0621, abs=5e-5)


def test_two_pairs_by_hand() -> None:
    # ratios 2 and 8: geometric mean 4; logs ln 4 -+ ln 2, so sd = sqrt(2) ln 2 and half width = 12.7062 ln 2
    interval = ratio_interval([2.0, 24.0], [1.0, 3.0])
    assert interval.estimate == pytest.approx(4)
    assert interval.log_sd == pytest.approx(math.sqrt(2) * math.log(2))
    assert math.log2(interval.high / 4) == pytest.approx(12.7062047, abs=1e-6)
    assert math.log2(4 / interval.low) == pytest.approx(12.7062047, abs=1e-6)


@given(noisy_pairs, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_the_interval_is_scipys_paired_t_on_logs(drawn: list[tuple[float, float]], confidence: float) -> None:
    from scipy.stats import ttest_rel

    above, below = arms(drawn)
    logs = np.log(above) - np.log(below)
    assume(np.std(logs) > 1e-6)
    reference = ttest_rel(np.log(above), np.log(below)).confidence_interval(confidence)
    assume(max(abs(reference.low), abs(reference.high)) < 700)  # what a float can hold
    interval = ratio_interval(above, below, confidence)
    assert math.log(interval.estimate) == pytest.approx(logs.mean(), rel=1e-9, abs=1e-9)
    assert math.log(interval.low) == pytest.approx(reference.low, rel=1e-7, abs=1e-7)
    assert math.log(interval.high) == pytest.approx(reference.high, rel=1e-7, abs=1e-7)
    assert interval.log_sd == pytest.approx(np.std(logs, ddof=1), rel=1e-7)


@given(pairs)
def test_swapping_the_arms_inverts_the_ratio(drawn: list[tuple[float, float]]) -> None:
    above, below = arms(drawn)
    one, other = ratio_interval(above, below), ratio_interval(below, above)
    assert one.estimate * other.estimate == pytest.approx(1)
    if one.low > 0 and one.high < math.inf and other.low > 0 and other.high < math.inf:
        assert one.low * other.high == pytest.approx(1)
        assert one.high * other.low == pytest.approx(1)


@given(pairs, st.floats(1e-9, 1e9))
def test_the_unit_changes_nothing(drawn: list[tuple[float, float]], unit: float) -> None:
    above, below = arms(drawn)
    one = ratio_interval(above, below)
    other = ratio_interval([a * unit for a in above], [b * unit for b in below])
    assert other.estimate == pytest.approx(one.estimate)
    assert (other.log_sd is None) == (one.log_sd is None)
    if one.log_sd:
        assert other.log_sd == pytest.approx(one.log_sd, abs=1e-12)


@given(pairs, st.randoms(use_true_random=False))
def test_the_order_of_pairs_changes_not_one_bit(drawn: list[tuple[float, float]], random: Any) -> None:
    shuffled = list(drawn)
    random.shuffle(shuffled)
    assert ratio_interval(*arms(drawn)) == ratio_interval(*arms(shuffled))


@given(pairs)
def test_the_estimate_lies_in_its_interval_and_more_confidence_widens_it(drawn: list[tuple[float, float]]) -> None:
    narrow, wide = ratio_interval(*arms(drawn), 0.8), ratio_interval(*arms(drawn), 0.99)
    assert wide.low <= narrow.low <= narrow.estimate <= narrow.high <= wide.high


def test_pairs_that_share_their_drift_are_judged_by_their_ratio_alone() -> None:
    drift = [1.0, 1.5, 2.0, 2.5, 3.0]
    interval = ratio_interval([2.2 * d for d in drift], drift)
    assert interval.low == pytest.approx(2.2)
    assert interval.high == pytest.approx(2.2)


def test_pairs_that_do_not_vary_are_a_point() -> None:
    interval = ratio_interval([6.0] * 5, [3.0] * 5)
    assert interval.estimate == interval.low == interval.high == pytest.approx(2)
    assert interval.log_sd == 0


def test_one_pair_has_no_interval() -> None:
    interval = ratio_interval([6.0], [3.0])
    assert (interval.low, interval.high, interval.log_sd, interval.num_pairs) == (0, math.inf, None, 1)


def test_wildly_different_pairs_do_not_overflow() -> None:
    interval = ratio_interval([1e300, 1.0], [1e-7, 1e300])
    assert (interval.low, interval.high) == (0, math.inf)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_a_positive_number_is_refused(bad: float, side: int) -> None:
    values = [[1.0, 2.0], [1.0, 2.0]]
    values[side][1] = bad
    with pytest.raises(ValueError, match=r"is not a finite number above 0"):
        ratio_interval(*values)


def test_values_without_a_partner_are_refused() -> None:
    with pytest.raises(ValueError, match="2 numerators for 3 denominators"):
        ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="no values"):
        ratio_interval([], [])
    with pytest.raises(ValueError, match="confidence is 95"):
        ratio_interval([1.0], [1.0], 95)


@pytest.mark.parametrize("num_pairs", SIZES)
@pytest.mark.parametrize("log_sd", [0.005, 0.1])
def test_the_interval_holds_the_truth_in_95_of_100_trials(num_pairs: int, log_sd: float) -> None:
    trials = 6000
    share = coverage(np.random.default_rng([1, num_pairs]), trials, num_pairs, log_sd)
    assert within(share, 0.95, trials), share


# Pairs needed


@pytest.mark.parametrize(
    ("effect", "power", "wanted"),
    # `TTestPower` of statsmodels 0.15.0; 34 is also R's pwr.t.test(d = 0.5, power = 0.8, type = "paired")
    [(0.5, 0.8, 34), (0.5, 0.9, 44), (1, 0.9, 13), (2, 0.9, 5), (5, 0.9, 3), (0.2, 0.95, 327), (0.1, 0.9, 1053)],
)
def test_pairs_needed_agree_with_published_power_analyses(effect: float, power: float, wanted: int) -> None:
    assert pairs_needed(1.0, effect, power=power) == wanted
    assert pairs_needed(0.02, -0.02 * effect, power=power) == wanted


@given(st.floats(0.15, 30), st.sampled_from([0.8, 0.95, 0.99]), st.sampled_from([0.5, 0.8, 0.9, 0.99]))
def test_pairs_needed_are_the_fewest_by_scipys_noncentral_t(effect: float, confidence: float, power: float) -> None:
    from scipy.stats import nct, t

    num_pairs = pairs_needed(1.0, effect, confidence, power)
    assert num_pairs is not None

    def reference(n: int) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's is NaN in places, which is why the harness has its own
            return float(nct.sf(t.ppf((1 + confidence) / 2, n - 1), n - 1, math.sqrt(n) * effect))

    enough, fewer = reference(num_pairs), reference(num_pairs - 1) if num_pairs > 2 else 0.0
    assume(math.isfinite(enough) and math.isfinite(fewer))
    assert enough >= power - 1e-7
    assert fewer < power + 1e-7


def test_no_number_of_pairs_tells_a_ratio_from_itself() -> None:
    assert pairs_needed(0.05, 0.0) is None
    assert pairs_needed(0.0, 0.0) is None
    assert pairs_needed(1.0, 1e-9) is None
    assert pairs_needed(0.0, 1e-9) == 2


def test_pairs_needed_for_a_hair_are_many_and_found_at_once() -> None:
    # (1.959964 + 1.281552)^2 = 10.50742 pairs a unit of (sd / distance)^2, and the t test asks for about two more
    assert pairs_needed(1.0, 0.01) == pytest.approx(105_074, abs=4)
    assert pairs_needed(1.0, 0.0005) == pytest.approx(42_029_681, rel=1e-6)


@pytest.mark.parametrize("arguments", [(-1, 1), (math.nan, 1), (1, math.inf), (1, 1, 1.0), (1, 1, 0.95, 0.0)])
def test_a_question_without_sense_is_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="is"):
        pairs_needed(*arguments)


# Equivalence


def test_tost_by_hand() -> None:
    # mean 0.002, sd 0.004, 4 pairs: standard error 0.002; t = (0.002 - 0.01) / 0.002 = -4, 3 degrees of freedom:
    # p = 0.0140; t(0.95, 3) = 2.353363, so the 90% interval is 0.002 -+ 0.004706726
    half = 0.004 * math.sqrt(3) / 2
    result = tost([0.002 - half, 0.002 - half, 0.002 + half, 0.002 + half], 0.01)
    assert result.mean == pytest.approx(0.002)
    assert result.low == pytest.approx(-0.002706726, abs=1e-9)
    assert result.high == pytest.approx(0.006706726, abs=1e-9)
    assert result.p_value == pytest.approx(0.0140042, abs=1e-7)
    assert result.is_equivalent


@pytest.mark.parametrize(("margin", "p_value", "equivalent"), [(0.5, 0.98924, False), (3.0, 0.0026556, True)])
def test_tost_of_the_sleep_data_is_the_published_one(margin: float, p_value: float, equivalent: bool) -> None:
    # margin 0.5: R's TOSTER, vignette IntroTOSTt (t = 2.777); both: `ttost_mean` of statsmodels 0.15.0
    result = tost(SLEEP, margin)
    assert result.p_value == pytest.approx(p_value, abs=5e-6)
    assert (result.low, result.high) == pytest.approx((0.8669947, 2.2930053), abs=5e-8)
    assert result.is_equivalent is equivalent


differences = st.lists(st.floats(-1, 1), min_size=2, max_size=12)


@given(differences, st.floats(1e-3, 2), st.sampled_from([0.01, 0.05, 0.1]))
def test_tost_is_two_of_scipys_one_sided_t_tests(values: list[float], margin: float, alpha: float) -> None:
    from scipy.stats import ttest_1samp

    assume(np.std(values) > 1e-6)
    result = tost(values, margin, alpha)
    above = ttest_1samp(values, -margin, alternative="greater").pvalue
    below = ttest_1samp(values, margin, alternative="less").pvalue
    interval = ttest_1samp(values, 0).confidence_interval(1 - 2 * alpha)
    assert result.p_value == pytest.approx(max(above, below), rel=1e-7, abs=1e-12)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-7, abs=1e-9)
    if abs(result.p_value - alpha) > 1e-9:
        assert result.is_equivalent == (result.p_value < alpha)


@given(differences, st.floats(1e-3, 2))
def test_the_sign_of_the_differences_does_not_matter_to_equivalence(values: list[float], margin: float) -> None:
    one, other = tost(values, margin), tost([-value for value in values], margin)
    assert (one.p_value, one.is_equivalent) == (other.p_value, other.is_equivalent)
    assert (one.low, one.high) == (-other.high, -other.low)


def test_equal_differences_are_judged_by_their_value_and_one_pair_shows_nothing() -> None:
    assert tost([0.009] * 3, 0.01).is_equivalent
    assert not tost([0.01] * 3, 0.01).is_equivalent
    assert [tost([x] * 3, 0.01).p_value for x in (0.009, 0.01, -0.011)] == [0.0, 1.0, 1.0]
    alone = tost([0.0], 0.01)
    assert (alone.is_equivalent, alone.p_value, alone.low, alone.high) == (False, 1.0, -math.inf, math.inf)


def test_noise_is_no_evidence_of_equality() -> None:
    noisy = [0.05, -0.05, 0.04, -0.04, 0.0]  # no "significant difference" at all
    assert not tost(noisy, 0.01).is_equivalent


@pytest.mark.parametrize(("margin", "alpha"), [(0.0, 0.05), (-1.0, 0.05), (math.nan, 0.05), (1.0, 0.0), (1.0, 0.5)])
def test_a_margin_or_level_without_sense_is_refused(margin: float, alpha: float) -> None:
    with pytest.raises(ValueError, match="is"):
        tost([0.0, 1.0], margin, alpha)
    with pytest.raises(ValueError, match="is"):
        tost_power(1.0, margin, 5, alpha=alpha)


@pytest.mark.parametrize(("num_pairs", "true_difference"), [(5, 0.0), (5, 0.01), (5, -0.01), (3, 0.0), (10, 0.005)])
def test_tost_finds_equivalence_as_often_as_its_power_says(num_pairs: int, true_difference: float) -> None:
    trials = 6000
    share = equivalence_rate(np.random.default_rng(2), trials, num_pairs, 0.005, 0.01, true_difference)
    assert within(share, tost_power(0.005, 0.01, num_pairs, true_difference), trials), share


@given(st.floats(1e-4, 10), st.integers(2, 60), st.sampled_from([0.01, 0.05, 0.1]), st.sampled_from([1, 1.5, 4]))
def test_what_differs_by_the_margin_is_called_equal_no_more_often_than_alpha(
    sd: float, num_pairs: int, alpha: float, excess: float
) -> None:
    assert tost_power(sd, 0.01, num_pairs, 0.01 * excess, alpha) <= alpha + 1e-9


def test_the_power_of_tost_is_what_the_margins_were_chosen_by() -> None:
    # found by simulation before this formula was written: 0.56 and 0.95
    assert [round(tost_power(0.005, 0.01, n), 2) for n in (3, 5)] == [0.56, 0.95]
    assert tost_power(0.0, 0.01, 5) == 1
    assert tost_power(0.0, 0.01, 5, 0.01) == 0
    assert tost_power(0.005, 0.01, 1) == 0


@pytest.mark.parametrize(
    ("sd", "alpha", "difference"),
    [(0.005, 1e-6, 0.0), (0.02, 1e-4, 0.0), (0.3, 0.05, 0.4), (3.0, 0.05, 1.0), (1.238e-5, 1e-6, 0.9993361)],
)
def test_the_power_of_two_pairs_is_a_plain_sum_over_what_their_sd_may_be(
    sd: float, alpha: float, difference: float
) -> None:
    # two pairs: sample sd / sd is |z|; at small levels all the power lies where |z| is next to nothing
    from scipy.stats import norm, t

    z = np.geomspace(1e-12, 10, 400_001)
    error = sd / math.sqrt(2)
    room = np.maximum(0, 1 - t.ppf(1 - alpha, 1) * error * z)
    density = 2 * norm.pdf(z) * (norm.cdf((room - difference) / error) - norm.cdf((-room - difference) / error))
    reference = float(np.trapezoid(density, z))
    assert tost_power(sd, 1.0, 2, difference, alpha) == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("distance", [0.5, 50.0, 1e5])
def test_a_very_high_confidence_does_not_lose_the_power_of_two_pairs(distance: float) -> None:
    from scipy.stats import norm, t

    z = np.geomspace(1e-12, 10, 400_001)
    critical = t.ppf(1 - 5e-7, 1)
    reference = float(np.trapezoid(2 * norm.pdf(z) * norm.cdf(distance * math.sqrt(2) - critical * z), z))
    assert pairs_needed(1.0, distance, 1 - 1e-6, reference * 0.99) == 2
    assert pairs_needed(1.0, distance, 1 - 1e-6, reference * 1.01) == 3


@given(st.floats(0.01, 20), st.sampled_from([0.02, 0.2, 0.5, 0.8, 0.9, 0.99]))
def test_tost_pairs_needed_are_the_fewest(noise: float, power: float) -> None:
    num_pairs = tost_pairs_needed(noise, 1.0, power)
    assert num_pairs is not None
    assert tost_power(noise, 1.0, num_pairs) >= power
    assert num_pairs == 2 or tost_power(noise, 1.0, num_pairs - 1) < power


def test_equivalence_within_next_to_nothing_is_out_of_reach() -> None:
    assert tost_pairs_needed(1e6, 0.01) is None


# The time of a whole corpus


def step(documents: int, tokens: int, tokens_squared: int, cost: tuple[float, float, float]) -> dict[str, Any]:
    seconds = cost[0] * documents + cost[1] * tokens + cost[2] * tokens_squared
    return {"seconds": seconds, "documents": documents, "tokens": tokens, "tokens_squared": tokens_squared}


def steps_of(lengths: list[list[int]], cost: tuple[float, float, float]) -> list[dict[str, Any]]:
    return [step(len(row), sum(row), sum(n * n for n in row), cost) for row in lengths]


LENGTHS = [[100, 200, 4000], [50, 60, 900], [256, 256, 30_000], [7000, 20, 10], [500, 500, 500]]
CORPUS = {"documents": 544, "tokens": 540_000, "tokens_squared": 3_000_000_000}


def test_the_corpus_time_is_recovered_from_steps_of_known_cost() -> None:
    cost = (0.02, 1e-4, 3e-9)
    wanted = step(**CORPUS, cost=cost)["seconds"]
    assert corpus_seconds(steps_of(LENGTHS, cost), 0, CORPUS) == pytest.approx(wanted, rel=1e-9)


def test_warm_up_is_left_out_of_the_fit() -> None:
    steps = steps_of(LENGTHS, (0.02, 1e-4, 3e-9))
    slow = [{**steps[0], "seconds": 500.0}, {**steps[1], "seconds": 90.0}]
    assert corpus_seconds([*slow, *steps], 2, CORPUS) == pytest.approx(corpus_seconds(steps, 0, CORPUS), rel=1e-9)


def test_no_cost_is_negative() -> None:
    # 8 documents a step; the longer the step, the less it took: a free fit gives the corpus less than no time
    steps = [
        {"seconds": 10 - k, "documents": 8, "tokens": 1000 * (k + 1), "tokens_squared": 9e5 + k % 2} for k in range(6)
    ]
    corpus = {"documents": 80, "tokens": 1e6, "tokens_squared": 9e6}
    assert corpus_seconds(steps, 0, corpus) == pytest.approx(75)  # the mean step of 7.5 s, ten times


def test_steps_all_alike_speak_for_a_corpus_alike_and_for_no_other() -> None:
    steps = steps_of([[256] * 8] * 5, (0.0, 1e-3, 0.0))
    alike = {"documents": 80, "tokens": 80 * 256, "tokens_squared": 80 * 256**2}
    assert corpus_seconds(steps, 0, alike) == pytest.approx(20.48)
    with pytest.raises(ValueError, match="do not determine"):
        corpus_seconds(steps, 0, CORPUS)


@pytest.mark.parametrize("warmup", [5, 9, -1])
def test_no_step_left_to_measure_is_refused(warmup: int) -> None:
    with pytest.raises(ValueError, match="none is left to measure"):
        corpus_seconds(steps_of(LENGTHS, (1.0, 0, 0)), warmup, CORPUS)


def test_a_step_log_of_an_older_version_is_named() -> None:
    steps = steps_of(LENGTHS, (1.0, 0, 0))
    del steps[3]["tokens_squared"]
    with pytest.raises(ValueError, match="a step has no tokens_squared"):
        corpus_seconds(steps, 0, CORPUS)
    with pytest.raises(ValueError, match="the corpus has no tokens"):
        corpus_seconds(steps_of(LENGTHS, (1.0, 0, 0)), 0, {"documents": 1})


def test_importing_the_judges_imports_neither_torch_nor_scipy() -> None:
    code = "import sys, harness.stats, harness.perf.claims; print([m for m in ('torch', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
