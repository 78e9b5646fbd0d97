"""What was not run, what failed, what was set aside, and every run there is."""

from __future__ import annotations

from collections.abc import Iterable

from harness.perf.suite import ABLATION, CONTEXT_BUDGETS_GIB, SINGLES, TRIALS
from harness.report.arms import BACKENDS, Arm
from harness.report.evidence import KINDS, Evidence
from harness.report.page.content import Row, Section, Table
from harness.report.page.numbers import NONE, duration
from harness.report.sections.context import contexts
from harness.report.sections.export import timed_exports
from harness.report.sections.verdicts import Judged
from harness.report.stated import ROOMS, read_stated

_CONTROL = "control_aa"  # its runs are no arm of their own
_EXPORT = "export at 7B"


def build(evidence: Evidence, judged: list[Judged], arms: dict[str, list[Arm]], rungs: list[Arm]) -> Section:
    """Nothing here is a number: it says where the report is silent, and why."""
    rows = [*_said(evidence).values(), *_unjudged(judged), *_unstated(evidence)]
    rows += [*_absent(evidence, arms, rungs), *_unread(evidence)]
    if evidence.is_partial:
        rows.insert(0, Row(("the rest of the gate", "it ended early: this is what was kept while it ran")))
    failed = tuple(
        Row((run.outcome.spec.label(), run.status.replace("_", " "), run.outcome.message or NONE), (run.id,))
        for run in evidence.runs.values()
        if not run.is_complete
    )
    aside = tuple(
        Row((state.name, str(one.index), one.reason), tuple(i for i in one.run_ids if i in evidence.runs))
        for state in evidence.trials
        for one in state.set_aside
    )
    parts = (
        Table("Not run", ("What", "Why"), tuple(rows), texts=2),
        Table("Runs that did not complete", ("Run", "How it ended", "Message"), failed, texts=3),
        Table("Set aside and measured again", ("Trial", "Pair", "Why"), aside, texts=3),
    )
    silent = () if any(part.rows for part in parts) else ("Everything this report knows of was run.",)
    return Section("gaps", "What was not run", paragraphs=silent, parts=tuple(part for part in parts if part.rows))


def build_appendix(evidence: Evidence) -> Section:
    columns = ("Run", "What", "Status", "Key", "Commit", "Code", "Machine", "Started (UTC)", "Took")
    rows = tuple(
        Row(
            (
                run.id,
                run.outcome.spec.label(),
                run.status.replace("_", " "),
                run.outcome.key[:12],
                run.commit or NONE,
                str(run.outcome.key_parts.get("code") or NONE)[:12],
                run.outcome.machine,
                run.outcome.started_at.replace("T", " ")[:19],
                duration(run.outcome.wall_seconds),
            ),
            anchor=f"run-{run.id}",
        )
        for run in evidence.runs.values()
    )
    probes = tuple(
        Row(
            (
                name,
                str(probe.get("key") or NONE)[:12],
                str((probe.get("key_parts") or {}).get("code") or NONE)[:12],
                str(probe.get("machine") or NONE),
                str(probe.get("started_at") or NONE).replace("T", " ")[:19],
                duration(probe.get("wall_seconds")),
            ),
            anchor=f"run-{name}",
        )
        for name, probe in evidence.probes.items()
    )
    named = ("Probe", "Key", "Code", "Machine", "Started (UTC)", "Took")
    parts = (
        Table("Runs", columns, rows, texts=len(columns), is_wide=True),
        Table("Probes", named, probes, texts=len(named), is_wide=True),
    )
    return Section(
        "runs",
        "All runs",
        paragraphs=(
            "Every process that the store holds, whether or not a number above comes from it. Runs of equal key are "
            "repetitions of one measurement: the same code, workload, plan, packages and GPU. A run's record is "
            "runs/RUN.json in the store, a probe's answer probes/PROBE.json.",
        ),
        parts=tuple(part for part in parts if part.rows),
    )


def _said(evidence: Evidence) -> dict[str, Row]:
    """What the gate itself says it did not run, each thing once: ``what`` and ``reason`` of its entries."""
    found: dict[str, Row] = {}
    for entry in evidence.of_kind("not_run"):
        what = str(entry.info.get("what") or entry.name)
        found.setdefault(what, Row((what, str(entry.info.get("reason") or "no reason given")), entry.run_ids))
    return found


def _unjudged(judged: list[Judged]) -> Iterable[Row]:
    for one in judged:
        if one.verdict.status == "INCOMPLETE":
            yield Row((f"claim {one.claim.name}", one.verdict.reason), one.run_ids)


def _unstated(evidence: Evidence) -> Iterable[Row]:
    """The verdicts beside the claims that are INCOMPLETE, with why, or missing."""
    for kind, room in ROOMS.items():
        for one in read_stated(evidence, kind):
            if one.status == "INCOMPLETE":
                rung = f"rung {one.number}, " if one.number else ""
                yield Row((f"{room}: {rung}{one.name.replace('_', ' ')}", one.reason), one.run_ids)


def _absent(evidence: Evidence, arms: dict[str, list[Arm]], rungs: list[Arm]) -> Iterable[Row]:
    """What the gate is to measure and this JSON holds no word of."""
    known = {f"{arm.name} on {workload}" for workload, found in arms.items() for arm in found}
    known |= {f"ladder: {rung.name}" for rung in rungs}
    known |= {_context(one.backend, one.budget_gib) for one, _ in contexts(evidence)}
    known |= {_EXPORT} if timed_exports(evidence) else set()
    known |= {"matrix-product ceiling"} if evidence.of_kind("ceiling") else set()
    silent = [what for what in _planned() if what not in known | _said(evidence).keys()]
    return (Row((what, "no entry in the benchmark JSON")) for what in silent)


def _planned() -> Iterable[str]:
    """In the gate's own words."""
    for name, planned in TRIALS.items():
        for arm in (planned.baseline, planned.candidate):
            if name != _CONTROL:
                yield f"{arm.name} on {planned.workload}"
    yield from (f"{arm.name} on {workload}" for workload, arm in SINGLES)
    yield from (f"ladder: {arm.name}" for _, arm in ABLATION)
    yield from (_context(backend, budget) for backend in BACKENDS for budget in CONTEXT_BUDGETS_GIB)
    yield "matrix-product ceiling"
    yield _EXPORT


def _context(backend: str, budget_gib: float) -> str:
    return f"context of {backend} in {budget_gib:g} GiB"


def _unread(evidence: Evidence) -> Iterable[Row]:
    for entry in evidence.entries:
        if entry.kind not in KINDS:
            yield Row((f"entry {entry.name}", f"of a kind this report does not know: {entry.kind}"))
