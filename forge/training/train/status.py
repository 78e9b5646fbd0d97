"""``status.json``: where a run stands, for launchers and people. Written atomically at every change."""

from __future__ import annotations

import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from forge.training.system.errors import DataError, DiskError
from forge.training.system.files import is_there, read_json_object, write_json

NAME = "status.json"
_WRITE_EVERY_SECONDS = 5.0

State = Literal["starting", "running", "completed", "interrupted", "diverged", "out_of_memory", "failed"]


class RunStatus(BaseModel):
    """``step`` of ``num_planned_steps`` optimizer steps are done; ``checkpoint`` is the newest sealed one's name.

    ``exit_code`` is that of the process, ``None`` while it works. A process that was killed could not
    say so: its status stays ``running`` while nobody holds the directory (:func:`~.progress.describe_status`).
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
