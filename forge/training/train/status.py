"""``status.json``: where a run stands, for launchers and people. Written atomically at every change."""

from __future__ import annotations

import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from forge.training.backends import load_plan
from forge.training.config.workload import load_workload
from forge.training.system.command import shown_path
from forge.training.system.errors import DataError, DiskError, ForgeError
from forge.training.system.files import is_there, lock_holder, read_json_object, write_json
from forge.training.train.record import RunRecord, read_record
from forge.training.train.step_log import read_step_log

NAME = "status.json"
_WRITE_EVERY_SECONDS = 5.0

State = Literal["starting", "running", "completed", "interrupted", "diverged", "out_of_memory", "failed"]


class RunStatus(BaseModel):
    """``step`` of ``num_planned_steps`` optimizer steps are done; ``checkpoint`` is the newest sealed one's name.

    ``exit_code`` is that of the process, ``None`` while it works. A process that was killed could not
    say so: its status stays ``running`` while nobody holds the directory (:func:`describe_status`).
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    state: State = "starting"
    step: int = 0
    num_planned_steps: int | None = None
    checkpoint: str | None = None
    exit_code: int | None = None
    message: str | None = None
    remedy: str | None = None
    process: int
    host: str
    started_at: str  # UTC, ISO 8601
    updated_at: str


class StatusFile:
    """Keeps a run directory's ``status.json``. A full disk never ends the run that it reports on."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / NAME
        now = _now()
        self._status = RunStatus(process=os.getpid(), host=platform.node(), started_at=now, updated_at=now)
        self._written = 0.0

    def update(self, **changes: Any) -> None:
        """Change fields and write."""
        self._status = self._status.model_copy(update=changes | {"updated_at": _now()})
        try:
            write_json(self._path, self._status.model_dump(mode="json"))
        except DiskError:
            return  # the run itself reports what fills the disk
        self._written = time.monotonic()

    def step_done(self, step: int) -> None:
        """Note a step; written every few seconds, since a step can last milliseconds."""
        if time.monotonic() - self._written >= _WRITE_EVERY_SECONDS:
            self.update(step=step)
        else:
            self._status.step = step


def read_status(run_dir: Path | str) -> RunStatus:
    """A run's status as it was last written. Raises :class:`DataError`."""
    path = Path(run_dir) / NAME
    if not is_there(path):
        raise DataError(f"{run_dir} is not a run: it has no {NAME}", remedy="name a run directory")
    try:
        return RunStatus.model_validate(read_json_object(path, finite=True))
    except ValidationError as error:
        raise DataError(f"{path} is not a run's status: {str(error).splitlines()[0]}") from error


def describe_status(run_dir: Path | str) -> dict[str, Any]:
    """The status and what the run's files say beside it; what is not known is ``None``.

    ``holder``: the process in the directory. ``killed``: it ended without saying so. ``loss`` and
    ``validation_loss``: the last ones, nats per trained token; ``best_*``: the lowest held-out loss.
    ``tokens_per_second``: of the last steps; ``seconds_left``: of training, at their pace. ``next``: the command
    to type next, as its words.
    """
    run_dir = Path(run_dir)
    status, holder = read_status(run_dir), lock_holder(run_dir)
    killed = holder is None and status.state in ("starting", "running")
    log = read_step_log(run_dir)
    step = max([status.step, *(step for step, _ in log.losses[-1:])]) if holder is not None else status.step
    left = max((status.num_planned_steps or step) - step, 0)
    best_step, best_loss = log.best or (None, None)
    return {
        **status.model_dump(mode="json"),
        "step": step,
        "holder": holder,
        "killed": killed,
        "run_dir": str(run_dir.absolute()),
        "loss": log.losses[-1][1] if log.losses else None,
        "validation_loss": log.validation[-1][1] if log.validation else None,
        "best_step": best_step,
        "best_validation_loss": best_loss,
        "tokens_per_second": log.tokens_per_second,
        "seconds_left": left * log.seconds_per_step if left and log.seconds_per_step is not None else None,
        "next": next_command(run_dir) if holder is None else None,
    }


def next_command(run_dir: Path, export_dir: Path | None = None) -> list[str] | None:
    """What to type after what a run directory holds: train, evaluate, export or chat, with what it needs.

    ``export_dir``: where the export is, if not in the run. ``None`` where nothing can be said.
    """
    try:
        record = read_record(run_dir)
    except ForgeError:
        return None
    if record.status != "completed":
        return _same_training(run_dir, record)
    run, config = shown_path(run_dir), record.workload
    facts = config.get("evaluation", {}).get("facts") or ()
    export_dir = export_dir or run_dir / "export"
    if not (export_dir / "export.json").is_file():
        can_evaluate = record.inputs.num_validation_examples or facts
        if can_evaluate and not (run_dir / "evaluation.json").is_file():
            return ["forge", "evaluate", run]
        return ["forge", "export", run]
    try:
        name = str(read_json_object(export_dir / "export.json")["modelfile_uses"])
    except (ForgeError, KeyError):
        return None
    return ["forge", "chat", shown_path(export_dir / name), *(str(fact["question"]) for fact in facts[:1])]


def _same_training(run_dir: Path, record: RunRecord) -> list[str] | None:
    """The command that resumes a run: its own stored config, and its plan where that is not the config's."""
    stored = run_dir / "workload.yaml"
    if not stored.is_file() or record.status == "diverged":  # the same would diverge again
        return None
    command = ["forge", "train", shown_path(stored), "--backend", record.backend, "--out", shown_path(run_dir)]
    try:
        plan = load_plan(load_workload(stored), record.backend).model_dump()
    except ForgeError:
        return None
    for key, value in record.plan.items():
        if plan.get(key) != value:
            command += ["--plan", f"{key}={'null' if value is None else str(value).lower()}"]
    return command


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
