"""Which adapter is exported: a completed run's own, or that of a checkpoint of a run that is not finished."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forge.training.adapter.adapter_config import CONFIG
from forge.training.adapter.lora import WEIGHTS
from forge.training.config.quantizations import gguf_types
from forge.training.system.errors import ConfigurationError, DataError
from forge.training.system.files import disk_errors, sha256_file
from forge.training.train.checkpoint import BEST_PREFIX, problem
from forge.training.train.record import RunRecord, completed_record, read_record


@dataclass(frozen=True)
class Source:
    """``run``: the record, as it would be of this adapter. ``remark``: said wherever the export is described."""

    run: RunRecord
    adapter_dir: Path
    remark: str | None = None
    suffix: str = ""  # of what is made of a checkpoint


@contextmanager
def source_of(run_dir: Path, checkpoint: str | None = None) -> Iterator[Source]:
    """A completed run's adapter; with ``checkpoint`` that of a sealed one: ``best``, ``last`` or its step.

    ``best``: the best adapter so far by held-out loss, as the newest checkpoint keeps it. Lent for the time of the
    block. Raises :class:`DataError` and, for a checkpoint that is not there, :class:`ConfigurationError`.
    """
    if checkpoint is None:
        yield Source(completed_record(run_dir), run_dir / "adapter")
        return
    run = read_record(run_dir)
    if run.status == "completed":
        raise ConfigurationError(
            f"{run_dir} is complete: its checkpoints are gone, and its adapter is the best one",
            remedy="leave --checkpoint out",
        )
    path, prefix = _find(run_dir, checkpoint)
    step = int(path.name.removeprefix("checkpoint-"))
    with disk_errors(run_dir), tempfile.TemporaryDirectory(dir=run_dir, prefix=".adapter-") as folder:
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(path / f"{prefix}{name}", Path(folder) / name)
        which = f"the best adapter up to step {step}" if prefix else f"step {step}"
        remark = f"made of {which} of {run.num_planned_steps}, of a run that is not finished ({run.status})"
        suffix = f"{'best' if prefix else 'step'}-{step}"
        changes = {
            "adapter_sha256": sha256_file(Path(folder) / WEIGHTS),
            "workload": {**run.workload, "name": f"{run.workload['name']}-{suffix}"},
            "num_steps": step,
        }
        yield Source(run.model_copy(update=changes), Path(folder), remark, suffix)


def _find(run_dir: Path, wanted: str) -> tuple[Path, str]:
    """The checkpoint, whose seal holds, and what stands before the names of its adapter's files."""
    steps = sorted(
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in (run_dir / "checkpoints").glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    )
    whole = [(step, path) for step, path in steps if problem(path) is None]
    if not whole:
        raise DataError(f"{run_dir} has no complete checkpoint yet", remedy="train on until one is saved")
    if wanted in ("best", "last"):
        path = whole[-1][1]
        return path, BEST_PREFIX if wanted == "best" and (path / f"{BEST_PREFIX}{WEIGHTS}").is_file() else ""
    found = next((path for step, path in whole if str(step) == wanted), None)
    if found is None:
        there = ", ".join(str(step) for step, _ in whole)
        raise ConfigurationError(f"no complete checkpoint {wanted!r}", remedy=f"best, last or one of {there}")
    return found, ""


def chosen_types(
    run_dir: Path, quantizations: str | None, add: str | None, *, force: bool, is_unfinished: bool
) -> list[str]:
    """The GGUF types that were asked for, by default the config's. ``add``: only these, to what is there.

    Raises :class:`ConfigurationError` for options that exclude one another.
    """
    if add is not None and (quantizations is not None or force):
        other = "--quant names all" if quantizations is not None else "--force makes everything again"
        raise ConfigurationError(f"--add keeps what is there, and {other}", remedy="give one of them")
    if add is not None or quantizations is not None:
        return gguf_types(add or quantizations or "")
    run = read_record(run_dir) if is_unfinished else completed_record(run_dir)
    return list(run.workload["export"]["quantizations"])
