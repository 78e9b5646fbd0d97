"""Rungs 1 to 3 of the parity ladder: same inputs; a first step as near to float32 as the baseline's; any layout alike.

Each is measured by ``harness.parity.probes.first_step`` in processes of the arms' own (its docstring says how) and
judged here from what they left. The tensors lie beside the store, and in it their digests and what was found in them:
files that are gone are measured again only where they have not been judged.

    python -m harness.parity.first_step.judge REFERENCE BASELINE CANDIDATE [LAYOUT ...]    judges files at hand
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.training.config.workload import load_workload
from forge.training.system.errors import ForgeError
from forge.training.system.files import read_json_object, sha256_json, write_json
from harness.measurement.key import code_sha256_of
from harness.parity.claims import Rung
from harness.parity.first_step.checks import Check, differing_inputs, direction_check, first_step_checks, layout_checks
from harness.parity.first_step.compare import read_step
from harness.parity.first_step.measure import (
    BASELINE_LAYOUT,
    CandidateFailed,
    Measured,
    NotMeasured,
    has_steps,
    measure_inputs,
    measure_steps,
    quantizations,
)
from harness.parity.suite import WORKLOAD

if TYPE_CHECKING:
    from harness.parity.session import Ladder

OTHER_ARM = "trl"  # no claim is about it, but what is reported beside the claims must be the same work
_MOST_ATTEMPTS = 20  # one is lost wherever a machine is taken away before its steps are judged
_JUDGES = ("compare.py", "checks.py")  # whose code the checks of given files follow from

Checks = dict[str, list[Check]]  # by quantisation
ChecksOf = Callable[["Ladder", Measured, str, tuple[str, ...]], list[Check]]


def judge_inputs(ladder: Ladder) -> Rung:
    """Rung 1, of the ladder's workload as it is, dropout and all."""
    backends = dict.fromkeys((ladder.baseline, ladder.candidate, OTHER_ARM))
    try:
        arms = measure_inputs(ladder, [ladder.baseline, ladder.candidate, *list(backends)[2:]])
    except NotMeasured as why:
        return Rung(number=1, status="INCOMPLETE", reason=str(why))
    except CandidateFailed as why:
        return Rung(number=1, status="FAIL", reason=str(why))
    now = load_workload(WORKLOAD, ladder.overrides).digest()
    if any(arm.get("workload_sha256") != now for arm in arms):
        # the store knows a probe by the workload's name
        changed = "the workload is another one than these inputs, and the steps of rungs 2 and 3, were measured with"
        return Rung(number=1, status="INCOMPLETE", reason=f"{changed}: put away the store's first_step probes")
    lines = differing_inputs(arms)
    figures = {"differing": lines, "arms": {arm["backend"]: _described(arm) for arm in arms}}
    if lines:
        return Rung(number=1, status="FAIL", reason="; ".join(lines), figures=figures)
    return Rung(number=1, status="PASS", reason="the arms differ in no input and no setting", figures=figures)


def _described(arm: dict[str, Any]) -> dict[str, Any]:
    kept = (
        *("workload_sha256", "base_sha256", "train_examples_sha256", "labels_sha256", "order_sha256"),
        *("weights_sha256", "adapter_sha256", "trainable_dtype", "settings"),
    )
    return {name: arm.get(name) for name in kept}


def judge_first_step(ladder: Ladder) -> Rung:
    """Rung 2, for each quantisation and each of the candidate's layouts."""
    from harness.parity.architectures import prefetch  # it knows this module

    if not has_steps(ladder):
        prefetch(ladder)
    return _judged(ladder, 2, first_steps)


def judge_step_equivalence(ladder: Ladder) -> Rung:
    """Rung 3, for each quantisation: all of the candidate's layouts, among them padded and packed."""
    return _judged(ladder, 3, step_equivalence)


def first_steps(ladder: Ladder, measured: Measured, quantization: str, layouts: tuple[str, ...]) -> list[Check]:
    """What rung 2 asks."""
    reference, baseline, candidates = _steps(ladder, measured, quantization, layouts)
    of_each = [first_step_checks(reference, baseline, candidate) for candidate in candidates]
    return [direction_check(reference, baseline), *chain.from_iterable(of_each)]


def step_equivalence(ladder: Ladder, measured: Measured, quantization: str, layouts: tuple[str, ...]) -> list[Check]:
    """What rung 3 asks."""
    return layout_checks(*_steps(ladder, measured, quantization, layouts))


def _steps(ladder: Ladder, measured: Measured, quantization: str, layouts: tuple[str, ...]) -> tuple[Any, Any, Any]:
    return (
        measured.step("reference", quantization),
        measured.step(ladder.baseline, f"{quantization}:{BASELINE_LAYOUT}"),
        [measured.step(ladder.candidate, f"{quantization}:{layout}") for layout in layouts],
    )


def _judged(ladder: Ladder, number: int, checks_of: ChecksOf) -> Rung:
    try:
        found = find_checks(ladder, checks_of)
    except NotMeasured as why:
        return Rung(number=number, status="INCOMPLETE", reason=str(why))
    except CandidateFailed as why:
        return Rung(number=number, status="FAIL", reason=str(why))
    figures = {"checks": {name: [check.to_dict() for check in checks] for name, checks in found.items()}}
    status, reason = summed_up(found)
    return Rung(number=number, status=status, reason=reason, figures=figures)


def find_checks(
    ladder: Ladder,
    checks_of: ChecksOf,
    base: Path | None = None,
    asked: tuple[str, ...] | None = None,
    layouts: tuple[str, ...] | None = None,
) -> Checks:
    """The checks by quantisation; those of files that were judged before, by this code, from the store.

    Raises :class:`NotMeasured`, :class:`CandidateFailed`, :class:`ForgeError`.
    """
    asked, layouts = asked or quantizations(ladder), layouts or ladder.step_layouts
    code = [code_sha256_of(Path(__file__).with_name(name)) for name in _JUDGES]

    def stored_as(measured: Measured) -> Path:
        key = sha256_json([checks_of.__name__, measured.digests, code])
        return ladder.store.directory / "parity" / f"checks-{key[:16]}.json"

    for attempt in range(_MOST_ATTEMPTS):
        measured = measure_steps(ladder, base, asked, layouts, attempt)
        path = stored_as(measured)
        if path.is_file():
            stored = read_json_object(path)["checks"]
            return {name: [Check.from_dict(check) for check in checks] for name, checks in stored.items()}
        if measured.is_there:
            found = {quantization: checks_of(ladder, measured, quantization, layouts) for quantization in asked}
            content = {name: [check.to_dict() for check in checks] for name, checks in found.items()}
            write_json(path, {"schema_version": 1, "of": checks_of.__name__, "checks": content})
            return found
    raise ForgeError("the first-step probe's files are gone as soon as it ends", remedy=f"look at {measured.folder}")


def summed_up(found: Checks) -> tuple[Any, str]:
    """Status and reason of a rung's checks, by quantisation."""
    missed = [f"{name}: {check.sentence()}" for name, checks in found.items() for check in checks if not check.holds]
    count = sum(map(len, found.values()))
    if missed or not count:
        return "FAIL", "; ".join(missed) or "nothing was checked"
    return "PASS", f"all {count} checks hold"


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
