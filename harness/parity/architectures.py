"""Rungs 1 to 3 for bases of other architectures: the ladder's base as a Llama and as a Qwen3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.training.environment import ROOT
from forge.training.errors import ForgeError
from forge.training.files import sha256_json
from harness.arms import EVALUATOR, environment, interpreter
from harness.claims import Status
from harness.parity.first_step import CandidateFailed, NotMeasured, inputs_of_arms, quantizations, steps, summed_up
from harness.parity.ladder import BASE_SECONDS, Ladder
from harness.parity.step_checks import differing_inputs, direction_check, first_step_checks, layout_checks
from harness.process import run_process

ARCHITECTURES = ("llama", "qwen3")
LAYOUTS = (("8x1", "none"), ("1x8", "none"))


@dataclass(frozen=True)
class Found:
    """A verdict beside the ladder's: no rung stands on it."""

    status: Status
    reason: str
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for an entry's ``verdict``."""
        return {"status": self.status, "reason": self.reason, "figures": self.figures}


def judge_architecture(ladder: Ladder, model_type: str) -> Found:
    """Rungs 1 to 3 on the ladder's base as ``model_type``, in the first of its quantisations."""
    quantization = quantizations(ladder)[0]
    try:
        base = base_as(ladder, model_type)
        lines = differing_inputs(inputs_of_arms(ladder, base))
        reference, baseline, candidates = steps(ladder, quantization, base, LAYOUTS)
    except NotMeasured as why:
        return Found("INCOMPLETE", str(why), {})
    except CandidateFailed as why:
        return Found("FAIL", str(why), {})
    checks = [direction_check(reference, baseline)]
    for candidate in candidates:
        checks += first_step_checks(reference, baseline, candidate)
    checks += layout_checks(reference, baseline, candidates)
    figures = {"differing": lines, "checks": {quantization: [check.to_dict() for check in checks]}}
    status, reason = summed_up({quantization: checks})
    if lines:
        status, reason = "FAIL", "; ".join([*lines, reason])
    return Found(status, reason, figures)


def base_as(ladder: Ladder, model_type: str) -> Path:
    """The ladder's base in another architecture, written once beside the store."""
    of = sha256_json([str(ladder.base_dir), model_type])[:8]
    directory = ladder.store.directory.parent / "parity" / "bases" / f"{model_type}-{of}"
    if directory.is_dir():
        return directory.absolute()
    if not ladder.measures:
        raise NotMeasured(f"the base as a {model_type} is not made")
    command = [interpreter(EVALUATOR), "-m", "forge.training.probes.architecture", str(ladder.base_dir)]
    ended = run_process(
        [*command, "--as", model_type, "-o", str(directory.absolute())],
        environment=environment(EVALUATOR),
        directory=ROOT,
        time_limit_seconds=BASE_SECONDS,
    )
    if ended.exit_code or not directory.is_dir():
        said = ended.output.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise ForgeError(f"the base cannot be written as a {model_type}: {' '.join(said)}")
    return directory.absolute()
