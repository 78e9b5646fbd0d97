"""How often rungs 5 and 6 decide wrongly, on trajectories and seeds whose truth is known.

``python -m harness.parity.simulation`` prints the tables of docs/parity.md as Markdown (minutes on one core; seeded, so
that they are the same every time). It calls the functions that judge real runs. With ``--recorded FILE`` it also prints
how many real faults, scaled down, the bands of recorded runs would see (tests/data/parity_trajectories.json).
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from harness.parity.claims import FALSE_ALARM, LARGER_ROUNDING, LEAST_SEEDS, LIMIT_ALPHA, MARGIN_NATS, MOST_SEEDS
from harness.parity.outcome.judge import judge_differences, plan_seeds
from harness.parity.suite import LAYOUTS, PILOT_SEEDS
from harness.parity.trajectory.bands import Band, compare_with_band, draw_band
from harness.parity.trajectory.recorded import read_recorded

SEED = 20261125
NUM_STEPS = 150
NUM_RUNS = len(LAYOUTS)

# Deviations of `runs` trajectories from what they have in common, shape (runs, NUM_STEPS), in any unit.
Noise = Callable[[np.random.Generator, int], np.ndarray]
_GROWTH = np.sqrt(np.arange(1, NUM_STEPS + 1) / NUM_STEPS)
_MODES = np.stack(
    [
        np.exp(np.linspace(0, 3, NUM_STEPS)),
        np.sin(np.linspace(0, 9, NUM_STEPS)) * np.linspace(0, 10, NUM_STEPS),
        5 * np.cos(np.arange(NUM_STEPS) * 2.4),
    ]
)
_BY_STEP = np.exp(0.7 * np.random.default_rng(3).standard_normal(NUM_STEPS))


def _autoregressive(correlation: float) -> Noise:
    def draw(rng: np.random.Generator, runs: int) -> np.ndarray:
        noise = rng.standard_normal((runs, NUM_STEPS))
        for step in range(1, NUM_STEPS):
            noise[:, step] = correlation * noise[:, step - 1] + math.sqrt(1 - correlation**2) * noise[:, step]
        return np.asarray(noise * _GROWTH)

    return draw


def _few_directions(rng: np.random.Generator, runs: int) -> np.ndarray:
    return np.asarray(rng.standard_normal((runs, 3)) @ _MODES + 0.3 * rng.standard_normal((runs, NUM_STEPS)))


def _heavy_tailed(rng: np.random.Generator, runs: int) -> np.ndarray:
    return np.asarray(rng.standard_t(3, (runs, NUM_STEPS)) * _GROWTH)


def _unequal_layouts(rng: np.random.Generator, runs: int) -> np.ndarray:
    return np.asarray(_autoregressive(0.5)(rng, runs) * rng.uniform(0.5, 1.5, (runs, 1)))


def _unequal_steps(rng: np.random.Generator, runs: int) -> np.ndarray:
    return np.asarray(_autoregressive(0.3)(rng, runs) * _BY_STEP)


NOISES: dict[str, Noise] = {
    "steps independent": _autoregressive(0.0),
    "steps correlated 0.9": _autoregressive(0.9),
    "steps correlated 0.99": _autoregressive(0.99),
    "three directions, one growing": _few_directions,
    "layouts of unequal noise": _unequal_layouts,
    "steps of unequal noise": _unequal_steps,
    "heavy tails (t, 3 degrees of freedom)": _heavy_tailed,
}


def false_alarms(rng: np.random.Generator, trials: int, noise: Noise, rounding: float) -> float:
    """Share of sound candidates that leave a band of one of two independent quantities: all four limits together.

    ``rounding``: the candidate's deviations as a multiple of the baseline's.
    """
    alarms = 0
    for _ in range(trials):
        inside = True
        for _ in range(2):
            runs = noise(rng, NUM_RUNS + 1)
            band = draw_band(runs[:-1], np.zeros((NUM_RUNS, NUM_STEPS)), LIMIT_ALPHA)
            inside = compare_with_band(band, rounding * runs[-1]).is_inside and inside
        alarms += not inside
    return alarms / trials


def seen(bands: list[Band], sound: list[np.ndarray], effects: list[np.ndarray], strength: float) -> bool:
    """Whether a fault is seen: its ``effects`` (by quantity, shape (steps,)) times ``strength`` on sound runs."""
    return not all(
        compare_with_band(band, run + strength * effect).is_inside
        for band, run, effect in zip(bands, sound, effects, strict=True)
    )


def recorded_power(path: Path, strengths: Iterable[float]) -> dict[str, list[float]]:
    """By fault, the share of recorded runs that show it at each strength; each run against the band of the others."""
    recorded = read_recorded(path)
    shares: dict[str, list[float]] = {}
    for fault, effects in recorded.effects().items():
        shares[fault] = []
        for strength in strengths:
            count = 0
            for left_out in range(recorded.num_runs):
                bands, sound = recorded.bands_without(left_out, LIMIT_ALPHA)
                count += seen(bands, sound, effects, strength)
            shares[fault].append(count / recorded.num_runs)
    return shares


def outcome_rates(
    rng: np.random.Generator, trials: int, sd: float, true_differences: Iterable[float]
) -> tuple[Counter[int | None], list[float]]:
    """How often the pilot fixes each number of seeds; share of PASS of pilot and test together, by true difference.

    ``sd``: of the paired differences over seeds. A pilot that finds the workload too noisy is not a PASS.
    """
    counts: Counter[int | None] = Counter()
    differences = list(true_differences)
    passes = [0] * len(differences)
    for _ in range(trials):
        pilot = (sd * rng.standard_normal(len(PILOT_SEEDS))).tolist()
        num_seeds = plan_seeds(pilot).num_seeds
        counts[num_seeds] += 1
        if num_seeds is None:
            continue
        noise = sd * rng.standard_normal(num_seeds)
        for index, difference in enumerate(differences):
            passes[index] += judge_differences((noise + difference).tolist())[0] == "PASS"
    return counts, [count / trials for count in passes]


def _table(title: str, head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _percent(*shares: float) -> str:
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def report(trials: int, recorded: Path | None) -> Iterable[str]:
    """The tables, as Markdown."""
    rng = np.random.default_rng([SEED, 6])
    truths = (0.0, 0.005, MARGIN_NATS, 1.25 * MARGIN_NATS)
    rows = []
    for sd in (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01):
        counts, passes = outcome_rates(rng, trials, sd, truths)
        planned = sorted(count for count in counts.elements() if count is not None)
        usual = f"{planned[len(planned) // 2]} ({planned[-max(1, len(planned) // 10)]})" if planned else "-"
        rows.append([f"{sd:g}", usual, _percent(counts[None] / trials), *(_percent(share) for share in passes)])
    pilot = f"pilot of {len(PILOT_SEEDS)} seeds, {LEAST_SEEDS} to {MOST_SEEDS} test seeds"
    yield _table(
        f"Rung 6: margin {MARGIN_NATS:g} nats, {pilot}; PASS in percent of {trials} whole procedures",
        ["sd of a seed's difference", "seeds, median (90%)", "too noisy", *(f"true difference {d:g}" for d in truths)],
        rows,
    )
    rng = np.random.default_rng([SEED, 5])
    few = max(100, trials // 4)
    yield _table(
        f"Rung 5: sound candidates that fail, in percent of {few}; {NUM_RUNS} runs of {NUM_STEPS} steps; intended: at"
        f" most {FALSE_ALARM:.0%}",
        ["noise", "rounding equal to the baseline's", f"{LARGER_ROUNDING:g} times the baseline's"],
        (
            [name, *(_percent(false_alarms(rng, few, noise, rounding)) for rounding in (1.0, LARGER_ROUNDING))]
            for name, noise in NOISES.items()
        ),
    )
    if recorded is not None:
        strengths = (1.0, 0.2, 0.1, 0.05, 0.02, 0.01)
        yield _table(
            "Rung 5: recorded faults that are seen, in percent, by share of their full strength",
            ["fault", *(f"x {strength:g}" for strength in strengths)],
            ([fault, *map(_percent, shares)] for fault, shares in recorded_power(recorded, strengths).items()),
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m harness.parity.simulation", description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000, help="simulated procedures per figure")
    parser.add_argument("--recorded", type=Path, help="recorded trajectories with faults")
    arguments = parser.parse_args()
    for table in report(arguments.trials, arguments.recorded):
        print(table, flush=True)


if __name__ == "__main__":
    main()
