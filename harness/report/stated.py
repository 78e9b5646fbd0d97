"""Verdicts of the rooms beside speed and memory, as their tests recorded them: the parity ladder's and the export's."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from forge.training.errors import DataError
from harness.claims import Status
from harness.report.content import Row, Section, Table
from harness.report.quantities import NONE
from harness.report.source import Entry, Evidence

ROOMS = {"parity": "accuracy", "export": "export", "reliability": "reliability"}  # record_kind -> for people


class _Verdict(BaseModel):
    model_config = ConfigDict(extra="ignore")

    status: Status
    reason: str
    name: str | None = None
    statement: str | None = None
    number: int | None = None
    figures: dict[str, Any] = Field(default_factory=dict)


class Stated(BaseModel):
    """One verdict. ``number``: of a rung. ``names``: baseline and candidate."""

    name: str
    statement: str | None
    number: int | None
    status: Status
    reason: str
    figures: dict[str, Any]
    run_ids: tuple[str, ...]
    names: tuple[str, str]
    anchor: str


def read_stated(evidence: Evidence, kind: str) -> list[Stated]:
    """The verdicts recorded as ``kind``, in order. Raises :class:`DataError`."""
    entries = [entry for entry in evidence.of_kind(kind) if entry.info.get("verdict") is not None]
    return [_read(entry, f"{kind}-{place}") for place, entry in enumerate(entries, 1)]


def _read(entry: Entry, anchor: str) -> Stated:
    try:
        verdict = _Verdict.model_validate(entry.info["verdict"])
    except ValueError as error:
        first = " ".join(str(error).split())[:300]
        raise DataError(f"entry {entry.name}: extra_info.verdict is not a verdict: {first}") from error
    told = {"name": verdict.name or str(entry.info.get("metric") or entry.name), "run_ids": entry.run_ids}
    names = (str(entry.info.get("baseline") or "baseline"), str(entry.info.get("arm") or "candidate"))
    return Stated(**{**verdict.model_dump(), **told}, names=names, anchor=anchor)


def verdict_table(found: list[Stated], caption: str, what: str) -> Table:
    """A row a verdict: what must hold, whether it does, and what was found."""
    rows = tuple(
        Row(
            (f"{one.number} {one.name}" if one.number else one.name.replace("_", " "), one.statement or NONE),
            runs=one.run_ids,
            status=one.status,
            anchor=one.anchor,
            note=one.reason,
        )
        for one in found
    )
    return Table(caption, (what, "What must hold"), rows, texts=2)


def build_reliability(evidence: Evidence) -> Section | None:
    """None where the gate left no verdict on it."""
    found = read_stated(evidence, "reliability")
    if not found:
        return None
    return Section("reliability", "Reliability", parts=(verdict_table(found, "What a run must survive", "Claim"),))


def statuses(evidence: Evidence) -> dict[str, list[Status]]:
    """By room, the statuses of all its verdicts; a room that left none is not there."""
    found = {room: [one.status for one in read_stated(evidence, kind)] for kind, room in ROOMS.items()}
    return {room: statuses for room, statuses in found.items() if statuses}
