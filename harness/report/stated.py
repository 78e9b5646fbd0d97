"""Verdicts of the rooms beside speed and memory, as their tests recorded them: the parity ladder's and the export's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from forge.training.system.errors import DataError
from harness.perf.claims import Status
from harness.report.evidence import REMEDY, Entry, Evidence
from harness.report.expected import EXPECTED, Expected
from harness.report.page.content import Row, Table
from harness.report.page.numbers import NONE

ROOMS = {"parity": "accuracy", "export": "export", "reliability": "reliability"}  # record_kind -> for people


class _Verdict(BaseModel):
    model_config = ConfigDict(extra="ignore")

    status: Status
    reason: str
    name: str | None = None
    statement: str | None = None
    figures: dict[str, Any] = Field(default_factory=dict)


class Stated(BaseModel):
    """One verdict. ``number``: of a rung. ``names``: baseline and candidate. ``entry``: the name of what states it.

    ``run_ids``: the runs, and the probe, that it rests on.
    """

    name: str
    statement: str | None
    number: int | None
    status: Status
    reason: str
    entry: str
    figures: dict[str, Any] = {}
    run_ids: tuple[str, ...] = ()
    names: tuple[str, str] = ("baseline", "candidate")
    anchor: str = ""


def read_stated(evidence: Evidence, kind: str) -> list[Stated]:
    """The verdicts recorded as ``kind``, and an INCOMPLETE one for each that a whole gate leaves and this one did not.

    A verdict must be there once: two of one name decide nothing. In the order of :data:`EXPECTED`; of other names last.
    Raises :class:`DataError`.
    """
    entries = evidence.of_kind(kind)
    found = [_read(evidence, entry) for entry in entries if entry.info.get("verdict") is not None]
    silent = [entry for entry in entries if entry.info.get("verdict") is None]
    for expected in EXPECTED[kind]:
        named = [one for one in found if (one.number, one.name) == (expected.number, expected.name)]
        without = [entry for entry in silent if entry.info.get("metric") == expected.metric]
        if len(named) != 1 or without:
            told = [f"entry {entry.name} holds no verdict" for entry in without]
            told += [f"{len(named)} entries state it: {', '.join(one.entry for one in named)}"] if named[1:] else []
            found.append(_incomplete(expected, "; ".join(told) or "no verdict in the benchmark JSON"))
    order = {(one.number, one.name): place for place, one in enumerate(EXPECTED[kind])}
    found.sort(key=lambda one: order.get((one.number, one.name), len(order)))
    return [one.model_copy(update={"anchor": f"{kind}-{place}"}) for place, one in enumerate(found, 1)]


def _incomplete(expected: Expected, reason: str) -> Stated:
    return Stated(
        name=expected.name,
        statement=expected.statement,
        number=expected.number,
        status="INCOMPLETE",
        reason=reason,
        entry=expected.metric,
    )


def _read(evidence: Evidence, entry: Entry) -> Stated:
    try:
        verdict = _Verdict.model_validate(entry.info["verdict"])
    except ValueError as error:
        first = " ".join(str(error).split())[:300]
        raise DataError(f"entry {entry.name}: extra_info.verdict is not a verdict: {first}") from error
    told = {"name": verdict.name or str(entry.info.get("metric") or entry.name), "run_ids": evidence.sources_of(entry)}
    told["entry"] = entry.name
    names = (str(entry.info.get("baseline") or "baseline"), str(entry.info.get("arm") or "candidate"))
    rung = verdict.figures.get("rung")
    number = rung if isinstance(rung, int) else None
    return Stated(**{**verdict.model_dump(), **told}, number=number, names=names)


@contextmanager
def figures_of(entry: str) -> Iterator[None]:
    """Where an entry's figures are shown: one that is missing or no figure is a :class:`DataError` that names it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"entry {entry}: its figures cannot be shown: {what}", remedy=REMEDY) from error


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


def statuses(evidence: Evidence) -> dict[str, list[Status]]:
    """By room, the statuses of all the verdicts of a whole gate."""
    return {room: [one.status for one in read_stated(evidence, kind)] for kind, room in ROOMS.items()}
