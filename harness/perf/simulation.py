"""How often the gate is wrong: the interval and the verdicts on pairs whose truth is known.

``python -m harness.perf.simulation`` prints the figures of docs/gate.md as Markdown (minutes, one
core, seeded). It calls the functions that judge real runs, once for every simulated trial.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product

import numpy as np

from harness.perf.claims import CLAIMS, Claim, judge
from harness.simulation import percent, table
from harness.stats import ratio_interval, tost, tost_power
from harness.verdict import Verdict

SEED = 20261124
SIZES = (3, 5, 7, 10)
LOG_SDS = (0.002, 0.01, 0.05, 0.2)
_BY_NAME = {claim.name: claim for claim in CLAIMS}
SPEED, MEMORY, CONTROL = (_BY_NAME[name] for name in ("legacy_256_speed", "genome_full_peak_allocated", "control_aa"))

# Logs of 2 n runs in the order they are run, A B B A A B ..., shape (trials, 2 n), in units of a
# run's sd. The two arms' means are equal, so that the true ratio stays what was asked for.
Noise = Callable[[np.random.Generator, int, int], np.ndarray]


def _normal(rng: np.random.Generator, trials: int, runs: int) -> np.ndarray:
    return rng.standard_normal((trials, runs))


def _rarely_slow(rng: np.random.Generator, trials: int, runs: int) -> np.ndarray:
    return np.asarray(5.0 * (rng.random((trials, runs)) < 0.1))


def _one_arm_rarely_slow(*places: int) -> Noise:
    """``places``: the arm's in A B B A."""
    return lambda rng, trials, runs: (_rarely_slow(rng, trials, runs) - 0.5) * np.isin(np.arange(runs) % 4, places)


def _autocorrelated(rng: np.random.Generator, trials: int, runs: int) -> np.ndarray:
    logs = _normal(rng, trials, runs)
    for run in range(1, runs):
        logs[:, run] = 0.8 * logs[:, run - 1] + 0.6 * logs[:, run]
    return logs


_slow_baseline, _slow_candidate = _one_arm_rarely_slow(0, 3), _one_arm_rarely_slow(1, 2)
NOISES: dict[str, Noise] = {
    "log-normal, independent": _normal,
    "heavy tails (Student's t, 3 degrees of freedom)": lambda rng, *size: rng.standard_t(3, size) / math.sqrt(3),
    "one run in ten 5 sd slower, both arms": lambda rng, *size: _normal(rng, *size) + _rarely_slow(rng, *size),
    "one baseline run in ten 5 sd slower": lambda rng, *size: _normal(rng, *size) + _slow_baseline(rng, *size),
    "one candidate run in ten 5 sd slower": lambda rng, *size: _normal(rng, *size) + _slow_candidate(rng, *size),
    "no noise, but one candidate run in ten 5 sd slower": _slow_candidate,
    "neighbouring runs correlated (0.8)": _autocorrelated,
    "drift of 5 sd over the trial": lambda rng, trials, runs: _normal(rng, trials, runs) + np.linspace(0, 5, runs),
    "the second run of every pair slower by 2 sd": lambda rng, trials, runs: (
        _normal(rng, trials, runs) + 2 * (np.arange(runs) % 2)
    ),
}


def draw_trials(
    rng: np.random.Generator, trials: int, num_pairs: int, ratio: float, log_sd: float, noise: Noise = _normal
) -> tuple[np.ndarray, np.ndarray]:
    """Baseline and candidate values, each of shape (trials, num_pairs), in the order AB BA AB ...

    ``ratio``: true baseline / candidate; ``log_sd``: of the log ratio of a pair of independent runs.
    """
    runs = noise(rng, trials, 2 * num_pairs).reshape(trials, num_pairs, 2) * (log_sd / math.sqrt(2))
    runs[:, 1::2] = runs[:, 1::2, ::-1]
    return ratio * np.exp(runs[:, :, 0]), np.exp(runs[:, :, 1])


def coverage(
    rng: np.random.Generator, trials: int, num_pairs: int, log_sd: float, *, ratio: float = 2.0, noise: Noise = _normal
) -> float:
    """Share of 95% intervals that hold the true ratio."""
    held = 0
    for above, below in zip(*draw_trials(rng, trials, num_pairs, ratio, log_sd, noise), strict=True):
        interval = ratio_interval(above.tolist(), below.tolist())
        held += interval.low <= ratio <= interval.high
    return held / trials


def judge_trial(claim: Claim, baseline: Iterable[float], candidate: Iterable[float]) -> Verdict:
    """The verdict on one simulated trial in which every planned pair completed."""
    old, new = [float(value) for value in baseline], [float(value) for value in candidate]
    done = ["completed"] * len(old)
    return judge(claim, old, new, num_pairs_planned=len(old), baseline_statuses=done, candidate_statuses=done)


def verdict_rates(
    rng: np.random.Generator,
    trials: int,
    num_pairs: int,
    claim: Claim,
    ratio: float,
    log_sd: float,
    noise: Noise = _normal,
) -> dict[str, float]:
    """Share of PASS, FAIL and INCONCLUSIVE. ``ratio``: the true one, in the claim's own direction."""
    drawn = draw_trials(rng, trials, num_pairs, ratio if claim.direction == "at_least" else 1 / ratio, log_sd, noise)
    counts = Counter(judge_trial(claim, *pair).status for pair in zip(*drawn, strict=True))
    return {status: counts[status] / trials for status in ("PASS", "FAIL", "INCONCLUSIVE")}


def equivalence_rate(
    rng: np.random.Generator, trials: int, num_pairs: int, sd: float, margin: float, true_difference: float
) -> float:
    """Share of trials that :func:`~harness.stats.tost` calls equivalent."""
    drawn = true_difference + sd * rng.standard_normal((trials, num_pairs))
    return sum(tost(row.tolist(), margin).is_equivalent for row in drawn) / trials


def repeated_pass_rates(
    rng: np.random.Generator, trials: int, num_pairs: int, ratio: float, log_sd: float, most_pairs: int = 100
) -> tuple[float, float, float]:
    """PASS of the speed claim where INCONCLUSIVE is followed up once: not at all, by a new trial, by more pairs.

    The new trial has the pairs that the verdict asks for, but is not run if they are more than
    ``most_pairs``; the last figure is that of old and new pairs judged together at that number.
    """
    first = anew = together = 0
    for old, new in zip(*draw_trials(rng, trials, num_pairs, ratio, log_sd), strict=True):
        verdict = judge_trial(SPEED, old, new)
        first += verdict.status == "PASS"
        needed = verdict.figures["pairs_needed"]
        if needed is None or needed > most_pairs:
            continue
        more_old, more_new = (arm[0] for arm in draw_trials(rng, 1, needed, ratio, log_sd))
        anew += judge_trial(SPEED, more_old, more_new).status == "PASS"
        extra = needed - num_pairs  # what an extended trial would add to reach that number
        pooled = np.concatenate([old, more_old[:extra]]), np.concatenate([new, more_new[:extra]])
        together += judge_trial(SPEED, *pooled).status == "PASS"
    return first / trials, (first + anew) / trials, (first + together) / trials


def report(trials: int) -> Iterable[str]:
    """The tables, one after the other, all figures in percent."""
    worst = 100 * math.sqrt(0.25 / trials)
    small = 100 * math.sqrt(0.025 * 0.975 / trials)
    yield f"{trials} simulated trials per figure, in percent; standard error {small:.2f} at 2.5%, {worst:.2f} at 50%.\n"
    sizes = [f"n={n}" for n in SIZES]

    rng = np.random.default_rng([SEED, 1])
    yield table(
        "Coverage of the 95% paired-t interval of a ratio (wanted: 95)",
        ["sd of a pair's log ratio", *sizes],
        [[f"{sd:g}", *(percent(coverage(rng, trials, n, sd)) for n in SIZES)] for sd in LOG_SDS],
    )
    for number, (claim, truths, log_sds) in enumerate(
        [
            (SPEED, (1.9, 2.0, 2.2, 3.0, 5.0), (0.01, 0.05, 0.2)),
            (MEMORY, (0.21, 0.20, 0.19, 0.15), (0.002, 0.01, 0.05)),
            (CONTROL, (1.0, 1.01, 1.02, 1.05, 1.1), (0.002, 0.01, 0.05)),
        ],
        start=2,
    ):
        rng = np.random.default_rng([SEED, number])
        rows = []
        for truth, sd in product(truths, log_sds):
            rates = [verdict_rates(rng, trials, n, claim, truth, sd) for n in SIZES]
            rows.append([f"{truth:g}", f"{sd:g}", *(percent(rate["PASS"], rate["FAIL"]) for rate in rates)])
        yield table(
            f"PASS / FAIL of a claim {claim.direction.replace('_', ' ')} {claim.bar:g} (the rest is INCONCLUSIVE)",
            ["true ratio", "log sd", *sizes],
            rows,
        )

    rng = np.random.default_rng([SEED, 5])

    def equivalent(num_pairs: int, difference: float) -> str:
        simulated = equivalence_rate(rng, trials, num_pairs, 0.005, 0.01, difference)
        return f"{percent(simulated)} ({percent(tost_power(0.005, 0.01, num_pairs, difference))})"

    yield table(
        "Equivalent by TOST, margin 0.01, sd of a pair's difference 0.005: simulated (computed)",
        ["true difference", *sizes],
        [[f"{d:g}", *(equivalent(n, d) for n in SIZES)] for d in (0.0, 0.0025, 0.005, 0.01, 0.0125)],
    )

    rng = np.random.default_rng([SEED, 6])

    def misled(num_pairs: int, noise: Noise) -> str:
        covered = coverage(rng, trials, num_pairs, 0.05, noise=noise)
        return percent(covered, verdict_rates(rng, trials, num_pairs, SPEED, 2.0, 0.05, noise)["PASS"])

    yield table(
        "Noise that is not what the interval assumes: coverage / false PASS at a true ratio of exactly 2.0, sd 0.05",
        ["noise", *sizes],
        [[name, *(misled(n, noise) for n in SIZES)] for name, noise in NOISES.items()],
    )

    rng = np.random.default_rng([SEED, 7])
    yield table(
        "False PASS at a true ratio of exactly 2.0, sd 0.05, INCONCLUSIVE followed up once (by at most 100 pairs)",
        ["first trial", "at once", "or by a new trial", "or by old and new pairs together (not allowed)"],
        [[f"n={n}", *map(percent, repeated_pass_rates(rng, trials, n, 2.0, 0.05))] for n in SIZES],
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m harness.perf.simulation", description=__doc__)
    parser.add_argument("--trials", type=int, default=20_000, help="simulated trials per figure")
    for part in report(parser.parse_args().trials):
        print(part, flush=True)


if __name__ == "__main__":
    main()
