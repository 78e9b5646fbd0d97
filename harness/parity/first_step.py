"""Rungs 1 to 3 of the parity ladder: same inputs; a first step as near to float32 as the baseline's; any layout alike.

Each is measured by ``forge.training.probes.first_step`` in processes of the arms' own (its docstring says how) and
judged here from what they left. The tensors lie beside the store, and only their figures in it: a file that is gone is
measured again.

    python -m harness.parity.first_step REFERENCE BASELINE CANDIDATE [LAYOUT ...]    judges files at hand
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.training.errors import ForgeError
from forge.training.files import sha256_file, sha256_json
from harness.parity.measured_step import MeasuredStep, read_step
from harness.parity.step_checks import Check, differing_inputs, direction_check, first_step_checks, layout_checks
from harness.parity.verdicts import Rung

if TYPE_CHECKING:
    from harness.parity.ladder import Ladder


@dataclass(frozen=True)
class Case:
    """A layout of the frozen step for one backend."""

    backend: str
    layout: str
    padding: str

    @property
    def arguments(self) -> tuple[str, ...]:
        """For the probe."""
        return ("--layout", self.layout, "--padding", self.padding)


# "none": not quantised, the workload's 16 bits as they are.
QUANTIZATIONS = ("nf4", "none")
NUM_POSITIONS = (
    16  # tokens of each document: errors of equal size over 128 miss the bar of 1.5 three times in a million
)
BASELINE_LAYOUT = ("1x8", "longest")  # its owner's
CANDIDATE_LAYOUTS = (("4x2", "none"), ("8x1", "none"), ("1x8", "none"), ("8x1", "longest"))  # its own plan's first
_ITS_OWN_FAULT = (1, 5, 7, 8)  # exit codes: crash, memory, diverged, a check


class NotMeasured(Exception):
    """The session has no time for a probe."""


class CandidateFailed(Exception):
    """The candidate cannot take the step: its failure is data."""


def judge_inputs(ladder: Ladder) -> Rung:
    """Rung 1, of the ladder's workload as it is, dropout and all."""
    try:
        arms = inputs_of_arms(ladder)
    except NotMeasured as why:
        return Rung(number=1, status="INCOMPLETE", reason=str(why))
    except CandidateFailed as why:
        return Rung(number=1, status="FAIL", reason=str(why))
    lines = differing_inputs(arms)
    figures = {"differing": lines, "arms": {arm["backend"]: _described(arm) for arm in arms}}
    if lines:
        return Rung(number=1, status="FAIL", reason="; ".join(lines), figures=figures)
    return Rung(number=1, status="PASS", reason="the arms differ in no input and no setting", figures=figures)


def inputs_of_arms(ladder: Ladder, base: Path | None = None) -> list[dict[str, Any]]:
    """What the probe says of each arm's inputs, the baseline's first. Raises :class:`NotMeasured`."""
    tag = f"--inputs-only={_inputs_digest(ladder, base)}"
    return [_answer(ladder, backend, (tag,), base) for backend in (ladder.baseline, ladder.candidate)]


def _described(arm: dict[str, Any]) -> dict[str, Any]:
    kept = (
        "workload_sha256",
        "base_sha256",
        "train_examples_sha256",
        "labels_sha256",
        "order_sha256",
        "weights_sha256",
    )
    return {name: arm.get(name) for name in (*kept, "adapter_sha256", "trainable_dtype", "settings")}


def judge_first_step(ladder: Ladder) -> Rung:
    """Rung 2, for each quantisation and each of the candidate's layouts."""

    def checks(quantization: str) -> list[Check]:
        reference, baseline, candidates = steps(ladder, quantization)
        of_each = [first_step_checks(reference, baseline, candidate) for candidate in candidates]
        return [direction_check(reference, baseline), *chain.from_iterable(of_each)]

    return _judged(ladder, 2, checks)


def judge_step_equivalence(ladder: Ladder) -> Rung:
    """Rung 3, for each quantisation: all of the candidate's layouts, among them padded and packed."""

    def checks(quantization: str) -> list[Check]:
        return layout_checks(*steps(ladder, quantization))

    return _judged(ladder, 3, checks)


def _judged(ladder: Ladder, number: int, checks_of: Any) -> Rung:
    found: dict[str, list[Check]] = {}
    try:
        for quantization in quantizations(ladder):
            found[quantization] = checks_of(quantization)
    except NotMeasured as why:
        return Rung(number=number, status="INCOMPLETE", reason=str(why))
    except CandidateFailed as why:
        return Rung(number=number, status="FAIL", reason=str(why))
    figures = {"checks": {name: [check.to_dict() for check in checks] for name, checks in found.items()}}
    status, reason = summed_up(found)
    return Rung(number=number, status=status, reason=reason, figures=figures)


def summed_up(found: dict[str, list[Check]]) -> tuple[Any, str]:
    """Status and reason of a rung's checks, by quantisation."""
    missed = [f"{name}: {check.sentence()}" for name, checks in found.items() for check in checks if not check.holds]
    count = sum(map(len, found.values()))
    if missed or not count:
        return "FAIL", "; ".join(missed) or "nothing was checked"
    return "PASS", f"all {count} checks hold"


def quantizations(ladder: Ladder) -> tuple[str, ...]:
    """Those of the ladder's overrides, else all: a ladder without a GPU names the one that it can."""
    named = [setting.partition("=")[2] for setting in ladder.overrides if setting.startswith("model.quantization=")]
    return tuple(named) or QUANTIZATIONS


def steps(
    ladder: Ladder,
    quantization: str,
    base: Path | None = None,
    layouts: tuple[tuple[str, str], ...] | None = None,
) -> tuple[MeasuredStep, MeasuredStep, list[MeasuredStep]]:
    """The reference's, the baseline's and the candidate's first steps. Raises :class:`NotMeasured`."""
    reference = measured(ladder, "reference", quantization, base=base)
    baseline = measured(ladder, ladder.baseline, quantization, Case(ladder.baseline, *BASELINE_LAYOUT), base)
    cases = [Case(ladder.candidate, *layout) for layout in layouts or CANDIDATE_LAYOUTS]
    return reference, baseline, [measured(ladder, ladder.candidate, quantization, case, base) for case in cases]


def measured(
    ladder: Ladder, backend: str, quantization: str, case: Case | None = None, base: Path | None = None
) -> MeasuredStep:
    """A first step, from the store and its file or measured now. Raises :class:`NotMeasured`."""
    positions = f"--positions={NUM_POSITIONS}"
    more = (*(case.arguments if case else ()), positions, "--set", f"model.quantization={quantization}")
    tag = sha256_json([_inputs_digest(ladder, base), list(more), list(ladder.overrides)])[:12]
    directory = ladder.store.directory.parent / "parity" / "steps"
    path = directory / f"{backend}-{tag}.safetensors"
    for _ in range(2):
        answer = _answer(ladder, backend, (*more, f"--out={path}"), base)
        if path.is_file() and sha256_file(path) == answer["file_sha256"]:
            return read_step(path)
        arm = _arm(backend)
        (ladder.store.directory / "probes" / f"first_step-{arm}-{answer['key'][:12]}.json").unlink(missing_ok=True)
    raise ForgeError(f"the first step of {backend} left no file {path.name}", remedy="look at the probe's output")


def _arm(backend: str) -> Any:
    return "trl" if backend == "reference" else backend  # whose interpreter it runs in


def _answer(ladder: Ladder, backend: str, more: tuple[str, ...], base: Path | None = None) -> dict[str, Any]:
    """What the probe says of ``backend``. Raises :class:`NotMeasured`, :class:`CandidateFailed`, ForgeError."""
    overrides = (
        f"model.path={base or ladder.base_dir}",
        f"data.train={ladder.documents[0]}",
        "data.validation=null",
        *ladder.overrides,
    )
    sets = tuple(part for setting in overrides for part in ("--set", setting))
    try:
        answer = ladder.probe("first_step", _arm(backend), ("parity", "--backend", backend, *sets, *more))
    except ForgeError as error:
        if backend == ladder.candidate != ladder.baseline and error.exit_code in _ITS_OWN_FAULT:
            raise CandidateFailed(str(error)) from error
        raise
    if answer is None:
        raise NotMeasured(f"no time for the first step of {backend}")
    return answer


def _inputs_digest(ladder: Ladder, base: Path | None) -> str:
    """Of documents and base: the store knows probes by their arguments, and those name files without their content."""
    return sha256_json([sha256_file(ladder.documents[0]), _base_digest(base or ladder.base_dir)])[:12]


@cache
def _base_digest(directory: Path) -> str:
    return sha256_json([[path.name, sha256_file(path)] for path in sorted(directory.glob("*.safetensors"))])


def main() -> int:
    """Judge files that the probe wrote: exit code 0 if all checks hold, else 8."""
    reference, *others = [read_step(Path(argument)) for argument in sys.argv[1:]]
    baseline, candidate, *layouts = others
    checks = first_step_checks(reference, baseline, candidate) + layout_checks(
        reference, baseline, [candidate, *layouts]
    )
    for check in checks:
        print(("holds  " if check.holds else "MISSED ") + check.sentence())
    return 0 if all(check.holds for check in checks) else 8


if __name__ == "__main__":
    sys.exit(main())
