"""All verdicts of a gate: which ones there must be, what the JSON states, and the claims judged again.

A verdict that a whole gate leaves must be there once, or it is INCOMPLETE. Statuses of claims on speed and memory are
never read: they are computed again from the store's pairs, and a JSON that says otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from forge.training.report.page.content import Row, Table
from forge.training.report.page.numbers import NONE
from forge.training.system.errors import DataError
from harness.export import claims as export
from harness.parity import claims as parity
from harness.parity.suite import ARCHITECTURES, PLANS
from harness.perf.claims import CLAIMS, Claim, judge
from harness.reliability import claims as reliability
from harness.reliability.suite import BACKENDS
from harness.report.evidence import NOT_ONE_GATE, REMEDY, Entry, Evidence, is_same
from harness.verdict import STATUSES, Status, Verdict, worst

# A verdict and the entry that states it; None where no entry does. ``run_ids`` are the runs and the probe it rests on.
Judged = tuple[Verdict, Entry | None]

SUITES = {"claim": "claim", "parity": "accuracy", "export": "export", "reliability": "reliability"}  # by record_kind


def _missing(name: str, statement: str, **figures: object) -> Verdict:
    reason = "no verdict in the benchmark JSON"
    return Verdict(name=name, statement=statement, status="INCOMPLETE", reason=reason, figures=figures)


def _without_pairs(claim: Claim) -> Verdict:
    empty = judge(claim, [], [], num_pairs_planned=1, baseline_statuses=[], candidate_statuses=[])
    return _missing(claim.name, claim.statement, **empty.figures)


EXPECTED: dict[str, tuple[Verdict, ...]] = {  # what a whole gate leaves, by record_kind, in the order shown
    "claim": tuple(_without_pairs(claim) for claim in CLAIMS),
    "parity": (
        *(_missing(name, parity.STATEMENTS[number], rung=number) for number, name in parity.NAMES.items()),
        *(_missing(f"rungs 1 to 3 as {name}", parity.ARCHITECTURE_STATEMENT) for name in ARCHITECTURES),
        *(_missing(f"rungs 1 to 3, {plan.name}", parity.PLAN_STATEMENT) for plan in PLANS),
    ),
    "export": tuple(_missing(claim.name, claim.statement) for claim in export.CLAIMS),
    "reliability": tuple(
        _missing(f"{claim.name}_{backend}", f"{backend}: {claim.statement}")
        for claim in reliability.CLAIMS
        for backend in BACKENDS
    ),
}


def judge_all(evidence: Evidence) -> dict[str, list[Judged]]:
    """The verdicts by record_kind, in the order of :data:`EXPECTED`; those of other names last.

    Raises :class:`DataError` for a verdict that cannot be read, and for a claim whose runs say otherwise.
    """
    return {kind: _judge_kind(evidence, kind) for kind in SUITES}


def _judge_kind(evidence: Evidence, kind: str) -> list[Judged]:
    missing = {verdict.name: verdict for verdict in EXPECTED[kind]}
    stated: dict[str, list[tuple[Verdict, Entry]]] = {name: [] for name in missing}
    for entry in evidence.of_kind(kind):
        if verdict := entry.verdict():
            verdict = verdict.model_copy(update={"run_ids": list(evidence.sources_of(entry))})
            verdict = _judge_again(verdict, evidence) if kind == "claim" else verdict
            stated.setdefault(verdict.name, []).append((verdict, entry))
    return [_only(verdicts, missing.get(name)) for name, verdicts in stated.items()]


def _only(stated: list[tuple[Verdict, Entry]], missing: Verdict | None) -> Judged:
    """The one verdict of a name: two decide nothing."""
    if missing is not None and not stated:
        return missing, None
    verdict, entry = stated[0]
    if len(stated) == 1:
        return verdict, entry
    names = ", ".join(entry.name for _, entry in stated)
    status = worst(["INCOMPLETE", *(verdict.status for verdict, _ in stated)])
    reason = f"{len(stated)} entries state it: {names}"
    return (missing or verdict).model_copy(update={"status": status, "reason": reason}), None


# --------------------------------------------------------------------------------------------------------------------
# Claims on speed and memory


def _judge_again(stated: Verdict, evidence: Evidence) -> Verdict:
    """The claim's verdict by the store's pairs. Raises :class:`DataError` where ``stated`` says otherwise.

    What rests on no pair and is not a PASS is taken as it is stated; why pairs are missing only ``stated`` knows. A
    trial may have been measured further since: its first pairs are judged.
    """
    claim = next((claim for claim in CLAIMS if claim.name == stated.name), None)
    if claim is None:
        unknown = {"status": "INCOMPLETE", "reason": "the acceptance table holds no claim of this name", "figures": {}}
        return stated.model_copy(update=unknown)
    kept = {"status": stated.status, "reason": stated.reason, "run_ids": stated.run_ids}
    if stated.figures and stated.figures.get("claim") != claim.model_dump(mode="json"):
        kept |= {"status": "INCOMPLETE", "reason": "it was judged as another claim than the acceptance table holds"}
        return _without_pairs(claim).model_copy(update=kept)
    num_pairs = stated.figures.get("num_pairs")
    if not num_pairs and stated.status != "PASS":
        return _without_pairs(claim).model_copy(update=kept)
    again = _judge_pairs(claim, num_pairs if isinstance(num_pairs, int) else 0, evidence)
    computed = {"status": again.status, **again.figures}
    for name, recorded in {**dict.fromkeys(computed), **stated.figures, "status": stated.status}.items():
        if not is_same(recorded, computed.get(name)):
            by_pairs = f"{computed.get(name)} by the store's {again.figures['num_pairs']} pairs"
            problem = f"claim {claim.name}: {name} is {recorded} in the JSON and {by_pairs}"
            raise DataError(problem, remedy=NOT_ONE_GATE)
    return again.model_copy(update={"reason": stated.reason}) if again.status == "INCOMPLETE" else again


def _judge_pairs(claim: Claim, num_pairs: int, evidence: Evidence) -> Verdict:
    trial = evidence.trials.get(claim.trial)
    pairs = trial.pairs[:num_pairs] if trial else []
    statuses = {role: ["completed"] * len(pairs) for role in ("baseline", "candidate")}
    if trial and trial.failure and trial.failed_role and len(pairs) == len(trial.pairs):
        statuses[trial.failed_role].append(evidence.runs[trial.failure].status)
    baseline, candidate = ([getattr(pair, role) for pair in pairs] for role in statuses)
    try:
        return judge(
            claim,
            [_value(run_id, claim, evidence) for run_id in baseline],
            [_value(run_id, claim, evidence) for run_id in candidate],
            num_pairs_planned=trial.num_pairs if trial else 1,
            baseline_statuses=statuses["baseline"],
            candidate_statuses=statuses["candidate"],
            run_ids=[run_id for pair in zip(baseline, candidate, strict=True) for run_id in pair],
        )
    except ValueError as error:
        raise DataError(f"claim {claim.name} cannot be judged by the store's runs: {error}", remedy=REMEDY) from error


def _value(run_id: str, claim: Claim, evidence: Evidence) -> float:
    value = evidence.runs[run_id].measure(claim.metric)
    if value is None:
        raise ValueError(f"trial {claim.trial} names run {run_id}, which holds no {claim.metric}")
    return value


# --------------------------------------------------------------------------------------------------------------------
# In words


def overall(judged: dict[str, list[Judged]], *, is_partial: bool = False) -> Status:
    """The worst status: green only if every verdict of every suite is a PASS and the gate came to its end."""
    statuses = [verdict.status for verdicts in judged.values() for verdict, _ in verdicts]
    return worst([*statuses, "INCOMPLETE"] if is_partial else statuses)


def headline(judged: dict[str, list[Judged]]) -> str:
    """``5 of 6 claims passed, 1 FAIL. Accuracy: 6 of 8 passed, 2 INCOMPLETE.``"""
    return " ".join(_counted(kind, [verdict.status for verdict, _ in verdicts]) for kind, verdicts in judged.items())


def _counted(kind: str, statuses: list[Status]) -> str:
    counts = f"{statuses.count('PASS')} of {len(statuses)}"
    rest = "".join(f", {statuses.count(status)} {status}" for status in reversed(STATUSES[1:]) if status in statuses)
    return (
        f"{counts} claims passed{rest}." if kind == "claim" else f"{SUITES[kind].capitalize()}: {counts} passed{rest}."
    )


def label(verdict: Verdict) -> str:
    """The verdict's name for people: ``rung 4, noise``."""
    rung = verdict.figures.get("rung")
    return f"rung {rung}, {verdict.name}" if rung else verdict.name.replace("_", " ")


def verdict_table(kind: str, judged: Iterable[Judged], caption: str, what: str) -> Table:
    """One row per verdict: what must hold, whether it does, and why."""
    rows = tuple(
        Row(
            (label(verdict), verdict.statement or NONE),
            runs=tuple(verdict.run_ids),
            status=verdict.status,
            anchor=f"{kind}-{place}",
            note=verdict.reason,
        )
        for place, (verdict, _) in enumerate(judged, 1)
    )
    return Table(caption, (what, "What must hold"), rows, texts=2)
