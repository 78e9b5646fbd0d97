"""Rungs 1 to 3: same inputs; a first step as near to float32 as the baseline's; the same gradient in any layout.

Each is measured by ``harness.parity.probes.first_step`` in processes of the arms' own (its docstring says how) and
judged here from what they left. The tensors are beside the store. In it are their digests and what was found in them:
files that are gone are measured again only where they have not been judged.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from forge.training.config.workload import load_workload
from forge.training.system.errors import MachineError
from forge.training.system.files import read_json_object, sha256_json, write_json
from harness.measurement.key import code_sha256_of
from harness.parity.claims import STEP_BARS, verdict_on
from harness.parity.first_step.checks import Check, differing_inputs, direction_check, first_step_checks, layout_checks
from harness.parity.first_step.compare import MeasuredStep
from harness.parity.first_step.measure import (
    MeasuredSteps,
    WantedSteps,
    dropout_steps,
    measure_inputs,
    measure_steps,
    own_steps,
)
from harness.parity.session import Ladder
from harness.parity.suite import BASELINE_STEP_LAYOUT, OTHER_ARM, WORKLOAD
from harness.verdict import Status, Verdict

_MOST_ATTEMPTS = 20  # one is lost wherever a machine is taken away before its steps are judged
_JUDGES = ("compare.py", "checks.py")  # the checks of given files follow from this code and the bars
_SHOWN = (  # of an arm's inputs
    *("workload_sha256", "base_sha256", "train_examples_sha256", "labels_sha256", "order_sha256"),
    *("weights_sha256", "adapter_sha256", "trainable_dtype", "settings"),
)

Checks = dict[str, list[Check]]  # by quantisation
ChecksOf = Callable[[Ladder, MeasuredSteps, str], list[Check]]  # of one quantisation


def judge_inputs(ladder: Ladder) -> Verdict:
    """Rung 1, of the ladder's workload as it is, dropout and all. Raises :class:`Unmeasured`."""
    backends = dict.fromkeys((ladder.baseline, ladder.candidate, OTHER_ARM))
    arms = measure_inputs(ladder, [*backends], ladder.base_dir)
    now = load_workload(WORKLOAD, ladder.overrides).digest()
    if any(arm.get("workload_sha256") != now for arm in arms):
        # the store knows a probe by the workload's name
        changed = "the workload is another one than these inputs, and the steps of rungs 2 and 3, were measured with"
        return verdict_on(1, "INCOMPLETE", f"{changed}: put away the store's first_step probes")
    lines = differing_inputs(arms)
    figures = {"differing": lines, "arms": {arm["backend"]: {name: arm.get(name) for name in _SHOWN} for arm in arms}}
    if lines:
        return verdict_on(1, "FAIL", "; ".join(lines), figures)
    return verdict_on(1, "PASS", "the arms differ in no input and no setting", figures)


def judge_first_step(ladder: Ladder) -> Verdict:
    """Rung 2, for each quantisation and each of the candidate's layouts. Raises as :func:`find_checks`."""
    return _judged(2, find_checks(ladder, first_steps, own_steps(ladder)))


def judge_step_equivalence(ladder: Ladder) -> Verdict:
    """Rung 3, for each quantisation: all of the candidate's layouts, padded and packed. Raises as above."""
    return _judged(3, find_equivalence(ladder))


def find_equivalence(ladder: Ladder) -> Checks:
    """The checks of rung 3; where Forge's layers train, also those of the steps with dropout. Raises as above."""
    checks = find_checks(ladder, step_equivalence, own_steps(ladder))
    if not ladder.has_forge_layers:
        return checks
    more = find_checks(ladder, equivalence_with_dropout, dropout_steps(ladder))
    return {quantization: [*own, *more[quantization]] for quantization, own in checks.items()}


def _judged(rung: int, checks: Checks) -> Verdict:
    status, reason = summed_up(checks)
    return verdict_on(rung, status, reason, {"checks": described_checks(checks)})


def first_steps(ladder: Ladder, measured: MeasuredSteps, quantization: str) -> list[Check]:
    """The checks of rung 2."""
    reference, baseline, candidates = _steps(measured, quantization)
    of_each = [first_step_checks(reference, baseline, candidate) for candidate in candidates]
    return [direction_check(reference, baseline), *chain.from_iterable(of_each)]


def step_equivalence(ladder: Ladder, measured: MeasuredSteps, quantization: str) -> list[Check]:
    """The checks of rung 3."""
    return layout_checks(*_steps(measured, quantization))


def equivalence_with_dropout(ladder: Ladder, measured: MeasuredSteps, quantization: str) -> list[Check]:
    """The checks of rung 3 with dropout: every layout is float32 with the explicit masks, and so every other layout.

    Those of rung 2 among them: a mask that is wrong for one document is seen in its own gradient, not in the sum alone.
    """
    return [*first_steps(ladder, measured, quantization), *step_equivalence(ladder, measured, quantization)]


def _steps(measured: MeasuredSteps, quantization: str) -> tuple[MeasuredStep, MeasuredStep, list[MeasuredStep]]:
    """The reference's, the baseline's, and the candidate's in each layout."""
    return (
        measured.step("reference", quantization),
        measured.step("baseline", f"{quantization}:{BASELINE_STEP_LAYOUT}"),
        [measured.step("candidate", f"{quantization}:{layout}") for layout in measured.wanted.layouts],
    )


def find_checks(ladder: Ladder, checks_of: ChecksOf, wanted: WantedSteps) -> Checks:
    """The checks by quantisation; those of files that were judged before, by this code and these bars, from the store.

    Raises :class:`Unmeasured`, :class:`ForgeError`.
    """
    code = [code_sha256_of(Path(__file__).with_name(name)) for name in _JUDGES]
    for attempt in range(_MOST_ATTEMPTS):
        measured = measure_steps(ladder, wanted, attempt)
        key = sha256_json([checks_of.__name__, measured.digests, code, STEP_BARS])
        path = ladder.session.store.judged_path("parity", f"checks-{key[:16]}")
        if path.is_file():
            stored = read_json_object(path)["checks"]
            return {name: [Check.from_dict(check) for check in checks] for name, checks in stored.items()}
        if measured.has_files:
            checks = {name: checks_of(ladder, measured, name) for name in wanted.quantizations}
            write_json(path, {"schema_version": 1, "of": checks_of.__name__, "checks": described_checks(checks)})
            return checks
    raise MachineError("the first-step probe's files are gone as soon as it ends", remedy=f"look at {measured.folder}")


def described_checks(checks: Checks) -> dict[str, list[dict[str, Any]]]:
    """As plain JSON."""
    return {quantization: [check.to_dict() for check in group] for quantization, group in checks.items()}


def summed_up(checks: Checks) -> tuple[Status, str]:
    """Status and reason of all checks."""
    missed = [f"{name}: {check.sentence()}" for name, group in checks.items() for check in group if not check.holds]
    count = sum(map(len, checks.values()))
    if missed or not count:
        return "FAIL", "; ".join(missed) or "nothing was checked"
    return "PASS", f"all {count} checks hold"
