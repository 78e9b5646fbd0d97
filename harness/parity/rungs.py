"""The ladder's verdicts: who judges each rung, on which rungs it stands, and what is measured together ahead of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from forge.training.system.errors import ForgeError
from harness.parity.architectures import architecture_steps, judge_architecture
from harness.parity.claims import Unmeasured, verdict_on, verdict_on_architecture
from harness.parity.first_step.judge import judge_first_step, judge_inputs, judge_step_equivalence
from harness.parity.first_step.measure import has_steps, own_steps, prefetch_steps
from harness.parity.outcome.judge import judge_outcome, pilot_specs
from harness.parity.session import Ladder
from harness.parity.suite import ARCHITECTURES
from harness.parity.trajectory.judge import judge_noise, judge_trajectory, noise_specs, trajectory_specs
from harness.verdict import Status, Verdict, status_of_error


@dataclass(frozen=True)
class Rung:
    """``judge`` raises :class:`Unmeasured` or a :class:`ForgeError` where it cannot judge, and so does ``prefetch``."""

    judge: Callable[[Ladder], Verdict]
    prefetch: Callable[[Ladder], None] = lambda ladder: None


def _prefetch_steps(ladder: Ladder) -> None:
    """First steps on the ladder's own base and on its other architectures."""
    if ladder.may_prefetch and not has_steps(ladder, own := own_steps(ladder)):
        others = [architecture_steps(ladder, model_type) for model_type in ARCHITECTURES]
        prefetch_steps(ladder, [own, *others])


def _prefetch_runs(ladder: Ladder) -> None:
    """The runs of rungs 4 and 5 and the pilot of rung 6. Rungs 5 and 6 need rung 4's verdict, not its runs."""
    ladder.prefetch([*noise_specs(ladder), *trajectory_specs(ladder)[0], *pilot_specs(ladder)])


RUNGS = {
    1: Rung(judge_inputs),
    2: Rung(judge_first_step, _prefetch_steps),
    3: Rung(judge_step_equivalence),
    4: Rung(judge_noise, _prefetch_runs),
    5: Rung(judge_trajectory),
    6: Rung(judge_outcome),
}


def verdict(ladder: Ladder, number: int) -> Verdict:
    """The verdict on a rung, judged once per ladder; INCOMPLETE, and not measured, where a rung below is no PASS."""
    if number not in ladder.verdicts:
        below = next((rung for rung in range(1, number) if verdict(ladder, rung).status != "PASS"), None)
        ladder.verdicts[number] = _blocked(ladder, below, number) if below else _judge(ladder, number)
    return ladder.verdicts[number]


def _blocked(ladder: Ladder, below: int, number: int) -> Verdict:
    missed = ladder.verdicts[below]
    why = f"rung {below} ({missed.name}) is {missed.status}, and each rung stands on those below"
    return verdict_on(number, "INCOMPLETE", f"{why}: {missed.reason}")


def _judge(ladder: Ladder, number: int) -> Verdict:
    def judge() -> Verdict:
        RUNGS[number].prefetch(ladder)
        return RUNGS[number].judge(ladder)

    return _judged(judge, lambda status, reason: verdict_on(number, status, reason))


def architecture_verdict(ladder: Ladder, model_type: str) -> Verdict:
    """The verdict on rungs 1 to 3 with the ladder's base as another architecture."""
    return _judged(
        lambda: judge_architecture(ladder, model_type),
        lambda status, reason: verdict_on_architecture(model_type, status, reason),
    )


def _judged(judge: Callable[[], Verdict], otherwise: Callable[[Status, str], Verdict]) -> Verdict:
    """What ``judge`` finds, or the verdict on what kept it from judging."""
    try:
        return judge()
    except Unmeasured as missing:
        return otherwise(missing.status, str(missing))
    except ForgeError as error:
        return otherwise(status_of_error(error), str(error))
