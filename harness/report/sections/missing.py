"""What was not run, what failed, what was set aside, and every run there is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from forge.training.backends import BACKENDS
from forge.training.report.page.content import Row, Section, Table
from forge.training.report.page.numbers import NONE
from harness.perf.suite import ABLATION, CONTEXT_BUDGETS_GIB, SINGLES, TRIALS
from harness.report.arms import ArmRuns
from harness.report.evidence import KINDS, Evidence
from harness.report.page.numbers import duration
from harness.report.sections.context import contexts
from harness.report.sections.export import timed_exports
from harness.report.verdicts import SUITES, Judged, label

_CONTROL = "control_aa"  # its runs are no arm of their own
_EXPORT = "export at 7B"
_MATMUL_PEAK = "matrix-product peak"


def build(
    evidence: Evidence, judged: dict[str, list[Judged]], arms: dict[str, list[ArmRuns]], ablation: list[ArmRuns]
) -> Section:
    """Nothing here is a number: it says where the report is silent, and why."""
    recorded = _recorded(evidence)
    rows = [*recorded.values(), *_not_judged(judged), *_unknown(evidence)]
    known = {*recorded, *_measured(evidence, arms, ablation)}
    rows += [Row((what, "no entry in the benchmark JSON")) for what in _planned() if what not in known]
    if evidence.is_partial:
        rows.insert(0, Row(("the rest of the gate", "it ended early: this is what was kept while it ran")))
    failed = tuple(
        Row((run.outcome.spec.label(), run.status.replace("_", " "), run.outcome.message or NONE), (run.id,))
        for run in evidence.runs.values()
        if not run.is_complete
    )
    aside = tuple(
        Row((trial.name, str(pair.index), pair.reason), tuple(i for i in pair.run_ids if i in evidence.runs))
        for trial in evidence.trials.values()
        for pair in trial.set_aside
    )
    if not (rows or failed or aside):
        rows.append(Row(("nothing", "everything that this report knows of was run")))
    parts = (
        Table("Not run", ("What", "Why"), tuple(rows), texts=2),
        Table("Runs that did not complete", ("Run", "How it ended", "Message"), failed, texts=3),
        Table("Set aside and measured again", ("Trial", "Pair", "Why"), aside, texts=3),
    )
    return Section("missing", "What was not run", parts=tuple(part for part in parts if part.rows))


def build_appendix(evidence: Evidence) -> Section:
    columns = ("Run", "What", "Status", "Commit", "Key", "Code", "Machine", "Started (UTC)", "Took")
    rows = tuple(
        Row(
            (
                run.id,
                run.outcome.spec.label(),
                run.status.replace("_", " "),
                run.commit or NONE,
                *_origin(vars(run.outcome)),
            ),
            anchor=f"run-{run.id}",
        )
        for run in evidence.runs.values()
    )
    probes = tuple(Row((name, *_origin(probe)), anchor=f"run-{name}") for name, probe in evidence.probes.items())
    named = ("Probe", "Key", "Code", "Machine", "Started (UTC)", "Took")
    parts = (
        Table("Runs", columns, rows, texts=len(columns), is_wide=True),
        Table("Probes", named, probes, texts=len(named), is_wide=True),
    )
    return Section(
        "runs",
        "All runs",
        intro=(
            "Every process that the store holds, whether or not a number above comes from it. Runs of equal key are "
            "repetitions of one measurement: the same code, workload, plan, packages and GPU. A run's record is "
            "runs/RUN.json in the store, a probe's answer probes/PROBE.json."
        ),
        parts=tuple(part for part in parts if part.rows),
    )


def _origin(measured: dict[str, Any]) -> tuple[str, ...]:
    """Of a run or a probe: key, code, machine, start, duration."""
    return (
        str(measured.get("key") or NONE)[:12],
        str((measured.get("key_parts") or {}).get("code") or NONE)[:12],
        str(measured.get("machine") or NONE),
        str(measured.get("started_at") or NONE).replace("T", " ")[:19],
        duration(measured.get("wall_seconds")),
    )


def _recorded(evidence: Evidence) -> dict[str, Row]:
    """What the gate itself says it did not run, each thing once: ``what`` and ``reason`` of its entries."""
    rows: dict[str, Row] = {}
    for entry in evidence.of_kind("not_run"):
        what = str(entry.info.get("what") or entry.name)
        rows.setdefault(what, Row((what, str(entry.info.get("reason") or "no reason given")), entry.run_ids))
    return rows


def _not_judged(judged: dict[str, list[Judged]]) -> Iterable[Row]:
    """The verdicts that are INCOMPLETE, with why, or missing."""
    for kind, verdicts in judged.items():
        for verdict, _ in verdicts:
            if verdict.status == "INCOMPLETE":
                yield Row((f"{SUITES[kind]}: {label(verdict)}", verdict.reason), tuple(verdict.run_ids))


def _measured(evidence: Evidence, arms: dict[str, list[ArmRuns]], ablation: list[ArmRuns]) -> Iterable[str]:
    yield from (f"{arm.name} on {workload}" for workload, of_workload in arms.items() for arm in of_workload)
    yield from (f"ablation: {arm.name}" for arm in ablation)
    yield from (_context(context.backend, context.budget_gib) for context, _ in contexts(evidence))
    yield from (_EXPORT for _ in timed_exports(evidence))
    yield from (_MATMUL_PEAK for _ in evidence.of_kind("matmul_peak"))


def _planned() -> Iterable[str]:
    """What the gate is to measure beside the verdicts, in its own words."""
    for name, planned in TRIALS.items():
        for arm in (planned.baseline, planned.candidate):
            if name != _CONTROL:
                yield f"{arm.name} on {planned.workload}"
    yield from (f"{arm.name} on {workload}" for workload, arm in SINGLES)
    yield from (f"ablation: {arm.name}" for _, arm in ABLATION)
    yield from (_context(backend, budget) for backend in BACKENDS for budget in CONTEXT_BUDGETS_GIB)
    yield _MATMUL_PEAK
    yield _EXPORT


def _context(backend: str, budget_gib: float) -> str:
    return f"context of {backend} in {budget_gib:g} GiB"


def _unknown(evidence: Evidence) -> Iterable[Row]:
    for entry in evidence.entries:
        if entry.kind not in KINDS:
            yield Row((f"entry {entry.name}", f"of a kind this report does not know: {entry.kind}"))
