"""RunRecord: what a run was, did and measured. Written as ``run.json`` in the run directory.

Units are in the names. Every digest is a hex SHA-256. Values not measured are ``None``: never
a guess, never zero.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from forge.training.backends import Backend
from forge.training.config.overrides import listed, shown, validation_errors
from forge.training.config.workload import Workload
from forge.training.data.inputs import Inputs
from forge.training.system.errors import DataError, DivergedError, GpuMemoryError, Interrupted
from forge.training.system.files import is_there, lock_holder, read_json_object, sha256_json, write_json
from forge.training.train.status import read_status

SCHEMA_VERSION = 1
TRAINING_VERSION = 1  # raised when the same inputs and config would no longer train the same adapter
Status = Literal["running", "completed", "interrupted", "diverged", "out_of_memory", "failed"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Trainable(_Part):
    """The adapter's parameters: ``names_sha256`` is over sorted (name, shape) pairs."""

    num_parameters: int
    names_sha256: str
    dtype: str


class MemoryPhase(_Part):
    """Peaks up to the end of a phase, counted from the start of the process."""

    phase: str
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    device_used_bytes: int | None = None


class ProcessMemory(_Part):
    """The most of the process's own memory that was resident by the end of a phase."""

    phase: str
    peak_resident_bytes: int


class Timing(_Part):
    """Wall-clock seconds. ``steady_*`` leave out the first steps, which compile and warm up."""

    load_seconds: float | None = None
    rehearsal_seconds: float | None = None  # the largest micro-batch, once before the first step; not in train steps
    train_seconds: float | None = None
    steady_step_seconds_median: float | None = None
    documents_per_second: float | None = None
    tokens_per_second: float | None = None  # non-padding tokens
    num_warmup_steps_left_out: int = 0


class Losses(_Part):
    """Nats per trained token. ``first``/``last`` train loss are means of up to five steps that they do not share."""

    first_train_loss: float | None = None
    last_train_loss: float | None = None
    first_validation_loss: float | None = None
    best_validation_loss: float | None = None
    best_step: int | None = None
    last_validation_loss: float | None = None


class Resume(_Part):
    """The run resumed at ``at`` from ``step``, ``after`` it had ended as that status says (running: killed)."""

    at: str  # UTC, ISO 8601
    step: int
    after: Status
    changes: list[str] = Field(default_factory=list)  # of plan and packages, old -> new


class Predecessor(_Part):
    """A run whose adapter was trained on: its adapter, config and examples by digest.

    ``path``: its directory, relative to that of the record, so that both can be moved together.
    """

    path: str
    adapter_sha256: str
    workload_sha256: str
    train_examples_sha256: str
    backend: Backend
    num_steps: int


class RunRecord(_Part):
    """One backend x one config x one seed in one process."""

    schema_version: int = SCHEMA_VERSION
    training_version: int = TRAINING_VERSION
    status: Status
    message: str | None = None  # why, where status is not "completed"
    backend: Backend
    workload: dict[str, Any]
    workload_sha256: str
    plan: dict[str, Any]
    seed: int
    base_path: str
    started_at: str  # UTC, ISO 8601
    num_steps: int
    num_planned_steps: int
    inputs: Inputs
    model_shape: dict[str, Any] | None = None  # the base's config.json: sizes only
    trainable: Trainable | None = None
    timing: Timing = Timing()
    losses: Losses = Losses()
    memory: list[MemoryPhase] = Field(default_factory=list)  # of the GPU
    process_memory: list[ProcessMemory] = Field(default_factory=list)
    environment: dict[str, Any] = Field(default_factory=dict)
    adapter_sha256: str | None = None
    batch_digests: list[str] = Field(default_factory=list)  # labels as they reach the model, one per step
    notes: list[str] = Field(default_factory=list)  # what was unusual: spikes of the loss
    resumes: list[Resume] = Field(default_factory=list)
    continues: list[Predecessor] = Field(default_factory=list)  # the runs before it, oldest first

    @field_validator("environment")
    @classmethod
    def _has_sections(cls, environment: dict[str, Any]) -> dict[str, Any]:
        for name in ("cpu", "git", "gpu", "packages", "settings", "torch"):
            if not isinstance(environment.get(name), dict | None):
                raise ValueError(f"environment.{name} is no object")
        return environment

    def write(self, run_dir: Path) -> None:
        """Write ``run.json`` atomically."""
        write_json(run_dir / "run.json", self.model_dump(mode="json"))


def describe_trainable(model: Any) -> Trainable:
    """Count and digest the trainable parameters under names that no backend's wrapper changes."""
    rows, dtypes = [], set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rows.append([name.replace(".default", "").replace("._orig_mod", ""), list(parameter.shape)])
            dtypes.add(str(parameter.dtype).removeprefix("torch."))
    return Trainable(
        num_parameters=sum(math.prod(shape) for _, shape in rows),
        names_sha256=sha256_json(sorted(rows)),
        dtype=",".join(sorted(dtypes)),
    )


def chain_after(continued: Path, run: RunRecord, run_dir: Path) -> list[Predecessor]:
    """What the run in ``run_dir`` that continues the adapter of the complete ``run`` says in ``continues``."""
    assert run.adapter_sha256 is not None
    earlier = [each.model_copy(update={"path": _between(continued / each.path, run_dir)}) for each in run.continues]
    last = Predecessor(
        path=_between(continued, run_dir),
        adapter_sha256=run.adapter_sha256,
        workload_sha256=run.workload_sha256,
        train_examples_sha256=run.inputs.train_examples_sha256,
        backend=run.backend,
        num_steps=run.num_steps,
    )
    return [*earlier, last]


def _between(directory: Path, run_dir: Path) -> str:
    return os.path.relpath(directory.resolve(), run_dir.resolve())


def predecessor_directory(run_dir: Path, run: RunRecord) -> Path:
    """The directory of the run that ``run`` in ``run_dir`` continues, if it holds the adapter that it continued.

    Raises :class:`DataError` if it is not there any more.
    """
    last = run.continues[-1]
    directory = Path(os.path.normpath(run_dir.absolute() / last.path))
    if not is_there(directory / "run.json") or read_record(directory).adapter_sha256 != last.adapter_sha256:
        raise DataError(
            f"{directory} is not the run whose adapter {run_dir} continues (adapter {last.adapter_sha256[:16]})",
            remedy="put that run back there, or name where it is now: forge train ... --continue RUN",
        )
    return directory


def status_of(error: BaseException) -> Status:
    """The record's status for an error that ended a run."""
    kinds: dict[type[BaseException], Status] = {
        GpuMemoryError: "out_of_memory",
        DivergedError: "diverged",
        Interrupted: "interrupted",
    }
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), "failed")


def read_record(run_dir: Path | str) -> RunRecord:
    """Read a run directory's record. Raises :class:`DataError` if it is absent or not one."""
    path = Path(run_dir) / "run.json"
    if not is_there(path):
        raise DataError(f"{run_dir} is not a run: it has no run.json", remedy="name a directory that `train` wrote")
    content = read_json_object(path, finite=True)
    version = content.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} is a run record of schema {shown(version)}, and this Forge reads schema {SCHEMA_VERSION}",
            remedy="read it with the Forge that wrote it, or train again",
        )
    try:
        return RunRecord.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as invalid:
        errors = listed(validation_errors(RunRecord, invalid))
        raise DataError(f"{path} is not a run record of schema {SCHEMA_VERSION}:\n{errors}") from invalid


def completed_record(run_dir: Path | str) -> RunRecord:
    """Like :func:`read_record`, but refuses a run that did not complete or whose config is invalid."""
    record = read_record(run_dir)
    if record.status != "completed":
        raise _unfinished(Path(run_dir), record)
    try:
        Workload.model_validate(record.workload)
    except ValidationError as invalid:
        errors = listed(validation_errors(Workload, invalid, "workload."))
        raise DataError(f"{run_dir}/run.json holds no config that this Forge knows:\n{errors}") from invalid
    return record


def _unfinished(run_dir: Path, record: RunRecord) -> DataError:
    """How far an unfinished run is, whose record is written when it begins and when it ends, and what to do."""
    step, remark = record.num_steps, ""
    remedy = f"finish it first: `forge status {run_dir}` shows the command that resumes it"
    if record.status == "diverged":
        remedy = "train again with other settings: the same would diverge again"
    if record.status == "running":
        with contextlib.suppress(DataError):
            step = max(step, read_status(run_dir).step)
        holder = lock_holder(run_dir)
        remark = f", process {holder}" if holder else "; its process is gone"
        remedy = f"wait for it: `forge status {run_dir}` shows how far it is" if holder else remedy
    return DataError(
        f"{run_dir} is {record.status} at step {step} of {record.num_planned_steps}{remark}", remedy=remedy
    )
