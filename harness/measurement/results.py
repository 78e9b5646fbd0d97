"""What was measured, on disk: ``STORE/runs/RUN_ID.json``; by name under ``trials``, ``probes`` and a suite's directory.

Outcomes are only ever added. They hold no path, host or user name, so that a store can be committed.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from forge.training.backends import Backend
from forge.training.system.errors import ConfigurationError, DataError
from forge.training.system.files import disk_errors, locked, read_json_object, refuse_existing, write_json
from harness.measurement.redact import portable, portable_setting

RunStatus = Literal["completed", "out_of_memory", "diverged", "timeout", "crashed", "refused", "no_record"]
Order = Literal["AB", "BA"]
Role = Literal["baseline", "candidate"]
ROLES: dict[Order, tuple[Role, Role]] = {"AB": ("baseline", "candidate"), "BA": ("candidate", "baseline")}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


_Model = TypeVar("_Model", bound=_Part)


class RunSpec(_Part):
    """What is run; nothing about where. ``workload``: a name in ``forge/workloads/`` or a file.

    ``evaluate``: put base and adapter to the held-out documents before the run's files are deleted.
    ``float32_adapter``: whatever precision the stack itself keeps the adapter in; with it ``rounding``, what else is
    to be rounded otherwise (``harness.parity.probes.float32_adapter``).
    """

    backend: Backend
    workload: str
    overrides: tuple[str, ...] = ()  # --set key=value
    plan_overrides: tuple[str, ...] = ()  # --plan key=value
    evaluate: bool = False
    float32_adapter: bool = False
    rounding: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _without_what_is_not_asked(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Runs that do without the last three fields keep the keys that they had before there were such fields."""
        optional = ("evaluate", "float32_adapter", "rounding")
        return {name: value for name, value in serialise(self).items() if value or name not in optional}

    def label(self) -> str:
        """For people: ``unsloth genome_full (micro_batch=1)``."""
        roundings = [f"rounding={name}" for name in self.rounding]
        differs = [*self.plan_overrides, *["adapter=float32"] * self.float32_adapter, *roundings]
        plan = f" ({', '.join(differs)})" if differs else ""
        return f"{self.backend} {Path(self.workload).stem}{plan}"

    def portable(self) -> RunSpec:
        """The same without the places of files on this machine; their content is in a measurement's key."""
        overrides = tuple(map(portable_setting, self.overrides))
        return self.model_copy(update={"workload": portable(self.workload), "overrides": overrides})


class Monitor(_Part):
    """What was seen from outside during a run; ``None``: not seen. The peak includes what was used before."""

    num_samples: int = 0
    device_used_before_bytes: int | None = None
    device_used_peak_bytes: int | None = None
    sm_clock_mhz_median: float | None = None
    sm_clock_mhz_min: float | None = None
    temperature_celsius_max: float | None = None
    power_watts_median: float | None = None
    throttle_reasons: list[str] = Field(default_factory=list)  # without "idle"
    disturbed_share: float | None = None  # of the samples under load: those with a reason that disturbs
    num_foreign_processes_max: int | None = None


class Outcome(_Part):
    """One run in one fresh process. ``key``: equal keys are the same measurement; ``key_parts`` explain it."""

    schema_version: Literal[1] = 1
    run_id: str
    key: str
    key_parts: dict[str, Any]
    spec: RunSpec
    status: RunStatus
    message: str | None = None
    exit_code: int | None  # negative: the number of the signal that ended it
    started_at: str  # UTC, ISO 8601
    wall_seconds: float  # evaluation included
    machine: str  # 16 hex digits that tell machines apart and name none
    monitor: Monitor
    log_tail: str
    record: dict[str, Any] | None = None  # forge.training.train.record.RunRecord
    steps: list[dict[str, Any]] = Field(default_factory=list)  # the run's step log; not finite: None
    evaluation: dict[str, Any] | None = None  # forge.training.evaluation.record.Evaluation, where the spec asks for it


class Pair(_Part):
    """A complete pair by the identifiers of its two runs; ``index`` counts from 1."""

    index: int
    order: Order
    baseline: str
    candidate: str


class OpenPair(_Part):
    """A pair about to be measured. ``after``: the store's newest run then, so what follows is the pair's."""

    index: int
    order: Order
    after: str | None


class SetAside(_Part):
    """Runs of a pair that do not count, and why."""

    index: int
    run_ids: list[str]
    reason: str


class TrialState(_Part):
    """A trial as stored: fixed at its creation but for the last five fields."""

    schema_version: Literal[1] = 1
    name: str
    baseline: RunSpec
    candidate: RunSpec
    num_pairs: int
    baseline_key: str
    candidate_key: str
    baseline_parts: dict[str, Any]
    candidate_parts: dict[str, Any]
    pairs: list[Pair] = Field(default_factory=list)
    set_aside: list[SetAside] = Field(default_factory=list)
    open_pair: OpenPair | None = None
    failure: str | None = None  # the run that ended the trial
    failed_role: Role | None = None

    @property
    def keys(self) -> dict[Role, str]:
        """The key of each arm's runs."""
        return {"baseline": self.baseline_key, "candidate": self.candidate_key}


class Store:
    """A directory of outcomes and trials. One process at a time measures into it: :meth:`lock`."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory).absolute()
        self.numbering = threading.RLock()  # from a run's number to its file, where several are made side by side
        self._num_holds = 0

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store against other processes; may be nested. Raises :class:`LockedError` (exit code 9)."""
        with ExitStack() as held:
            with self.numbering:
                if not self._num_holds:
                    held.enter_context(locked(self.directory))
                self._num_holds += 1
            try:
                yield
            finally:
                with self.numbering:
                    self._num_holds -= 1

    def run_ids(self) -> list[str]:
        """All runs, oldest first, by the count that ends their names."""
        runs = self.directory / "runs"
        names = [path.stem for path in runs.glob("*.json")] if runs.is_dir() else []
        wrong = [name for name in names if not re.fullmatch(r"[0-9a-f]{12}-\d{4,}", name)]
        if wrong:
            raise DataError(f"{runs / wrong[0]}.json is not a run of this store", remedy="move it elsewhere")
        return sorted(names, key=_count)

    def new_run_id(self, key: str) -> str:
        """The name of the next run; its count is unique in the store."""
        last = self.run_ids()[-1:]
        return f"{key[:12]}-{_count(last[0]) + 1 if last else 1:04d}"

    def append(self, outcome: Outcome) -> None:
        """Add an outcome; an existing one is never replaced."""
        path = self._run_path(outcome.run_id)
        refuse_existing(path, force=False)
        write_json(path, outcome.model_dump(mode="json"))

    def read(self, run_id: str) -> Outcome:
        """One outcome. Raises :class:`DataError` naming the file if it is absent or damaged."""
        outcome = _read(self._run_path(run_id), Outcome)
        if outcome.run_id != run_id:
            raise DataError(f"{self._run_path(run_id)} holds run {outcome.run_id}", remedy="restore the file")
        return outcome

    def outcomes(self) -> list[Outcome]:
        """All outcomes, oldest first."""
        return [self.read(run_id) for run_id in self.run_ids()]

    def with_key(self, key: str) -> list[Outcome]:
        """The outcomes of one measurement, oldest first."""
        return [self.read(run_id) for run_id in self.run_ids() if run_id.startswith(f"{key[:12]}-")]

    def read_trial(self, name: str) -> TrialState | None:
        """A trial's state, ``None`` if there is no such trial."""
        path = self.trial_path(name)
        return _read(path, TrialState) if path.exists() else None

    def trials(self) -> list[TrialState]:
        """All trials, by name."""
        return [_read(path, TrialState) for path in sorted((self.directory / "trials").glob("*.json"))]

    def write_trial(self, state: TrialState) -> None:
        """Keep a trial's state."""
        write_json(self.trial_path(state.name), state.model_dump(mode="json"))

    def put_away_trial(self, name: str) -> None:
        """Keep a trial that is another one by now under ``trials/old/``, out of the way of its successor."""
        path = self.trial_path(name)
        numbers = [int(old.suffixes[0][1:]) for old, _ in self.trials_put_away(name)]
        with disk_errors(path.parent):
            (path.parent / "old").mkdir(exist_ok=True)
            os.replace(path, path.parent / "old" / f"{name}.{max(numbers, default=0) + 1}.json")

    def trials_put_away(self, name: str = "*") -> list[tuple[Path, TrialState]]:
        """What :meth:`put_away_trial` has kept of a trial, or of all."""
        paths = sorted((self.directory / "trials" / "old").glob(f"{name}.*.json"))
        return [(path, _read(path, TrialState)) for path in paths]

    def take_up_trial(self, path: Path, state: TrialState) -> None:
        """Make a trial that was put away the current one of its name, which is free."""
        with disk_errors(path):
            os.replace(path, self.trial_path(state.name))

    def trial_path(self, name: str) -> Path:
        """Where a trial is kept. Raises :class:`ConfigurationError` for an invalid name."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise ConfigurationError(f"{name!r} cannot name a trial", remedy="use letters, digits, _ and -")
        return self.directory / "trials" / f"{name}.json"

    def probe_path(self, name: str) -> Path:
        """Where a probe's answer is kept."""
        return self.directory / "probes" / f"{name}.json"

    def probe_paths(self, pattern: str = "*") -> list[Path]:
        """The probes' answers whose names match ``pattern`` (as of :mod:`glob`), sorted."""
        return sorted((self.directory / "probes").glob(f"{pattern}.json"))

    def judged_path(self, suite: str, name: str) -> Path:
        """Where a suite keeps what it judged, or fixed before a test."""
        return self.directory / suite / f"{name}.json"

    def beside(self, name: str) -> Path:
        """A directory beside the store: for files that are large or of this machine, and are made again if lost."""
        return self.directory.parent / name

    def _run_path(self, run_id: str) -> Path:
        return self.directory / "runs" / f"{run_id}.json"


def _count(run_id: str) -> int:
    return int(run_id.rpartition("-")[2])


def _read(path: Path, model: type[_Model]) -> _Model:
    try:
        return model.model_validate(read_json_object(path))
    except ValidationError as invalid:
        first = invalid.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        problem = f"{path} is not the {model.__name__} it should be: {where}: {first['msg']}"
    except DataError as error:
        problem = error.message
    raise DataError(
        problem, remedy="restore the file, or delete it and what names it under trials/; runs are then measured again"
    )
