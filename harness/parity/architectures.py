"""Rungs 1 to 3 for bases of other architectures: the ladder's base as a Llama and as a Qwen3."""

from __future__ import annotations

from pathlib import Path

from forge.training.system.errors import MachineError
from forge.training.system.files import sha256_json
from harness.parity.claims import Unmeasured, verdict_on_architecture
from harness.parity.first_step.checks import differing_inputs
from harness.parity.first_step.judge import described_checks, find_checks, first_steps, step_equivalence, summed_up
from harness.parity.first_step.measure import WantedSteps, measure_inputs, quantizations
from harness.parity.session import Ladder
from harness.parity.suite import ARCHITECTURE_LAYOUTS
from harness.trained_base import run_in_evaluator
from harness.verdict import Verdict


def judge_architecture(ladder: Ladder, model_type: str) -> Verdict:
    """Rungs 1 to 3 on the ladder's base as ``model_type``. Raises :class:`Unmeasured`, :class:`ForgeError`.

    A verdict beside the ladder's: no rung stands on it.
    """
    wanted = architecture_steps(ladder, model_type)
    lines = differing_inputs(measure_inputs(ladder, (ladder.baseline, ladder.candidate), wanted.base))
    (quantization,) = wanted.quantizations
    of_rungs = [find_checks(ladder, checks_of, wanted)[quantization] for checks_of in (first_steps, step_equivalence)]
    checks = {quantization: [check for group in of_rungs for check in group]}
    status, reason = summed_up(checks)
    if lines:
        status, reason = "FAIL", "; ".join([*lines, reason])
    return verdict_on_architecture(model_type, status, reason, {"differing": lines, "checks": described_checks(checks)})


def architecture_steps(ladder: Ladder, model_type: str) -> WantedSteps:
    """What is measured for it, in the first quantisation; its base is made now if need be."""
    return WantedSteps(_base_as(ladder, model_type), quantizations(ladder)[:1], ARCHITECTURE_LAYOUTS, with_inputs=True)


def _base_as(ladder: Ladder, model_type: str) -> Path:
    """The ladder's base in another architecture, written once beside the store."""
    of = sha256_json([str(ladder.base_dir), model_type])[:8]
    directory = ladder.folder / "bases" / f"{model_type}-{of}"
    if not directory.is_dir():
        if not ladder.session.measures:
            raise Unmeasured("INCOMPLETE", f"the base as a {model_type} is not made")
        make_base_as(ladder.base_dir, model_type, directory.absolute())
    return directory.absolute()


def make_base_as(base: Path, model_type: str, directory: Path) -> None:
    """Write ``base`` as a ``model_type`` of ``probes.architecture``. Raises :class:`MachineError`."""
    arguments = (str(base), "--as", model_type, "-o", str(directory))
    exit_code, last_line = run_in_evaluator("harness.parity.probes.architecture", *arguments)
    if exit_code or not directory.is_dir():
        remedy = "look at the base's files"
        raise MachineError(f"the base cannot be written as a {model_type}: {last_line}", remedy=remedy)
