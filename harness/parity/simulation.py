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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forge.training.system.files import read_json_object
from harness.parity.claims import FALSE_ALARM, LARGER_ROUNDING, LEAST_SEEDS, LIMIT_ALPHA, MARGIN_NATS, MOST_SEEDS
from harness.parity.outcome import judge_differences, plan_seeds
from harness.parity.suite import LAYOUTS, PILOT_SEEDS
from harness.parity.trajectory.bands import QUANTITIES, Band, band_of, compare_with_band, draw_band
from harness.simulation import percent, table

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


NOISES: dict[str, Noise] = {
    "steps independent": _autoregressive(0.0),
    "steps correlated 0.9": _autoregressive(0.9),
    "steps correlated 0.99": _autoregressive(0.99),
    "three directions, one growing": lambda rng, runs: (
        rng.standard_normal((runs, 3)) @ _MODES + 0.3 * rng.standard_normal((runs, NUM_STEPS))
    ),
    "layouts of unequal noise": lambda rng, runs: _autoregressive(0.5)(rng, runs) * rng.uniform(0.5, 1.5, (runs, 1)),
    "steps of unequal noise": lambda rng, runs: _autoregressive(0.3)(rng, runs) * _BY_STEP,
    "heavy tails (t, 3 degrees of freedom)": lambda rng, runs: rng.standard_t(3, (runs, NUM_STEPS)) * _GROWTH,
}


def false_alarms(rng: np.random.Generator, trials: int, noise: Noise, rounding: float) -> float:
    """Share of sound candidates that leave a band of one of two independent quantities: all four limits together.

    ``rounding``: the candidate's deviations as a multiple of the baseline's.
    """

    def is_inside() -> bool:
        runs = noise(rng, NUM_RUNS + 1)
        band = draw_band(runs[:-1], np.zeros((NUM_RUNS, NUM_STEPS)), LIMIT_ALPHA)
        return compare_with_band(band, rounding * runs[-1]).is_inside

    return sum(not all([is_inside(), is_inside()]) for _ in range(trials)) / trials


def seen(bands: list[Band], sound: list[np.ndarray], effects: list[np.ndarray], strength: float) -> bool:
    """Whether a fault is seen: its ``effects`` (by quantity, shape (steps,)) times ``strength`` on sound runs."""
    return not all(
        compare_with_band(band, run + strength * effect).is_inside
        for band, run, effect in zip(bands, sound, effects, strict=True)
    )


# --------------------------------------------------------------------------------------------------------------------
# Runs kept in a file: a baseline's that differ in rounding alone, and some with a planted fault


@dataclass(frozen=True)
class Recorded:
    """Losses (nats per trained token) and logarithms of gradient norms by name of the run, each of shape (steps,).

    The first of ``sound`` has the layout of the runs in ``faulty``.
    """

    sound: dict[str, tuple[np.ndarray, np.ndarray]]
    faulty: dict[str, tuple[np.ndarray, np.ndarray]]

    def bands(self, alpha: float, *, without: int | None = None) -> list[Band]:
        """The band of each quantity."""
        runs = [run for index, run in enumerate(self.sound.values()) if index != without]
        return [band_of(name, np.array([run[i] for run in runs]), alpha) for i, name in enumerate(QUANTITIES)]

    def bands_without(self, left_out: int, alpha: float) -> tuple[list[Band], list[np.ndarray]]:
        """The bands of all runs but one, and that one."""
        return self.bands(alpha, without=left_out), list(list(self.sound.values())[left_out])

    def effects(self) -> dict[str, list[np.ndarray]]:
        """By fault and quantity, what it changes: its run less the sound run of the same layout."""
        sound = next(iter(self.sound.values()))
        return {name: [run[0] - sound[0], run[1] - sound[1]] for name, run in self.faulty.items()}


def read_recorded(path: Path) -> Recorded:
    """From ``{"sound": {NAME: {"loss": [...], "grad_norm": [...]}}, "faulty": ...}``."""
    content = read_json_object(path)
    sound, faulty = (
        {name: (np.array(run["loss"]), np.log(np.array(run["grad_norm"]))) for name, run in content[part].items()}
        for part in ("sound", "faulty")
    )
    return Recorded(sound, faulty)


def recorded_power(path: Path, strengths: Iterable[float]) -> dict[str, list[float]]:
    """By fault, the share of recorded runs that show it at each strength; each run against the band of the others."""
    recorded = read_recorded(path)
    others = [recorded.bands_without(left_out, LIMIT_ALPHA) for left_out in range(len(recorded.sound))]
    return {
        fault: [sum(seen(*bands, effects, strength) for bands in others) / len(others) for strength in strengths]
        for fault, effects in recorded.effects().items()
    }


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


def report(trials: int, recorded: Path | None) -> Iterable[str]:
    """The tables, as Markdown."""
    rng = np.random.default_rng([SEED, 6])
    truths = (0.0, 0.005, MARGIN_NATS, 1.25 * MARGIN_NATS)
    rows = []
    for sd in (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01):
        counts, passes = outcome_rates(rng, trials, sd, truths)
        planned = sorted(count for count in counts.elements() if count is not None)
        usual = f"{planned[len(planned) // 2]} ({planned[-max(1, len(planned) // 10)]})" if planned else "-"
        rows.append([f"{sd:g}", usual, percent(counts[None] / trials), *(percent(share) for share in passes)])
    pilot = f"pilot of {len(PILOT_SEEDS)} seeds, {LEAST_SEEDS} to {MOST_SEEDS} test seeds"
    yield table(
        f"Rung 6: margin {MARGIN_NATS:g} nats, {pilot}; PASS in percent of {trials} whole procedures",
        ["sd of a seed's difference", "seeds, median (90%)", "too noisy", *(f"true difference {d:g}" for d in truths)],
        rows,
    )
    rng = np.random.default_rng([SEED, 5])
    few = max(100, trials // 4)
    yield table(
        f"Rung 5: sound candidates that fail, in percent of {few}; {NUM_RUNS} runs of {NUM_STEPS} steps; intended: at"
        f" most {FALSE_ALARM:.0%}",
        ["noise", "rounding equal to the baseline's", f"{LARGER_ROUNDING:g} times the baseline's"],
        (
            [name, *(percent(false_alarms(rng, few, noise, rounding)) for rounding in (1.0, LARGER_ROUNDING))]
            for name, noise in NOISES.items()
        ),
    )
    if recorded is not None:
        strengths = (1.0, 0.2, 0.1, 0.05, 0.02, 0.01)
        yield table(
            "Rung 5: recorded faults that are seen, in percent, by share of their full strength",
            ["fault", *(f"x {strength:g}" for strength in strengths)],
            ([fault, *map(percent, shares)] for fault, shares in recorded_power(recorded, strengths).items()),
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m harness.parity.simulation", description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000, help="simulated procedures per figure")
    parser.add_argument("--recorded", type=Path, help="recorded trajectories with faults")
    arguments = parser.parse_args()
    for part in report(arguments.trials, arguments.recorded):
        print(part, flush=True)


if __name__ == "__main__":
    main()
