"""The parity ladder: the verdicts on its six rungs, recorded and asserted. What they are: claims.py and rungs.py.

Each rung stands on those below: one that is not reached is INCOMPLETE and red.
"""

from __future__ import annotations

from typing import Any

import pytest

from harness.parity.rungs import architecture_verdict, plan_verdict, verdict
from harness.parity.session import Ladder
from harness.parity.suite import ARCHITECTURES, PLANS, WORKLOAD, StepPlan
from harness.recorder import CLOCK
from harness.session import Session
from harness.verdict import Hold

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(0),  # the first test of a rung waits for its runs
    pytest.mark.benchmark(group="parity", timer=CLOCK),
]


@pytest.fixture(scope="session")
def ladder(gate: Session) -> Ladder:
    """The parity ladder. Where ``--gate-only`` leaves it out, it measures nothing and judges what the store has."""
    return Ladder(gate.limited_to("parity"))


def described(ladder: Ladder) -> dict[str, Any]:
    """What an entry says of the ladder that it is of."""
    arms = {"arm": ladder.candidate, "backend": ladder.candidate, "baseline": ladder.baseline}
    return {"record_kind": "parity", "workload": WORKLOAD, **arms}


def test_both_arms_train_the_same_numbers_with_the_same_settings(ladder: Ladder, hold: Hold) -> None:
    hold(verdict(ladder, 1), metric="rung 1", **described(ladder))


def test_the_candidates_first_step_is_as_near_to_float32_as_the_baselines(ladder: Ladder, hold: Hold) -> None:
    hold(verdict(ladder, 2), metric="rung 2", **described(ladder))


def test_any_division_of_a_step_into_micro_batches_gives_the_same_gradient(ladder: Ladder, hold: Hold) -> None:
    hold(verdict(ladder, 3), metric="rung 3", **described(ladder))


def test_the_noise_of_the_baselines_own_rounding_is_known(ladder: Ladder, hold: Hold) -> None:
    hold(verdict(ladder, 4), metric="rung 4", **described(ladder))


def test_the_candidates_steps_stay_within_the_baselines_own_rounding(ladder: Ladder, hold: Hold) -> None:
    hold(verdict(ladder, 5), metric="rung 5", **described(ladder))


def test_the_candidates_adapters_are_as_good_as_the_baselines(ladder: Ladder, hold: Hold) -> None:
    hold(verdict(ladder, 6), metric="rung 6", **described(ladder))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_other_architectures_pass_the_first_three_rungs(ladder: Ladder, hold: Hold, model_type: str) -> None:
    hold(architecture_verdict(ladder, model_type), **described(ladder))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_other_plans_pass_the_first_three_rungs(ladder: Ladder, hold: Hold, plan: StepPlan) -> None:
    hold(plan_verdict(ladder, plan), **{**described(ladder), "arm": plan.name, "backend": plan.backend})
