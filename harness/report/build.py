"""From evidence to a report: which sections there are, in which order."""

from __future__ import annotations

from harness.report.arms import ablation as ablation_of
from harness.report.arms import arms_by_workload
from harness.report.evidence import Evidence
from harness.report.page.gate_report import Report
from harness.report.sections import (
    ablation,
    context,
    environment,
    export,
    losses,
    missing,
    parity,
    projection,
    reliability,
    training,
    verdicts,
)
from harness.report.verdicts import headline, judge_all, overall


def gather(evidence: Evidence) -> Report:
    """The whole report. Raises :class:`~forge.training.system.errors.DataError` where an entry is not what it says."""
    judged = judge_all(evidence)
    arms, changes = arms_by_workload(evidence), ablation_of(evidence)
    sections = (
        verdicts.build(evidence, judged["claim"]),
        parity.build(judged["parity"]),
        training.build(arms, evidence),
        training.build_trade_off(arms),
        training.build_phases(arms),
        context.build(evidence),
        losses.build(arms),
        projection.build(arms),
        ablation.build(changes),
        ablation.build_matmul_peak(evidence),
        export.build(evidence, judged["export"]),
        reliability.build(judged["reliability"]),
        environment.build(evidence, evidence.runs_of(evidence.entries)),
        missing.build(evidence, judged, arms, changes),
        missing.build_appendix(evidence),
    )
    return Report(
        status=overall(judged, is_partial=evidence.is_partial),
        headline=headline(judged),
        facts=tuple(_facts(evidence)),
        sections=tuple(section for section in sections if section.parts or section.sections),
    )


def _facts(evidence: Evidence) -> list[str]:
    gpu = evidence.machine.get("gpu")
    name = gpu.get("name") if isinstance(gpu, dict) else None
    commit = str(evidence.commit.get("id") or "")[:10]
    changed = " with uncommitted changes" if evidence.commit.get("dirty") else ""
    facts = [str(name or "GPU not recorded"), evidence.made_at[:10], f"commit {commit}{changed}" if commit else ""]
    early = "the gate ended early" if evidence.is_partial else ""
    return [fact for fact in (*facts, f"{len(evidence.runs)} runs", early) if fact]
