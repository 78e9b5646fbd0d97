"""Saving during a run: room for it first, then all of it, then its seal; a failed save leaves the others."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forge.training.backends.job import TrainingJob
from forge.training.system.errors import DataError, DiskError
from forge.training.system.files import (
    disk_errors,
    read_json_object,
    require_free_bytes,
    sha256_file,
    staged_directory,
    write_json,
)
from forge.training.train import checkpoint
from forge.training.train.metrics import Meter

BEST = "best.json"  # beside the best adapter: its step, held-out loss and digest
KEPT = 2
_REMEDY = "free space; the run goes on from its newest checkpoint with the same command"


class Saver:
    """Writes a run's checkpoints. ``seconds_before``: what the run had trained for when this process began."""

    def __init__(
        self,
        job: TrainingJob,
        meter: Meter,
        identity: dict[str, str],
        *,
        num_parameters: int,
        resumed_from: checkpoint.Checkpoint | None,
        on_sealed: Callable[[str], None],
    ) -> None:
        self._job, self._meter, self._identity = job, meter, identity
        self._on_sealed = on_sealed
        self._resumed_from = resumed_from.path if resumed_from else None
        self._seconds_before = resumed_from.train_seconds if resumed_from else 0.0
        self._started = self.last_saved = time.monotonic()
        self._size_bytes = checkpoint.size_bytes(num_parameters, job.workload.optimizer.name)
        self.directory = job.run_dir / "checkpoints"

    @property
    def train_seconds(self) -> float:
        """Seconds of training so far, those of earlier processes included that a resume went on from."""
        return self._seconds_before + time.monotonic() - self._started

    def require_space(self) -> None:
        """Raise :class:`DiskError` before the first step if the run's files cannot fit.

        They are: the checkpoints kept and the one being written, the best adapter and the last one.
        """
        there = sum(path.stat().st_size for path in self._job.run_dir.rglob("*") if path.is_file())
        needed = (KEPT + 2) * self._size_bytes
        remedy = "free space, or train into another place with --out"
        require_free_bytes(self._job.run_dir, max(needed - there, self._size_bytes), "the run", remedy)

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around the backend's own save of a step. Raises :class:`DiskError` and removes what was half written."""
        path, best = self.directory / f"checkpoint-{step}", self._job.run_dir / "best"
        require_free_bytes(self._job.run_dir, self._size_bytes, f"the checkpoint of step {step}", _REMEDY)
        checkpoint.delete(path)
        try:
            with disk_errors(path, "save"):
                self.directory.mkdir(parents=True, exist_ok=True)
                yield
                self._meter.flush()
                checkpoint.add_run_state(path, self._meter.path, best if best.is_dir() else None)
                checkpoint.seal(path, self._identity, train_seconds=self.train_seconds)
        except DiskError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        self._size_bytes = max(self._size_bytes, sum(p.stat().st_size for p in path.rglob("*") if p.is_file()))
        checkpoint.rotate(self.directory, keep=KEPT, resumed_from=self._resumed_from)
        self.last_saved = time.monotonic()
        self._on_sealed(path.name)


def save_adapter(model: Any, job: TrainingJob, directory: Path, evaluated: tuple[int, float] | None = None) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, complete or not at all."""
    with staged_directory(directory, force=True) as staging:
        model.save_pretrained(staging, safe_serialization=True)
        for name in ("README.md", "training_args.bin"):
            (staging / name).unlink(missing_ok=True)
        config = json.loads((staging / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = job.workload.model.path
        write_json(staging / "adapter_config.json", config)
        if evaluated is not None:
            digest = sha256_file(staging / "adapter_model.safetensors")
            content = {"step": evaluated[0], "validation_loss": evaluated[1], "adapter_sha256": digest}
            write_json(staging / BEST, content)
        for path in staging.iterdir():
            path.chmod(0o644)


def read_best(directory: Path) -> tuple[int, float] | None:
    """Step and held-out loss of the best adapter so far, ``None`` if there is none. Raises :class:`DataError`."""
    if not directory.is_dir():
        return None
    content = read_json_object(directory / BEST)
    try:
        step, loss, digest = int(content["step"]), float(content["validation_loss"]), content["adapter_sha256"]
        if sha256_file(directory / "adapter_model.safetensors") == digest:
            return step, loss
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{directory} is damaged", remedy="restore it from a copy, or start afresh with --force")
