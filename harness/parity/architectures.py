"""Rungs 1 to 3 for bases of other architectures: the ladder's base as a Llama and as a Qwen3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.training.system.errors import ForgeError
from forge.training.system.files import sha256_json
from harness.parity.bases import make_base_as
from harness.parity.first_step.checks import differing_inputs
from harness.parity.first_step.judge import find_checks, first_steps, step_equivalence, summed_up
from harness.parity.first_step.measure import (
    CandidateFailed,
    NotMeasured,
    measure_inputs,
    prefetch_steps,
    quantizations,
)
from harness.parity.session import Ladder
from harness.perf.claims import Status

ARCHITECTURES = ("llama", "qwen3")
LAYOUTS = ("8x1:none", "1x8:none")


@dataclass(frozen=True)
class Found:
    """A verdict beside the ladder's: no rung stands on it."""

    status: Status
    reason: str
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for an entry's ``verdict``."""
        statement = "Rungs 1 to 3 hold on a base of this architecture too."
        return {"status": self.status, "statement": statement, "reason": self.reason, "figures": self.figures}


def judge_architecture(ladder: Ladder, model_type: str) -> Found:
    """Rungs 1 to 3 on the ladder's base as ``model_type``, in the first of its quantisations."""
    quantization = quantizations(ladder)[0]
    try:
        base = base_as(ladder, model_type)
        lines = differing_inputs(measure_inputs(ladder, (ladder.baseline, ladder.candidate), base))
        checks = [
            check
            for checks_of in (first_steps, step_equivalence)
            for check in find_checks(ladder, checks_of, base, (quantization,), LAYOUTS)[quantization]
        ]
    except NotMeasured as why:
        return Found("INCOMPLETE", str(why), {})
    except CandidateFailed as why:
        return Found("FAIL", str(why), {})
    except ForgeError as error:
        return Found("FAIL" if error.exit_code == 8 else "INCOMPLETE", str(error), {})
    figures = {"differing": lines, "checks": {quantization: [check.to_dict() for check in checks]}}
    status, reason = summed_up({quantization: checks})
    if lines:
        status, reason = "FAIL", "; ".join([*lines, reason])
    return Found(status, reason, figures)


def prefetch(ladder: Ladder) -> None:
    """Measure the steps of the ladder's own base and of these at once, where processes may run side by side."""
    if ladder.num_side_by_side == 1 or not ladder.measures:
        return
    wanted = quantizations(ladder)
    others = [(base_as(ladder, model_type), wanted[:1], LAYOUTS, True) for model_type in ARCHITECTURES]
    prefetch_steps(ladder, [(None, wanted, ladder.step_layouts, False), *others])


def base_as(ladder: Ladder, model_type: str) -> Path:
    """The ladder's base in another architecture, written once beside the store."""
    of = sha256_json([str(ladder.base_dir), model_type])[:8]
    directory = ladder.store.directory.parent / "parity" / "bases" / f"{model_type}-{of}"
    if not directory.is_dir():
        if not ladder.measures:
            raise NotMeasured(f"the base as a {model_type} is not made")
        make_base_as(ladder.base_dir, model_type, directory.absolute())
    return directory.absolute()
