"""Rungs 1 to 3 in other plans than the candidate's own: those that are shipped, and Forge's layers in each stack."""

from __future__ import annotations

import json
from dataclasses import replace

from forge.training.backends import load_plan
from forge.training.config.workload import load_workload
from harness.parity.claims import verdict_on_plan
from harness.parity.first_step.checks import differing_inputs
from harness.parity.first_step.judge import described_checks, find_checks, find_equivalence, first_steps, summed_up
from harness.parity.first_step.measure import measure_inputs, own_steps
from harness.parity.session import Ladder
from harness.parity.suite import WORKLOAD, StepPlan
from harness.verdict import Verdict


def judge_plan(ladder: Ladder, plan: StepPlan) -> Verdict:
    """Rungs 1 to 3 in this plan, on the ladder's own base. Raises :class:`Unmeasured`, :class:`ForgeError`.

    A verdict beside the ladder's: no rung stands on it.
    """
    own = replace(ladder, candidate=plan.backend, plan=plan_overrides(plan), step_layouts=plan.layouts, verdicts={})
    lines = differing_inputs(measure_inputs(own, tuple(dict.fromkeys((own.baseline, own.candidate))), own.base_dir))
    of_rungs = [find_checks(own, first_steps, own_steps(own)), find_equivalence(own)]
    checks = {name: [check for group in of_rungs for check in group[name]] for name in of_rungs[0]}
    status, reason = summed_up(checks)
    if lines:
        status, reason = "FAIL", "; ".join([*lines, reason])
    return verdict_on_plan(plan.name, status, reason, {"differing": lines, "checks": described_checks(checks)})


def plan_overrides(plan: StepPlan) -> tuple[str, ...]:
    """What differs from the plan of the ladder's workload, as ``key=value``."""
    shipped, own = (load_plan(load_workload(of), plan.backend).model_dump() for of in (plan.of, WORKLOAD))
    differing = [f"{key}={_text(value)}" for key, value in shipped.items() if value != own[key]]
    return (*differing, *plan.changes)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
