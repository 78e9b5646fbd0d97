"""Rungs 4 and 5: the baseline's own rounding over a whole run, and the candidate held against it.

At dropout 0, since masks differ between layouts, and with every arm's adapter in float32
(``harness.parity.probes.float32_adapter`` says why). Losses are compared as they are, gradient norms by their
logarithms. What a band is, and how often it is wrong: ``harness/parity/trajectory/bands.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from forge.training.config.workload import load_workload
from forge.training.system.errors import CheckError
from harness.measurement.metrics import training_steps
from harness.measurement.results import Outcome, RunSpec
from harness.parity.claims import Rung, not_completed
from harness.parity.same_run import check_same_run
from harness.parity.suite import FAULT, NO_DROPOUT, TRAJECTORY_SEED
from harness.parity.trajectory.bands import (
    LEAST_RUNS,
    Band,
    Deviation,
    draw_band,
    hold_against,
    num_distinct,
    resolution,
)

if TYPE_CHECKING:
    from harness.parity.session import Ladder

Quantity = Literal["loss", "grad_norm"]
QUANTITIES: tuple[Quantity, ...] = ("loss", "grad_norm")
LEAST_STEPS = 100
_ROUNDING = "rounding="
FALSE_ALARM = 0.02  # of a sound candidate, shared by the four limits: peak and drift of two quantities


@dataclass(frozen=True)
class Noise:
    """The baseline's band of each quantity, and the runs it was drawn from."""

    bands: dict[Quantity, Band]
    values: dict[Quantity, np.ndarray]  # (runs, steps); log of the gradient norm


def trajectory(outcome: Outcome, quantity: Quantity) -> np.ndarray:
    """A run's losses (nats a trained token) or logarithms of its gradient norms, shape (steps,).

    Raises :class:`CheckError` for a step without a finite value, or a gradient norm of 0.
    """
    raw = [line.get(quantity) for line in training_steps(outcome)]
    for number, value in enumerate(raw, 1):
        if value is None or not np.isfinite(value) or (quantity == "grad_norm" and value <= 0):
            raise CheckError(f"{outcome.spec.label()} [{outcome.run_id}]: step {number} has the {quantity} {value}")
    values = np.array(raw, dtype=np.float64)
    return np.asarray(np.log(values) if quantity == "grad_norm" else values)


def _resolutions(values: np.ndarray, quantity: Quantity) -> np.ndarray:
    """Spacing of the logged numbers, in the unit in which they are compared."""
    return resolution(np.exp(values)) / np.exp(values) if quantity == "grad_norm" else resolution(values)


def measure_noise(outcomes: list[Outcome]) -> Noise:
    """Bands of runs that did the same work. Raises :class:`WorkMismatch` where they did not."""
    for other in outcomes[1:]:
        check_same_run(outcomes[0], other)
    values = {quantity: np.array([trajectory(outcome, quantity) for outcome in outcomes]) for quantity in QUANTITIES}
    bands = {}
    for quantity, runs in values.items():
        spacing = np.array([_resolutions(run, quantity) for run in runs])
        bands[quantity] = draw_band(runs, spacing, FALSE_ALARM / 4)
    return Noise(bands, values)


def hold(noise: Noise, outcome: Outcome) -> dict[Quantity, Deviation]:
    """A run against the baseline's bands."""
    return {quantity: hold_against(noise.bands[quantity], trajectory(outcome, quantity)) for quantity in QUANTITIES}


# --------------------------------------------------------------------------------------------------------------------
# Rung 4


def noise_specs(ladder: Ladder) -> list[RunSpec]:
    """The baseline's runs that differ in rounding alone."""
    return [_noise_spec(ladder, layout) for layout in ladder.layouts]


def _noise_spec(ladder: Ladder, layout: tuple[str, ...], *changes: str) -> RunSpec:
    """``layout``: plan overrides, and ``rounding=NAME`` among them."""
    plan = tuple(setting for setting in layout if not setting.startswith(_ROUNDING))
    rounding = tuple(setting.removeprefix(_ROUNDING) for setting in layout if setting.startswith(_ROUNDING))
    spec = ladder.spec(
        ladder.baseline, TRAJECTORY_SEED, plan=plan, changes=(NO_DROPOUT, *changes), float32_adapter=True
    )
    return spec.model_copy(update={"rounding": rounding})


def judge_noise(ladder: Ladder) -> Rung:
    """Rung 4: PASS if enough different runs of enough steps show the baseline's rounding."""
    from harness.parity.outcome.judge import pilot_specs

    specs = noise_specs(ladder)
    # none of these hangs on another, so rungs 5 and 6 need not wait for this one's runs, only for its verdict
    ladder.prefetch([*specs, *trajectory_specs(ladder)[0], *pilot_specs(ladder)])
    outcomes = ladder.outcomes(specs)
    run_ids = [outcome.run_id for outcome in outcomes]
    if outcomes and outcomes[-1].status != "completed":
        return not_completed(4, outcomes[-1], "baseline", run_ids)
    if len(outcomes) < len(specs):
        return Rung(
            number=4,
            status="INCOMPLETE",
            reason=f"{len(outcomes)} of {len(specs)} runs of the baseline measured",
            run_ids=run_ids,
        )
    noise = measure_noise(outcomes)
    num_steps, distinct = noise.values["loss"].shape[1], num_distinct(noise.values["loss"])
    figures: dict[str, Any] = {
        "num_steps": num_steps,
        "num_runs": len(outcomes),
        "num_distinct_runs": distinct,
        "false_alarm": FALSE_ALARM,
        "layouts": [
            {"plan": list(layout), "run_id": outcome.run_id}
            | {f"{name}_rms": _rms(noise.values[name][row] - noise.bands[name].centre) for name in QUANTITIES}
            for row, (layout, outcome) in enumerate(zip(ladder.layouts, outcomes, strict=True))
        ],
        "bands": {name: _described(band) for name, band in noise.bands.items()},
    }
    unit = noise.bands["loss"].spread
    found = f"the loss moves by {_rms(unit):.2g} nats a step (rms), the gradient norm by "
    found += f"{_rms(noise.bands['grad_norm'].spread):.2%}; {distinct} different runs of {num_steps} steps"
    if num_steps < LEAST_STEPS:
        return Rung(
            number=4,
            status="FAIL",
            reason=f"{found}: at least {LEAST_STEPS} are needed",
            figures=figures,
            run_ids=run_ids,
        )
    if distinct < LEAST_RUNS:
        reason = f"{found}: {LEAST_RUNS} are needed, and equal runs show no noise"
        return Rung(number=4, status="INCONCLUSIVE", reason=reason, figures=figures, run_ids=run_ids)
    return Rung(number=4, status="PASS", reason=found, figures=figures, run_ids=run_ids)


# --------------------------------------------------------------------------------------------------------------------
# Rung 5


def trajectory_specs(ladder: Ladder) -> tuple[list[RunSpec], str]:
    """The candidate's run and the baseline's with a planted fault; and which fault."""

    candidate_spec = ladder.spec(ladder.candidate, TRAJECTORY_SEED, changes=(NO_DROPOUT,), float32_adapter=True)
    rate = load_workload(candidate_spec.workload, candidate_spec.overrides).optimizer.learning_rate
    faulty = f"optimizer.{FAULT[0]}={rate * FAULT[1]:.6g}"
    control_spec = _noise_spec(ladder, ladder.layouts[0], faulty)
    return [candidate_spec, control_spec], faulty


def judge_trajectory(ladder: Ladder) -> Rung:
    """Rung 5: PASS if the candidate stays within the bands and a planted fault does not."""
    baselines = ladder.outcomes(noise_specs(ladder))
    noise = measure_noise(baselines)
    specs, faulty = trajectory_specs(ladder)
    outcomes = ladder.outcomes(specs)
    run_ids = [outcome.run_id for outcome in outcomes]
    if not outcomes:
        return Rung(number=5, status="INCOMPLETE", reason="no time was left for the candidate's run")
    candidate = outcomes[0]
    if candidate.status != "completed":
        return not_completed(5, candidate, "candidate", run_ids)
    check_same_run(baselines[0], candidate)
    found = hold(noise, candidate)
    figures: dict[str, Any] = {
        "candidate": {name: _deviation(noise.bands[name], deviation) for name, deviation in found.items()},
        "curves": _curves(noise, candidate),
        "bands": {name: _described(band) for name, band in noise.bands.items()},
        "fault": faulty,
    }
    told = "; ".join(_sentence(name, noise.bands[name], deviation) for name, deviation in found.items())
    if not all(deviation.is_inside for deviation in found.values()):
        return Rung(number=5, status="FAIL", reason=told, figures=figures, run_ids=run_ids)
    if len(outcomes) < 2 or outcomes[1].status != "completed":
        why = "not measured" if len(outcomes) < 2 else outcomes[1].status
        reason = f"{told}; but the run with a planted fault is {why}"
        return Rung(number=5, status="INCOMPLETE", reason=reason, figures=figures, run_ids=run_ids)
    seen = hold(noise, outcomes[1])
    figures["control"] = {name: _deviation(noise.bands[name], deviation) for name, deviation in seen.items()}
    if all(deviation.is_inside for deviation in seen.values()):
        reason = f"{told}; but so is the baseline with {faulty}: the noise hides such faults"
        return Rung(number=5, status="INCONCLUSIVE", reason=reason, figures=figures, run_ids=run_ids)
    told += f"; the baseline with {faulty} is seen to leave them"
    return Rung(number=5, status="PASS", reason=told, figures=figures, run_ids=run_ids)


# --------------------------------------------------------------------------------------------------------------------


def _sentence(name: Quantity, band: Band, found: Deviation) -> str:
    what, unit = ("loss", " nats") if name == "loss" else ("gradient norm", "")
    drift, limit = (found.drift, band.drift_limit) if name == "loss" else (100 * found.drift, 100 * band.drift_limit)
    unit = unit or "%"
    outside = f", {found.num_steps_outside} steps outside" if found.num_steps_outside else ""
    peak = f"at most {found.peak:.1f} spreads off, at step {found.peak_step} (allowed {band.peak_limit:.1f}{outside})"
    return f"{what}: {peak}, drift {drift:+.2g}{unit} (allowed {limit:.2g})"


def _deviation(band: Band, found: Deviation) -> dict[str, Any]:
    return {
        "peak_spreads": found.peak,
        "peak_step": found.peak_step,
        "peak_limit_spreads": band.peak_limit,
        "drift": found.drift,
        "drift_limit": band.drift_limit,
        "num_steps_outside": found.num_steps_outside,
        "is_inside": found.is_inside,
    }


def _described(band: Band) -> dict[str, Any]:
    return {
        "spread_rms": _rms(band.spread),
        "peak_limit_spreads": band.peak_limit,
        "drift_limit": band.drift_limit,
        "num_runs": band.num_runs,
    }


def _curves(noise: Noise, candidate: Outcome) -> dict[str, Any]:
    """By quantity and step: the baseline's mean, the band around it, the candidate; gradient norms as logarithms."""
    return {
        name: {
            "baseline": band.centre.tolist(),
            "half_width": band.half_width.tolist(),
            "candidate": trajectory(candidate, name).tolist(),
        }
        for name, band in noise.bands.items()
    }


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))
