"""What a report is made from: pytest-benchmark's JSON of a gate, and the store's runs.

Nothing else is read, so that each number of a report can be traced to a run record. What does not
fit together (an entry that names a run the store lacks, a metric that the runs contradict) is a
:class:`~forge.training.system.errors.DataError`: a report is never made from half of the evidence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ValidationError

from forge.training.config.workload import Workload
from forge.training.planner.sizes import Sizes
from forge.training.report.page.content import printable
from forge.training.system.errors import CheckError, DataError
from forge.training.system.files import read_json_object
from forge.training.train.record import RunRecord
from harness.measurement.metrics import Metric, measure, training_steps
from harness.measurement.results import Outcome, Store, TrialState
from harness.verdict import Verdict

KINDS = ("metric", "claim", "ablation", "max_context", "matmul_peak", "not_run", "parity", "export", "reliability")
REMEDY = "name the JSON that `pytest -m gpu --benchmark-json=FILE` wrote, and with --store the store it measured into"
NOT_ONE_GATE = "JSON and store are not of one gate: name those that belong together"
_ROUNDING = 1e-6  # equal but for JSON and the order of sums
_RATES = {"documents_per_second": "documents", "tokens_per_second": "tokens"}
_Info = TypeVar("_Info", bound=BaseModel)


@dataclass(frozen=True)
class Run:
    """One run of the store. ``record`` is None where it left none. ``steps``: its optimizer steps, warm-up included.

    Measured are the steps after the workload's ``gate.num_warmup_steps``. What cannot be known is None.
    """

    outcome: Outcome
    record: RunRecord | None
    steps: tuple[dict[str, Any], ...]

    @property
    def id(self) -> str:
        return self.outcome.run_id

    @property
    def status(self) -> str:
        return self.outcome.status

    @property
    def backend(self) -> str:
        return self.outcome.spec.backend

    @property
    def is_complete(self) -> bool:
        return self.status == "completed" and self.record is not None

    @property
    def num_warmup_steps(self) -> int:
        if self.record is None:
            return 0
        gate = self.record.workload.get("gate") or {}
        return int(gate.get("num_warmup_steps", self.record.timing.num_warmup_steps_left_out))

    @property
    def measured_steps(self) -> tuple[dict[str, Any], ...]:
        return self.steps[self.num_warmup_steps :]

    @property
    def documents(self) -> int:
        return sum(step["documents"] for step in self.measured_steps)

    @property
    def tokens(self) -> int:
        return sum(step["tokens"] for step in self.measured_steps)

    def measure(self, metric: str) -> float | None:
        """A metric of the gate, documents or tokens per second; None where this run did not measure it."""
        if not self.is_complete:
            return None
        if metric in _RATES:
            seconds = self.measure("measured_seconds")
            return getattr(self, _RATES[metric]) / seconds if seconds else None
        if metric not in get_args(Metric):
            return None
        try:
            return measure(self.outcome, cast(Metric, metric), num_warmup_steps=self.num_warmup_steps)
        except CheckError:
            return None

    def peak_by_phase(self) -> dict[str, float]:
        """The peak allocated by the end of each phase, bytes."""
        phases = self.record.memory if self.record and self.is_complete else []
        return {phase.phase: float(phase.peak_allocated_bytes) for phase in phases}

    @cached_property
    def floor_bytes(self) -> int | None:
        """What weights, adapter and optimizer state need whatever the plan; None without the model's sizes."""
        if self.record is None or self.record.model_shape is None:
            return None
        try:
            return Sizes.of(Workload.model_validate(self.record.workload), self.record.model_shape).floor_bytes
        except (ValidationError, KeyError, TypeError):  # a record of another schema: no floor is better than a guess
            return None

    @property
    def commit(self) -> str | None:
        git = self.record.environment.get("git") if self.record else None
        return f"{git['commit'][:10]}{' (changed)' if git.get('is_dirty') else ''}" if git else None

    @property
    def layout(self) -> str:
        """The plan as people write it: ``4 x 2, no padding, flash``."""
        if self.record is None:
            return "not known"
        plan, training = self.record.plan, self.record.workload.get("training") or {}
        size = int(plan.get("micro_batch") or 1)
        words = [f"{size} x {int(training.get('effective_batch') or size) // size}"]
        words += ["no padding"] if plan.get("padding") == "none" else []
        words += [f"grouped by {plan['grouping']}"] if plan.get("grouping") not in (None, "none") else []
        words += [f"{plan['attention']} attention"] if plan.get("attention") not in (None, "default") else []
        words += [f"checkpointing {plan['gradient_checkpointing']}"] if plan.get("gradient_checkpointing") else []
        words += [f"MLP in tiles of {plan['mlp_tile_tokens']:,}"] if plan.get("mlp_tile_tokens") else []
        words += [f"loss in chunks of {plan['loss_chunk_gib']:g} GiB"] if plan.get("loss_chunk_gib") else []
        return ", ".join(words)


def read_run(outcome: Outcome) -> Run:
    """Raises :class:`DataError` where the outcome's record is not of this version."""
    try:
        record = None if outcome.record is None else RunRecord.model_validate(outcome.record)
    except ValidationError as invalid:
        problem = f"run {outcome.run_id} holds a record this version cannot read: {_first(invalid, 'record')}"
        raise DataError(problem) from None
    return Run(outcome, record, tuple(training_steps(outcome)))


@dataclass(frozen=True)
class Entry:
    """One entry of the benchmark JSON. ``samples``: one value per run, in the order of ``run_ids``."""

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
            raise DataError(f"entry {self.name}: extra_info.workload is {name!r}, an invalid name", remedy=REMEDY)
        return name

    def parse(self, model: type[_Info]) -> _Info:
        """The fields of extra_info that ``model`` names. Raises :class:`DataError` with the first that is wrong."""
        try:
            return model.model_validate({k: v for k, v in self.info.items() if k in model.model_fields})
        except ValidationError as invalid:
            problem = f"entry {self.name}: {_first(invalid, 'extra_info')}"
            raise DataError(problem, remedy=REMEDY) from invalid

    def verdict(self) -> Verdict | None:
        """The verdict that this entry states; None where it states none. Raises :class:`DataError`."""
        content = self.info.get("verdict")
        try:
            return Verdict.model_validate(content) if content else None
        except ValidationError as invalid:
            problem = f"entry {self.name}: not a verdict: {_first(invalid, 'extra_info.verdict')}"
            raise DataError(problem, remedy=REMEDY) from invalid


@contextmanager
def figures_of(entry: Entry) -> Iterator[None]:
    """Where an entry's figures are shown: a missing or invalid one is a :class:`DataError` that names the entry."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"entry {entry.name}: its figures cannot be shown: {what}", remedy=REMEDY) from error


@dataclass(frozen=True)
class Evidence:
    """A whole gate. ``runs``: every run of the store, by id, oldest first. ``trials`` by name."""

    machine: dict[str, Any]
    commit: dict[str, Any]
    made_at: str
    entries: tuple[Entry, ...]
    runs: dict[str, Run]
    trials: dict[str, TrialState]
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
    if not any((store / name).is_dir() for name in ("runs", "probes")):
        raise DataError(f"{store} is not a store: it has no directory named runs", remedy=REMEDY)
    evidence = Evidence(
        machine=_object(content.get("machine_info")),
        commit=_object(content.get("commit_info")),
        made_at=str(content.get("datetime") or ""),
        entries=entries,
        runs={outcome.run_id: read_run(outcome) for outcome in Store(store).outcomes()},
        trials={trial.name: trial for trial in Store(store).trials()},
        probes={path.stem: read_json_object(path) for path in sorted((store / "probes").glob("*.json"))},
        is_partial=bool(content.get("is_partial")),
    )
    named = [(f"trial {trial.name}", _runs_of(trial)) for trial in evidence.trials.values()]
    named += [(f"entry {entry.name}", list(entry.run_ids)) for entry in entries]
    for what, run_ids in named:
        if missing := [run_id for run_id in run_ids if run_id not in evidence.runs]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(f"{what} names run {missing[0]}{more}, which {store} lacks", remedy=REMEDY)
    for entry in entries:
        if entry.info.get("probe") is not None and evidence.probe_of(entry) is None:
            raise DataError(f"entry {entry.name} names a probe that {store} lacks", remedy=REMEDY)
        _check_samples(entry, evidence.runs)
    return evidence


def _runs_of(trial: TrialState) -> list[str]:
    pairs = [run_id for pair in trial.pairs for run_id in (pair.baseline, pair.candidate)]
    return [*pairs, *([trial.failure] if trial.failure else [])]


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
            raise DataError(f"{path}: entry {name}: stats.data holds a value that is not a number", remedy=REMEDY)
        yield Entry(name, str(info.get("record_kind") or "unknown"), info, tuple(float(sample) for sample in samples))


def _check_samples(entry: Entry, runs: dict[str, Run]) -> None:
    """Tables and charts are made from the runs: samples that say something else are of another gate."""
    if entry.kind not in ("metric", "ablation") or len(entry.samples) != len(entry.run_ids):
        return
    metric = str(entry.info.get("metric"))
    for sample, run_id in zip(entry.samples, entry.run_ids, strict=True):
        value = runs[run_id].measure(metric)
        if value is not None and not is_same(sample, value):
            problem = f"entry {entry.name}: {metric} is {sample:g} in the JSON and {value:g} in run {run_id}"
            raise DataError(problem, remedy=NOT_ONE_GATE)


def is_same(recorded: Any, computed: Any) -> bool:
    """Whether a value of the JSON is what the runs say, numbers but for rounding."""
    if _is_number(recorded) and _is_number(computed):
        return math.isclose(recorded, computed, rel_tol=_ROUNDING)
    return bool(recorded == computed)


def _first(invalid: ValidationError, where: str) -> str:
    first = invalid.errors()[0]
    return f"{'.'.join((where, *map(str, first['loc'])))}: {first['msg']}"


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
