"""What a report is made from: pytest-benchmark's JSON of a gate, and the store's runs.

Nothing else is read, so that each number of a report can be traced to a run record. What does not
fit together (an entry that names a run the store lacks, a metric that the runs contradict) is a
:class:`~forge.training.system.errors.DataError`: a report is never made from half of the evidence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from forge.training.system.errors import DataError
from forge.training.system.files import read_json_object
from harness.measurement.results import Store, TrialState
from harness.report.page.content import printable
from harness.report.run import Run, read_run

KINDS = ("metric", "claim", "ladder", "context", "ceiling", "not_run", "parity", "export", "reliability")
_ROUNDING = 1e-6  # entries and runs are the same numbers, through JSON
REMEDY = "name the JSON that `pytest -m gpu --benchmark-json=FILE` wrote, and with --store the store it measured into"
_Info = TypeVar("_Info", bound=BaseModel)


@dataclass(frozen=True)
class Entry:
    """One entry of the benchmark JSON. ``samples``: one value a run, in the order of ``run_ids``."""

    name: str
    kind: str
    info: dict[str, Any]
    samples: tuple[float, ...]

    @property
    def run_ids(self) -> tuple[str, ...]:
        return tuple(self.info.get("run_ids") or ())

    def text(self, key: str) -> str:
        """A field of extra_info that must hold words. Raises :class:`DataError`."""
        value = self.info.get(key)
        if not isinstance(value, str) or not value:
            raise DataError(f"entry {self.name}: extra_info.{key} is {value!r}, not a text", remedy=REMEDY)
        return value

    @property
    def workload(self) -> str:
        """The workload's name, which also becomes part of anchors. Raises :class:`DataError`."""
        name = self.text("workload")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise DataError(f"entry {self.name}: extra_info.workload is {name!r}, no workload's name", remedy=REMEDY)
        return name

    def parse(self, model: type[_Info]) -> _Info:
        """The fields of extra_info that ``model`` names. Raises :class:`DataError` with the first that is wrong."""
        try:
            return model.model_validate({k: v for k, v in self.info.items() if k in model.model_fields})
        except ValidationError as invalid:
            first = invalid.errors()[0]
            where = ".".join(str(part) for part in ("extra_info", *first["loc"]))
            raise DataError(f"entry {self.name}: {where}: {first['msg']}", remedy=REMEDY) from invalid


@dataclass(frozen=True)
class Evidence:
    """A whole gate. ``runs``: every run of the store, by id, oldest first."""

    machine: dict[str, Any]
    commit: dict[str, Any]
    made_at: str
    entries: tuple[Entry, ...]
    runs: dict[str, Run]
    trials: tuple[TrialState, ...]
    probes: dict[str, dict[str, Any]]  # STORE/probes, by the files' names
    is_partial: bool  # the gate ended before pytest-benchmark wrote its results

    def of_kind(self, kind: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == kind]

    def probe_of(self, entry: Entry) -> str | None:
        """The name of the probe that an entry's ``probe``, its key, means."""
        key = entry.info.get("probe")
        return next((name for name, probe in self.probes.items() if key and probe.get("key") == key), None)

    def sources_of(self, entry: Entry) -> tuple[str, ...]:
        """Everything measured that an entry rests on: its probe and its runs."""
        probe = self.probe_of(entry)
        return (*((probe,) if probe else ()), *entry.run_ids)

    def runs_of(self, entries: Iterable[Entry]) -> list[Run]:
        """The runs that entries name, each once, in order."""
        return [self.runs[run_id] for run_id in dict.fromkeys(i for entry in entries for i in entry.run_ids)]


def read_evidence(benchmark_json: Path, store: Path) -> Evidence:
    """Read and cross-check both inputs. Raises :class:`DataError`."""
    content = read_json_object(benchmark_json)
    entries = tuple(_entries(benchmark_json, content))
    if not any(entry.kind in KINDS for entry in entries):
        raise DataError(f"{benchmark_json} holds no entry of the gate", remedy=REMEDY)
    evidence = Evidence(
        machine=_object(content.get("machine_info")),
        commit=_object(content.get("commit_info")),
        made_at=str(content.get("datetime") or ""),
        entries=entries,
        runs=_read_runs(store),
        trials=_read_trials(store),
        probes={path.stem: read_json_object(path) for path in sorted((store / "probes").glob("*.json"))},
        is_partial=bool(content.get("is_partial")),
    )
    for trial in evidence.trials:
        named = {run_id for pair in trial.pairs for run_id in (pair.baseline, pair.candidate)}
        if missing := named - evidence.runs.keys():
            raise DataError(f"trial {trial.name} names run {min(missing)}, which the store lacks", remedy=REMEDY)
    for entry in entries:
        _check(entry, evidence.runs, store)
        if entry.info.get("probe") is not None and evidence.probe_of(entry) is None:
            raise DataError(f"entry {entry.name} names a probe that {store} lacks", remedy=REMEDY)
    return evidence


def _read_runs(store: Path) -> dict[str, Run]:
    if not any((store / name).is_dir() for name in ("runs", "probes")):
        raise DataError(f"{store} is not a store: it has no directory named runs", remedy=REMEDY)
    return {outcome.run_id: read_run(outcome) for outcome in Store(store).outcomes()}


def _read_trials(store: Path) -> tuple[TrialState, ...]:
    names = sorted(path.stem for path in (store / "trials").glob("*.json"))
    found = (Store(store).read_trial(name) for name in names)
    return tuple(state for state in found if state is not None)


def _entries(path: Path, content: dict[str, Any]) -> Iterable[Entry]:
    benchmarks = content.get("benchmarks")
    if not isinstance(benchmarks, list):
        raise DataError(f"{path} is not pytest-benchmark's JSON: it has no list named benchmarks", remedy=REMEDY)
    for position, benchmark in enumerate(benchmarks):
        benchmark = _object(benchmark)
        info = _printable(_object(benchmark.get("extra_info")))
        name = printable(str(benchmark.get("name") or f"number {position + 1}"))
        run_ids = info.get("run_ids") or []
        if not (isinstance(run_ids, list) and all(isinstance(run_id, str) for run_id in run_ids)):
            raise DataError(f"{path}: entry {name}: extra_info.run_ids is not a list of run ids", remedy=REMEDY)
        samples = _object(benchmark.get("stats")).get("data") or []
        if not (isinstance(samples, list) and all(_is_number(sample) for sample in samples)):
            raise DataError(f"{path}: entry {name}: stats.data holds something that is no number", remedy=REMEDY)
        yield Entry(name, str(info.get("record_kind") or "unknown"), info, tuple(float(sample) for sample in samples))


def _check(entry: Entry, runs: dict[str, Run], store: Path) -> None:
    if missing := [run_id for run_id in entry.run_ids if run_id not in runs]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"entry {entry.name} names run {missing[0]}{more}, which {store} lacks", remedy=REMEDY)
    if entry.kind not in ("metric", "ladder") or len(entry.samples) != len(entry.run_ids):
        return
    for sample, run_id in zip(entry.samples, entry.run_ids, strict=True):
        value = runs[run_id].measure(str(entry.info.get("metric")))
        if value is not None and not math.isclose(sample, value, rel_tol=_ROUNDING):
            raise DataError(
                f"entry {entry.name}: {entry.info['metric']} is {sample:g} in the JSON and {value:g} in run {run_id}",
                remedy="JSON and store are not of one gate: name those that belong together",
            )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _printable(value: Any) -> Any:
    """The same JSON without characters that neither a page nor a chart can hold."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _printable(inner) for key, inner in value.items()}
    return [_printable(inner) for inner in value] if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
