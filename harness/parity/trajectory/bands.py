"""How far a run may be from a baseline's runs that differ in rounding alone: a band per step, and a limit on the drift.

Those runs are exchangeable: each deviates from the others as a sound candidate would. The steps of a run are not
independent (what one step rounds, the next one starts from), so no step is judged by itself. Each run is reduced to two
numbers, its peak and its drift, and the candidate's are compared with the prediction limits of the runs' own
(Student's, for one more observation: Hahn 1970). The correlation of steps is in those numbers already, whatever it is.

- peak: the largest deviation of any step from the mean of the other runs, in units of the spread at that step. Its
  limit follows from the logarithms of the runs' own peaks, each against the others (leave-one-out). One layout that
  went another way makes Student's limit on so few logarithms absurd (hundreds of spreads, seen on a GPU), so it is at
  most ``MOST_PEAK`` times the largest peak seen, which costs no false alarms (the simulation).
- drift: the mean deviation over all steps. Under normal noise its limit is exact.

``harness/parity/simulation.py`` computes how often sound candidates fail and faults are seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness.parity.claims import LARGER_ROUNDING, MOST_PEAK, NUM_SMOOTHED_STEPS, SHARE_OF_ALL_STEPS
from harness.stats import t_quantile

_FLOAT32, _BFLOAT16 = 2.0**-23, 2.0**-7  # spacing of numbers in [1, 2)

Quantity = Literal["loss", "grad_norm"]  # nats per trained token; the logarithm of the gradient's norm
QUANTITIES: tuple[Quantity, ...] = ("loss", "grad_norm")


@dataclass(frozen=True)
class Band:
    """What is allowed. ``centre``, ``spread``, ``half_width``: shape (steps,), in the quantity's unit.

    ``peak_limit``: in spreads. ``drift_limit``: in the quantity's unit, around the mean of ``centre``.
    """

    centre: np.ndarray
    spread: np.ndarray
    half_width: np.ndarray
    peak_limit: float
    drift_limit: float
    num_runs: int


@dataclass(frozen=True)
class Deviation:
    """How far a run is from the centre: ``peak`` in spreads, at ``peak_step`` (from 1); ``drift`` in the unit."""

    peak: float
    peak_step: int
    drift: float
    is_inside: bool
    num_steps_outside: int


def resolution(values: np.ndarray) -> np.ndarray:
    """The spacing of the numbers that a run logs, at each of ``values`` (any shape): float32's or bfloat16's.

    A backend that keeps gradients in bfloat16 logs their norm in it, at steps of 0.4 to 0.8%.
    """
    rounded = np.asarray(values, dtype=np.float32)
    is_short = bool((rounded.view(np.uint32) & 0xFFFF == 0).all() and (rounded == values).all())
    exponent = np.floor(np.log2(np.maximum(np.abs(values), np.finfo(np.float64).tiny)))
    return np.asarray(2.0**exponent * (_BFLOAT16 if is_short else _FLOAT32))


def band_of(quantity: Quantity, runs: np.ndarray, alpha: float) -> Band:
    """:func:`draw_band` of ``runs``, shape (runs, steps), with the spacing at which they were logged."""
    if quantity == "loss":
        return draw_band(runs, np.array([resolution(run) for run in runs]), alpha)
    return draw_band(runs, np.array([resolution(np.exp(run)) / np.exp(run) for run in runs]), alpha)


def draw_band(runs: np.ndarray, resolutions: np.ndarray, alpha: float) -> Band:
    """The band of ``runs``, shape (runs, steps), for one more run; each of its two limits is exceeded with ``alpha``.

    ``resolutions``: spacing of the logged numbers, same shape and unit. ``ValueError``: fewer than three runs.
    """
    num_runs, num_steps = runs.shape
    if num_runs < 3:
        raise ValueError(f"{num_runs} runs show no spread of spreads")
    peaks = []
    for left_out in range(num_runs):
        others, spacing = np.delete(runs, left_out, axis=0), np.delete(resolutions, left_out, axis=0)
        spread = _spread(others, spacing) * math.sqrt(1 + 1 / (num_runs - 1))
        peaks.append(float(np.max(np.abs(runs[left_out] - others.mean(axis=0)) / spread)))
    logs = np.log(np.maximum(peaks, 1e-12))
    log_sd = float(logs.std(ddof=1)) * math.sqrt(1 + 1 / num_runs)  # of one more run
    factor = math.sqrt(LARGER_ROUNDING**2 + 1 / num_runs)
    typical = math.exp(float(logs.mean()) + t_quantile(1 - alpha, num_runs - 1) * log_sd)
    spread = _spread(runs, resolutions)
    means = runs.mean(axis=1)
    drift_sd = math.hypot(float(means.std(ddof=1)), float(np.sqrt((resolutions**2).mean() / 12 / num_steps)))
    peak_limit = min(typical, MOST_PEAK * max(peaks)) * factor
    return Band(
        centre=runs.mean(axis=0),
        spread=spread,
        half_width=peak_limit * spread,
        peak_limit=peak_limit,
        drift_limit=t_quantile(1 - alpha / 2, num_runs - 1) * drift_sd * factor,
        num_runs=num_runs,
    )


def compare_with_band(band: Band, run: np.ndarray) -> Deviation:
    """How far ``run``, shape (steps,), is from the band's centre, and whether that is inside its limits."""
    distances = np.abs(run - band.centre) / band.spread
    drift = float(np.mean(run - band.centre))
    outside = int((distances > band.peak_limit).sum())
    return Deviation(
        peak=float(distances.max()),
        peak_step=int(distances.argmax()) + 1,
        drift=drift,
        is_inside=not outside and abs(drift) <= band.drift_limit,
        num_steps_outside=outside,
    )


def num_distinct(runs: np.ndarray) -> int:
    """How many of ``runs``, shape (runs, steps), are not equal to the last bit: a copy shows no noise."""
    return len(np.unique(runs, axis=0))


def _spread(runs: np.ndarray, resolutions: np.ndarray) -> np.ndarray:
    """Standard deviation over runs: pooled over neighbouring steps, a part over all, and what logging rounds away."""
    variance = runs.var(axis=0, ddof=1)
    width = min(NUM_SMOOTHED_STEPS, len(variance))
    weights = np.convolve(np.ones_like(variance), np.ones(width), mode="same")
    pooled = np.convolve(variance, np.ones(width), mode="same") / weights
    pooled = (1 - SHARE_OF_ALL_STEPS) * pooled + SHARE_OF_ALL_STEPS * variance.mean()
    return np.asarray(np.sqrt(pooled + (resolutions**2).mean(axis=0) / 12))
