"""Reliability: a verdict a claim and backend, and what the probes found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from harness.reliability.claims import STOP_LIMIT_SECONDS
from harness.reliability.suite import BACKENDS
from harness.report.evidence import Evidence
from harness.report.page.content import Row, Section, Table
from harness.report.page.numbers import NONE, tied
from harness.report.stated import Stated, figures_of, read_stated, verdict_table

_Found = tuple[str, str, str]  # what, found, beside it


def build(evidence: Evidence) -> Section:
    """Raises :class:`DataError` for a verdict that cannot be read."""
    found = read_stated(evidence, "reliability")
    rows = tuple(row for one in found if one.figures for row in _rows(one))
    figures = (Table("What was found", ("Claim", "What", "Found", "Against"), rows, texts=2),) if rows else ()
    verdicts = verdict_table(found, "What a run must survive", "Claim")
    return Section("reliability", "Reliability", parts=(verdicts, *figures))


def _rows(one: Stated) -> list[Row]:
    shown = {f"{name}_{backend}": show for name, show in _SHOWN.items() for backend in BACKENDS}
    if one.name not in shown:
        return []
    with figures_of(one.entry):
        return [Row((one.name.replace("_", " "), *cells), one.run_ids) for cells in shown[one.name](one.figures)]


def _resume(figures: dict[str, Any]) -> Iterator[_Found]:
    noise = _difference(figures["noise"])
    for name in ("killed", "stopped"):
        run = figures[name]
        what = f"{name}, resumed from step {run['resumed_from_step']}: relative difference from a whole run"
        yield what, _difference(run["difference"]), f"two whole runs: {noise}"


def _difference(apart: dict[str, Any]) -> str:
    return "0, the same bits" if apart["identical"] else f"{apart['relative']:.2g}"


def _memory(figures: dict[str, Any]) -> Iterator[_Found]:
    yield "micro-batch that it went on with", str(figures["micro_batch"]), tied(f"within {figures['cap_gib']:g} GiB")
    count = sum(resume["after"] == "out_of_memory" for resume in figures["resumes"])
    yield "times that it ran out of memory", str(count), "at least 1"
    yield "steps", str(figures["num_steps"]), f"{figures['num_planned_steps']} planned"


def _callbacks(figures: dict[str, Any]) -> Iterator[_Found]:
    for number, events in enumerate(figures["events"], 1):
        yield f"events of step kind {number}: {', '.join(events.split())}", str(len(events.split())), NONE


def _stop(figures: dict[str, Any]) -> Iterator[_Found]:
    yield "seconds from SIGTERM to the end", f"{figures['stop_seconds']:.1f}", f"at most {STOP_LIMIT_SECONDS:g}"
    sealed = figures["checkpoint_problem"] is None
    yield "checkpoint, MB", f"{figures['checkpoint_bytes'] / 1e6:.0f}", "sealed" if sealed else "not sound"


_SHOWN: dict[str, Callable[[dict[str, Any]], Iterator[_Found]]] = {
    "resume": _resume,
    "memory": _memory,
    "callbacks": _callbacks,
    "stop": _stop,
}
