"""The arms of a gate with their runs: what was measured on a workload, by which backend in which layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from forge.training.backends import BACKENDS
from forge.training.report.page.numbers import NONE
from harness.perf.suite import LEGACY as BASELINE
from harness.report.evidence import Entry, Evidence, Run
from harness.report.page.numbers import Spread, spread


@dataclass(frozen=True, eq=False)  # the same only if it is the same object: it serves as a key
class ArmRuns:
    """An arm on one workload with its runs. ``name``: the backend's, or says what is different about it."""

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


def arms_by_workload(evidence: Evidence) -> dict[str, list[ArmRuns]]:
    """The arms of the metric entries by workload, each with all runs that its entries name; the baseline first."""
    arms: dict[str, list[ArmRuns]] = {}
    for arm in _arms(evidence, "metric"):
        arms.setdefault(arm.workload, []).append(arm)
    return {workload: sorted(of_workload, key=_order) for workload, of_workload in arms.items()}


def ablation(evidence: Evidence) -> list[ArmRuns]:
    """The arms of the ablation, in the order they were written."""
    return _arms(evidence, "ablation")


def _arms(evidence: Evidence, kind: str) -> list[ArmRuns]:
    grouped: dict[tuple[str, str], list[Entry]] = {}
    for entry in evidence.of_kind(kind):
        grouped.setdefault((entry.workload, entry.text("arm")), []).append(entry)
    return [
        ArmRuns(name, entries[0].text("backend"), workload, tuple(evidence.runs_of(entries)))
        for (workload, name), entries in grouped.items()
    ]


def baseline_of(arms: Iterable[ArmRuns]) -> ArmRuns | None:
    """The baseline in its own layout."""
    return next((arm for arm in arms if arm.name == BASELINE.name), None)


def by_backend(backend: str) -> int:
    """Place in the list of backends; unknown ones last."""
    return [*BACKENDS, backend].index(backend)


def ratio(above: Spread | None, below: Spread | None) -> float | None:
    """Ratio of two medians: for reading, not for judging. Claims are judged on pairs."""
    return None if above is None or below is None or below.middle == 0 else above.middle / below.middle


def floor_bytes(arms: Iterable[ArmRuns]) -> int | None:
    """The weight floor that the arms of a workload share, None where no run carries the model's sizes."""
    floors = [arm.example.floor_bytes for arm in arms if arm.example]
    return next((floor for floor in floors if floor is not None), None)


def _order(arm: ArmRuns) -> tuple[int, bool]:
    return by_backend(arm.backend), arm.name != arm.backend
