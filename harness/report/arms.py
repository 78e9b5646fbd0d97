"""The arms of a gate: what was measured on a workload, by which backend, in which runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harness.report.evidence import Entry, Evidence
from harness.report.page.numbers import NONE, Spread, spread
from harness.report.run import Run

BACKENDS = ("legacy", "trl", "unsloth")
BASELINE = "legacy"


@dataclass(frozen=True, eq=False)  # the same only if it is the same object: it serves as a key
class Arm:
    """One backend in one layout on one workload. ``name``: the backend's, or says what is different about it."""

    name: str
    backend: str
    workload: str
    runs: tuple[Run, ...]

    @property
    def run_ids(self) -> tuple[str, ...]:
        return tuple(run.id for run in self.runs)

    @property
    def example(self) -> Run | None:
        """The first complete run: what all runs of an arm share is read from it."""
        return next((run for run in self.runs if run.is_complete), None)

    @property
    def layout(self) -> str:
        return self.example.layout if self.example else NONE

    def measure(self, metric: str) -> Spread | None:
        return spread([run.measure(metric) for run in self.runs])

    @property
    def failure(self) -> str | None:
        """How its runs ended, in words, where none of them completed."""
        if self.example:
            return None
        ends = dict.fromkeys(run.status.replace("_", " ") for run in self.runs)
        return ", ".join(ends) or "no run"


def arms_by_workload(evidence: Evidence) -> dict[str, list[Arm]]:
    """The arms of the metric entries, each with all runs that its entries name; the baseline first."""
    grouped: dict[str, dict[str, list[Entry]]] = {}
    for entry in evidence.of_kind("metric"):
        grouped.setdefault(entry.workload, {}).setdefault(entry.text("arm"), []).append(entry)
    return {
        workload: sorted((arm(evidence, name, workload, entries) for name, entries in arms.items()), key=_order)
        for workload, arms in grouped.items()
    }


def ladder(evidence: Evidence) -> list[Arm]:
    """The rungs, in the order they were written."""
    grouped: dict[tuple[str, str], list[Entry]] = {}
    for entry in evidence.of_kind("ladder"):
        grouped.setdefault((entry.workload, entry.text("arm")), []).append(entry)
    return [arm(evidence, name, workload, entries) for (workload, name), entries in grouped.items()]


def arm(evidence: Evidence, name: str, workload: str, entries: Iterable[Entry]) -> Arm:
    entries = list(entries)
    return Arm(name, entries[0].text("backend"), workload, tuple(evidence.runs_of(entries)))


def baseline_of(arms: Iterable[Arm]) -> Arm | None:
    """The legacy stack in its owner's own layout."""
    return next((arm for arm in arms if arm.name == BASELINE), None)


def ratio(above: Spread | None, below: Spread | None) -> float | None:
    """Ratio of two medians: for reading, not for judging. Claims are judged on pairs."""
    return None if above is None or below is None or below.middle == 0 else above.middle / below.middle


def floor_bytes(arms: Iterable[Arm]) -> int | None:
    """The weight floor that the arms of a workload share, None where no run carries the model's sizes."""
    floors = [arm.example.floor_bytes for arm in arms if arm.example]
    return next((floor for floor in floors if floor is not None), None)


def _order(one: Arm) -> tuple[int, bool]:
    place = BACKENDS.index(one.backend) if one.backend in BACKENDS else len(BACKENDS)
    return place, one.name != one.backend
