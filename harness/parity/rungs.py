"""The ladder's verdicts: who judges each rung, on which rungs it stands, and what is measured together ahead of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from forge.training.system.errors import ForgeError
from harness.parity.architectures import architecture_steps, judge_architecture
from harness.parity.claims import Unmeasured, verdict_on, verdict_on_architecture, verdict_on_plan
from harness.parity.first_step.judge import judge_first_step, judge_inputs, judge_step_equivalence
from harness.parity.first_step.measure import has_steps, own_steps, prefetch_steps
from harness.parity.outcome import judge_outcome, pilot_specs
from harness.parity.plans import judge_plan
from harness.parity.session import Ladder
from harness.parity.suite import ARCHITECTURES, StepPlan
from harness.parity.trajectory.judge import judge_noise, judge_trajectory, noise_specs, trajectory_specs
from harness.verdict import Status, Verdict, status_of_error

JUDGES: dict[int, Callable[[Ladder], Verdict]] = {  # each raises Unmeasured or ForgeError where it cannot judge
    1: judge_inputs,
    2: judge_first_step,
    3: judge_step_equivalence,
    4: judge_noise,
    5: judge_trajectory,
    6: judge_outcome,
}


def prefetch(ladder: Ladder, number: int) -> None:
    """Measure side by side what a rung and those above it will ask for. Raises as the judges do.

    Ahead of rung 2: first steps on the ladder's own base and on its other architectures. Ahead of rung 4: the runs of
    rungs 4 and 5 and the pilot of rung 6. Rungs 5 and 6 need rung 4's verdict, not its runs.
    """
    if number == 2 and ladder.may_prefetch and not has_steps(ladder, own := own_steps(ladder)):
        prefetch_steps(ladder, [own, *(architecture_steps(ladder, model_type) for model_type in ARCHITECTURES)])
    if number == 4:
        ladder.prefetch([*noise_specs(ladder), *trajectory_specs(ladder)[0], *pilot_specs(ladder)])


def verdict(ladder: Ladder, number: int) -> Verdict:
    """The verdict on a rung, judged once per ladder; INCOMPLETE, and not measured, where a rung below is no PASS."""
    if number not in ladder.verdicts:
        missed = next((judged for rung in range(1, number) if (judged := verdict(ladder, rung)).status != "PASS"), None)
        if missed is None:
            ladder.verdicts[number] = _judged(partial(_judge, ladder, number), partial(verdict_on, number))
        else:
            why = f"rung {missed.figures['rung']} ({missed.name}) is {missed.status}"
            reason = f"{why}, and each rung stands on those below: {missed.reason}"
            ladder.verdicts[number] = verdict_on(number, "INCOMPLETE", reason)
    return ladder.verdicts[number]


def _judge(ladder: Ladder, number: int) -> Verdict:
    prefetch(ladder, number)
    return JUDGES[number](ladder)


def architecture_verdict(ladder: Ladder, model_type: str) -> Verdict:
    """The verdict on rungs 1 to 3 with the ladder's base as another architecture."""
    return _judged(partial(judge_architecture, ladder, model_type), partial(verdict_on_architecture, model_type))


def plan_verdict(ladder: Ladder, plan: StepPlan) -> Verdict:
    """The verdict on rungs 1 to 3 in another plan."""
    return _judged(partial(judge_plan, ladder, plan), partial(verdict_on_plan, plan.name))


def _judged(judge: Callable[[], Verdict], otherwise: Callable[[Status, str], Verdict]) -> Verdict:
    """What ``judge`` finds, or the verdict on what kept it from judging."""
    try:
        return judge()
    except Unmeasured as missing:
        return otherwise(missing.status, str(missing))
    except ForgeError as error:
        return otherwise(status_of_error(error), str(error))
