"""Checkpoints that are complete or not there, and the adapters that a run keeps.

``transformers`` writes a checkpoint's files one after another and resumes from the highest
number, complete or not; a missing optimizer file is skipped in silence. Here a checkpoint counts
only once a seal, written last, names every file with its size and SHA-256, and itself. The best adapter so far
and the step log are part of it, so a run resumes from one moment and not from several. A save asks for disk space
first; one that fails is removed and leaves the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forge.training.backends.job import TrainingJob
from forge.training.config.workload import OptimizerSection
from forge.training.data.inputs import Inputs
from forge.training.system.errors import DataError, DiskError
from forge.training.system.files import (
    disk_errors,
    flush,
    flush_tree,
    read_json_object,
    require_free_bytes,
    sha256_file,
    sha256_json,
    staged_directory,
    write_json,
)
from forge.training.train.step_log import LOG

SEAL = "forge-seal.json"
KEPT = 2  # sealed checkpoints of a run, beside the one it resumed from
_BEST_RECORD = "best.json"  # beside the best adapter: its step, held-out loss and digest
BEST_PREFIX = (
    "best."  # before the names of the best adapter's files: a folder of them would be loaded as a second adapter
)
_NAME = re.compile(r"checkpoint-(\d+)")
_REQUIRED = (
    *("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt"),
    *("rng_state.pth", "trainer_state.json", LOG),
)
_UNNEEDED = ("training_args.bin", "README.md")  # a pickle, which holds tokens too, and a card that nobody reads


@dataclass(frozen=True)
class Checkpoint:
    """A valid one. ``train_seconds``: what the run had trained for when it was sealed."""

    path: Path
    step: int
    train_seconds: float


def add_run_state(checkpoint: Path, log: Path, best: Path | None) -> None:
    """Put the step log and the best adapter so far into a checkpoint: copies, so damage to one stays one's own."""
    shutil.copyfile(log, checkpoint / LOG)
    for source in best.iterdir() if best is not None else ():
        shutil.copyfile(source, checkpoint / (BEST_PREFIX + source.name))


def seal(checkpoint: Path, identity: dict[str, str], *, train_seconds: float) -> None:
    """Seal a checkpoint directory that was completely written. ``identity``: what a resume must match."""
    for unneeded in _UNNEEDED:
        (checkpoint / unneeded).unlink(missing_ok=True)
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    flush_tree(checkpoint)
    flush(checkpoint.parent)
    content = {"identity": identity, "train_seconds": train_seconds, "files": files}
    write_json(checkpoint / SEAL, content | {"sha256": sha256_json(content)})


def problem(checkpoint: Path, *, needs_scaler: bool = False) -> tuple[Literal["unsealed", "damaged"], str] | None:
    """Why a checkpoint cannot be trusted, ``None`` if it can. ``needs_scaler``: fp16's loss scaler belongs to it."""
    if not (checkpoint / SEAL).exists():
        return "unsealed", "it was never sealed (the save did not finish)"
    content = _read_seal(checkpoint)
    if content is None:
        return "damaged", f"{SEAL} is damaged"
    expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    for name in (*_REQUIRED, *(("scaler.pt",) if needs_scaler else ())):
        if name not in expected:
            return "damaged", f"{name} is missing"
    for name, (num_bytes, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return "damaged", f"{name} is missing"
        if path.stat().st_size != num_bytes or sha256_file(path) != digest:
            return "damaged", f"{name} is damaged"
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if state.get("global_step") != _step(checkpoint):
        return "damaged", f"it holds step {state.get('global_step')}"
    return None


def _read_seal(checkpoint: Path) -> dict[str, Any] | None:
    """The seal's content, ``None`` unless it is what :func:`seal` wrote, to the bit."""
    try:
        content = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        digest = content.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return dict(content) if sha256_json(content) == digest else None


def _step(path: Path) -> int | None:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match and path.is_dir() and not path.is_symlink() else None


def _newest_first(directory: Path) -> list[Path]:
    numbered = ((step, path) for path in directory.glob("checkpoint-*") if (step := _step(path)) is not None)
    return [path for _, path in sorted(numbered, reverse=True)]


def choose(
    directory: Path, identity: dict[str, str], *, needs_scaler: bool = False
) -> tuple[Checkpoint | None, list[str]]:
    """The valid checkpoint of the most steps, and a line for each newer one that was set aside.

    ``None`` if no save ever finished. Raises :class:`DiskError` if one did and none can be trusted
    now, and :class:`DataError` if the valid one belongs to other work: what differs, old -> new.
    """
    invalid: list[tuple[Path, str, str]] = []
    for path in _newest_first(directory):
        wrong = problem(path, needs_scaler=needs_scaler)
        if wrong is not None:
            invalid.append((path, *wrong))
            continue
        content = _read_seal(path)
        assert content is not None
        old = content["identity"]
        changed = [f"  {k}: {old.get(k)} -> {identity.get(k)}" for k in identity if old.get(k) != identity[k]]
        if changed:
            raise DataError(
                f"{path} belongs to other work:\n" + "\n".join(changed),
                remedy="resume with the settings it was started with, or train into another directory",
            )
        return Checkpoint(path, _step(path) or 0, content["train_seconds"]), _set_aside(invalid)
    if any(kind == "damaged" for _, kind, _ in invalid):
        raise DiskError(
            f"no checkpoint in {directory} can be used:\n"
            + "\n".join(f"  {path.name}: {reason}" for path, _, reason in invalid),
            remedy="restore one from a copy, or start afresh with --force",
        )
    return None, _set_aside(invalid)


def _set_aside(invalid: list[tuple[Path, str, str]]) -> list[str]:
    """Rename what is not used: the run will come to those steps again and must find nothing there."""
    lines = []
    for path, kind, reason in invalid:
        aside = path.with_name(f"{path.name}.{kind}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        lines.append(f"{path.name} is not used: {reason}; kept as {aside.name}")
    return lines


def restore(checkpoint: Checkpoint, log: Path, best: Path) -> None:
    """Bring the step log and the best adapter back to the moment of the checkpoint."""
    shutil.rmtree(best, ignore_errors=True)
    for source in checkpoint.path.glob(f"{BEST_PREFIX}*"):
        best.mkdir(exist_ok=True)
        shutil.copyfile(source, best / source.name.removeprefix(BEST_PREFIX))
    shutil.copyfile(checkpoint.path / LOG, log)


def rotate(directory: Path, *, keep: int = 2, resumed_from: Path | None = None) -> None:
    """Delete all but the ``keep`` newest sealed checkpoints and the one the run resumed from.

    By step, never by time of change, which a restored copy scrambles. What cannot be deleted stays.
    """
    kept = 0
    for path in _newest_first(directory):
        if kept >= keep:
            if path != resumed_from:
                delete(path)
        elif (path / SEAL).is_file():
            kept += 1


def delete(path: Path) -> None:
    """Delete a checkpoint, its seal first: half of one must not look damaged."""
    with contextlib.suppress(OSError):
        (path / SEAL).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def delete_all(directory: Path) -> None:
    """Delete a finished run's checkpoints: its adapter supersedes them."""
    for path in _newest_first(directory):
        delete(path)
    shutil.rmtree(directory, ignore_errors=True)


def size_bytes(num_parameters: int, optimizer: OptimizerSection) -> int:
    """What a checkpoint takes: float32 weights twice (the best are there too), the optimizer's state, small files."""
    return int(num_parameters * (8 + optimizer.state_bytes_per_parameter)) + (2 << 20)


def describe_identity(
    workload_sha256: str, inputs: Inputs, backend: str, first_adapter_sha256: str | None = None
) -> dict[str, str]:
    """What makes two runs the same work, by digest."""
    first = {} if first_adapter_sha256 is None else {"first_adapter": first_adapter_sha256}
    return {
        "workload": workload_sha256,
        "base": inputs.base_sha256,
        "tokenizer": inputs.tokenizer_sha256,
        "train_examples": inputs.train_examples_sha256,
        "validation_examples": str(inputs.validation_examples_sha256),
        "backend": backend,
        **first,
    }


class Saver:
    """Writes a run's checkpoints. ``identity``: of :func:`describe_identity`; ``on_sealed`` is given a name."""

    def __init__(
        self,
        job: TrainingJob,
        identity: dict[str, str],
        *,
        resumed_from: Checkpoint | None,
        on_sealed: Callable[[str], None],
    ) -> None:
        self._job, self._identity, self._on_sealed = job, identity, on_sealed
        self._resumed_from = resumed_from.path if resumed_from else None
        self._seconds_before = resumed_from.train_seconds if resumed_from else 0.0
        self._started = self.last_saved = time.monotonic()
        self._size_bytes = 0
        self.directory = job.run_dir / "checkpoints"

    def begin(self, num_parameters: int) -> None:
        """Start to count the training's seconds. Raises :class:`DiskError` if the run's files cannot fit.

        They are: the checkpoints kept and the one being written, the best adapter and the last one.
        """
        self._started = self.last_saved = time.monotonic()
        self._size_bytes = size_bytes(num_parameters, self._job.workload.optimizer)
        present = sum(path.stat().st_size for path in self._job.run_dir.rglob("*") if path.is_file())
        needed = (KEPT + 2) * self._size_bytes
        remedy = "free space, or train into another place with --out"
        require_free_bytes(self._job.run_dir, max(needed - present, self._size_bytes), "the run", remedy)

    @property
    def train_seconds(self) -> float:
        """Seconds of training so far, those of the processes before a resume included."""
        return self._seconds_before + time.monotonic() - self._started

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around the backend's own save of a step. Raises :class:`DiskError` and removes what was half written."""
        run_dir, path = self._job.run_dir, self.directory / f"checkpoint-{step}"
        remedy = "free space; the same command resumes from the newest checkpoint"
        require_free_bytes(run_dir, self._size_bytes, f"the checkpoint of step {step}", remedy)
        delete(path)
        try:
            with disk_errors(path, "save"):
                self.directory.mkdir(parents=True, exist_ok=True)
                yield
                add_run_state(path, run_dir / LOG, run_dir / "best" if (run_dir / "best").is_dir() else None)
                seal(path, self._identity, train_seconds=self.train_seconds)
        except DiskError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        self._size_bytes = max(self._size_bytes, sum(p.stat().st_size for p in path.rglob("*") if p.is_file()))
        rotate(self.directory, keep=KEPT, resumed_from=self._resumed_from)
        self.last_saved = time.monotonic()
        self._on_sealed(path.name)


def save_adapter(model: Any, job: TrainingJob, directory: Path, evaluated: tuple[int, float] | None = None) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, complete or not at all."""
    with staged_directory(directory, force=True) as staging:
        model.save_pretrained(staging, safe_serialization=True)
        for name in _UNNEEDED:
            (staging / name).unlink(missing_ok=True)
        config = json.loads((staging / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = job.workload.model.path
        write_json(staging / "adapter_config.json", config)
        if evaluated is not None:
            digest = sha256_file(staging / "adapter_model.safetensors")
            content = {"step": evaluated[0], "validation_loss": evaluated[1], "adapter_sha256": digest}
            write_json(staging / _BEST_RECORD, content)
        for path in staging.iterdir():
            path.chmod(0o644)


def read_best(directory: Path) -> tuple[int, float] | None:
    """Step and held-out loss of the best adapter so far, ``None`` if there is none. Raises :class:`DataError`."""
    if not directory.is_dir():
        return None
    content = read_json_object(directory / _BEST_RECORD)
    try:
        step, loss, digest = int(content["step"]), float(content["validation_loss"]), content["adapter_sha256"]
        if sha256_file(directory / "adapter_model.safetensors") == digest:
            return step, loss
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{directory} is damaged", remedy="restore it from a copy, or start afresh with --force")
