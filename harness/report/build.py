"""From evidence to a report: which sections there are, in which order."""

from __future__ import annotations

from harness.report.arms import arms_by_workload
from harness.report.arms import ladder as rungs_of
from harness.report.evidence import Evidence
from harness.report.page.content import Report
from harness.report.sections import ablation as ladder
from harness.report.sections import context, losses, projection, reliability, training, verdicts
from harness.report.sections import environment as setting
from harness.report.sections import export as fidelity
from harness.report.sections import missing as gaps
from harness.report.sections import parity as accuracy
from harness.report.stated import statuses


def gather(evidence: Evidence) -> Report:
    """The whole report. Raises :class:`~forge.training.system.errors.DataError` where an entry is not what it says."""
    judged = verdicts.judged_claims(evidence)
    arms, rungs = arms_by_workload(evidence), rungs_of(evidence)
    used = evidence.runs_of(entry for entry in evidence.entries)
    sections = (
        verdicts.build(evidence, judged),
        accuracy.build(evidence),
        training.build(arms, evidence) if arms else None,
        training.build_trade_off(arms),
        training.build_phases(arms),
        context.build(evidence),
        losses.build(arms),
        projection.build(arms),
        ladder.build(rungs),
        ladder.build_ceiling(evidence),
        fidelity.build(evidence),
        reliability.build(evidence),
        setting.build(evidence, used),
        gaps.build(evidence, judged, arms, rungs),
        gaps.build_appendix(evidence),
    )
    others = statuses(evidence)
    return Report(
        status=verdicts.overall(judged, others, is_partial=evidence.is_partial),
        headline=verdicts.headline(judged, others),
        facts=tuple(_facts(evidence)),
        sections=tuple(section for section in sections if section is not None),
    )


def _facts(evidence: Evidence) -> list[str]:
    gpu = evidence.machine.get("gpu")
    name = gpu.get("name") if isinstance(gpu, dict) else None
    commit = str(evidence.commit.get("id") or "")[:10]
    changed = " with uncommitted changes" if evidence.commit.get("dirty") else ""
    facts = [str(name or "GPU not recorded"), evidence.made_at[:10], f"commit {commit}{changed}" if commit else ""]
    early = "the gate ended early" if evidence.is_partial else ""
    return [fact for fact in (*facts, f"{len(evidence.runs)} runs", early) if fact]
