"""Rungs 4 and 5: how far the baseline's own rounding moves a whole run, and whether the candidate stays within that.

At dropout 0, since masks differ between layouts, and with every arm's adapter in float32
(``harness.parity.probes.float32_adapter`` says why). Losses are compared as they are, gradient norms by their
logarithms. What a band is, and how often it is wrong: ``harness/parity/trajectory/bands.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.training.config.workload import load_workload
from forge.training.system.errors import CheckError
from harness.measurement.metrics import training_steps
from harness.measurement.results import Outcome, RunSpec
from harness.parity.claims import FALSE_ALARM, FAULT, LEAST_RUNS, LEAST_STEPS, LIMIT_ALPHA, verdict_on
from harness.parity.session import Ladder, check_same_run
from harness.parity.suite import NO_DROPOUT, TRAJECTORY_SEED
from harness.parity.trajectory.bands import (
    QUANTITIES,
    Band,
    Deviation,
    Quantity,
    band_of,
    compare_with_band,
    num_distinct,
)
from harness.verdict import Verdict, status_of_run, why_not_completed

_ROUNDING = "rounding="


@dataclass(frozen=True)
class Noise:
    """The baseline's band of each quantity, and the runs that it was drawn from."""

    bands: dict[Quantity, Band]
    values: dict[Quantity, np.ndarray]  # (runs, steps); log of the gradient norm


def trajectory(outcome: Outcome, quantity: Quantity) -> np.ndarray:
    """A run's losses (nats per trained token) or logarithms of its gradient norms, shape (steps,).

    Raises :class:`CheckError` for a step without a finite value, or a gradient norm of 0.
    """
    raw = [line.get(quantity) for line in training_steps(outcome)]
    for number, value in enumerate(raw, 1):
        if value is None or not np.isfinite(value) or (quantity == "grad_norm" and value <= 0):
            raise CheckError(f"{outcome.spec.label()} [{outcome.run_id}]: step {number} has the {quantity} {value}")
    values = np.array(raw, dtype=np.float64)
    return np.asarray(np.log(values) if quantity == "grad_norm" else values)


def measure_noise(outcomes: list[Outcome]) -> Noise:
    """Bands of runs that did the same work. Raises :class:`WorkMismatch` where they did not."""
    for other in outcomes[1:]:
        check_same_run(outcomes[0], other)
    values = {quantity: np.array([trajectory(outcome, quantity) for outcome in outcomes]) for quantity in QUANTITIES}
    return Noise({quantity: band_of(quantity, runs, LIMIT_ALPHA) for quantity, runs in values.items()}, values)


def deviations(noise: Noise, outcome: Outcome) -> dict[Quantity, Deviation]:
    """How far a run is from the baseline's, by quantity."""
    return {name: compare_with_band(band, trajectory(outcome, name)) for name, band in noise.bands.items()}


# --------------------------------------------------------------------------------------------------------------------
# Rung 4


def noise_specs(ladder: Ladder) -> list[RunSpec]:
    """The baseline's runs that differ in rounding alone."""
    return [_noise_spec(ladder, layout) for layout in ladder.layouts]


def _noise_spec(ladder: Ladder, layout: tuple[str, ...], *changes: str) -> RunSpec:
    """``layout``: plan overrides, and ``rounding=NAME`` among them."""
    plan = tuple(setting for setting in layout if not setting.startswith(_ROUNDING))
    rounding = tuple(setting.removeprefix(_ROUNDING) for setting in layout if setting.startswith(_ROUNDING))
    changes = (NO_DROPOUT, *changes)
    spec = ladder.spec(ladder.baseline, TRAJECTORY_SEED, plan=plan, changes=changes, float32_adapter=True)
    return spec.model_copy(update={"rounding": rounding})


def judge_noise(ladder: Ladder) -> Verdict:
    """Rung 4: PASS if enough different runs of enough steps show the baseline's rounding."""
    specs = noise_specs(ladder)
    outcomes = ladder.outcomes(specs)
    run_ids = [outcome.run_id for outcome in outcomes]
    if outcomes and (status := status_of_run(outcomes[-1].status, "baseline")):
        return verdict_on(4, status, why_not_completed(outcomes[-1], "baseline"), run_ids=run_ids)
    if len(outcomes) < len(specs):
        reason = f"{len(outcomes)} of {len(specs)} runs of the baseline measured: {ladder.session.why_missing()}"
        return verdict_on(4, "INCOMPLETE", reason, run_ids=run_ids)
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
    reason = f"the loss moves by {_rms(noise.bands['loss'].spread):.2g} nats per step (rms), the gradient norm by "
    reason += f"{_rms(noise.bands['grad_norm'].spread):.2%}; {distinct} different runs of {num_steps} steps"
    if num_steps < LEAST_STEPS:
        return verdict_on(4, "FAIL", f"{reason}: at least {LEAST_STEPS} are needed", figures, run_ids)
    if distinct < LEAST_RUNS:
        reason += f": {LEAST_RUNS} are needed, and equal runs show no noise"
        return verdict_on(4, "INCONCLUSIVE", reason, figures, run_ids)
    return verdict_on(4, "PASS", reason, figures, run_ids)


# --------------------------------------------------------------------------------------------------------------------
# Rung 5


def trajectory_specs(ladder: Ladder) -> tuple[list[RunSpec], str]:
    """The candidate's run and the baseline's with a planted fault; and which fault."""
    candidate_spec = ladder.spec(
        ladder.candidate, TRAJECTORY_SEED, plan=ladder.plan, changes=(NO_DROPOUT,), float32_adapter=True
    )
    rate = load_workload(candidate_spec.workload, candidate_spec.overrides).optimizer.learning_rate
    fault = f"optimizer.{FAULT[0]}={rate * FAULT[1]:.6g}"
    control_spec = _noise_spec(ladder, ladder.layouts[0], fault)
    return [candidate_spec, control_spec], fault


def judge_trajectory(ladder: Ladder) -> Verdict:
    """Rung 5: PASS if the candidate stays within the bands and a planted fault does not."""
    baselines = ladder.outcomes(noise_specs(ladder))
    noise = measure_noise(baselines)
    specs, fault = trajectory_specs(ladder)
    outcomes = ladder.outcomes(specs)
    run_ids = [outcome.run_id for outcome in outcomes]
    if not outcomes:
        return verdict_on(5, "INCOMPLETE", f"the candidate's run: {ladder.session.why_missing()}")
    candidate = outcomes[0]
    if status := status_of_run(candidate.status, "candidate"):
        return verdict_on(5, status, why_not_completed(candidate, "candidate"), run_ids=run_ids)
    check_same_run(baselines[0], candidate)
    by_quantity = deviations(noise, candidate)
    figures: dict[str, Any] = {
        "candidate": {name: _deviation(noise.bands[name], deviation) for name, deviation in by_quantity.items()},
        "curves": _curves(noise, candidate),
        "bands": {name: _described(band) for name, band in noise.bands.items()},
        "fault": fault,
    }
    reason = "; ".join(_sentence(name, noise.bands[name], deviation) for name, deviation in by_quantity.items())
    if not all(deviation.is_inside for deviation in by_quantity.values()):
        return verdict_on(5, "FAIL", reason, figures, run_ids)
    if len(outcomes) < 2:
        reason += f"; but the run with a planted fault: {ladder.session.why_missing()}"
        return verdict_on(5, "INCOMPLETE", reason, figures, run_ids)
    if status := status_of_run(outcomes[1].status, "baseline"):
        return verdict_on(5, status, f"{reason}; but {why_not_completed(outcomes[1], 'baseline')}", figures, run_ids)
    control = deviations(noise, outcomes[1])
    figures["control"] = {name: _deviation(noise.bands[name], deviation) for name, deviation in control.items()}
    if all(deviation.is_inside for deviation in control.values()):
        reason += f"; but so is the baseline with {fault}: the noise hides such faults"
        return verdict_on(5, "INCONCLUSIVE", reason, figures, run_ids)
    return verdict_on(5, "PASS", f"{reason}; the baseline with {fault} is seen to leave them", figures, run_ids)


# --------------------------------------------------------------------------------------------------------------------


def _sentence(name: Quantity, band: Band, run: Deviation) -> str:
    what, unit, scale = ("loss", " nats", 1) if name == "loss" else ("gradient norm", "%", 100)
    outside = f", {run.num_steps_outside} steps outside" if run.num_steps_outside else ""
    peak = f"at most {run.peak:.1f} spreads off, at step {run.peak_step} (allowed {band.peak_limit:.1f}{outside})"
    return f"{what}: {peak}, drift {scale * run.drift:+.2g}{unit} (allowed {scale * band.drift_limit:.2g})"


def _deviation(band: Band, run: Deviation) -> dict[str, Any]:
    return {
        "peak_spreads": run.peak,
        "peak_step": run.peak_step,
        "peak_limit_spreads": band.peak_limit,
        "drift": run.drift,
        "drift_limit": band.drift_limit,
        "num_steps_outside": run.num_steps_outside,
        "is_inside": run.is_inside,
    }


def _described(band: Band) -> dict[str, Any]:
    limits = {"peak_limit_spreads": band.peak_limit, "drift_limit": band.drift_limit}
    return {"spread_rms": _rms(band.spread), **limits, "num_runs": band.num_runs}


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
