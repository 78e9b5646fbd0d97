"""The same command again: what a run directory holds, and whether this run is the same work.

Free to change on a resume, because it changes nothing that the run computes: names, descriptions and
paths (data and weights are known by content), ``report_to``, ``export``, ``evaluation``, ``gate``,
``model.offline``, ``training.save_every_*``, ``training.spike_limit``, and the plan. Packages may
change too, and are reported: their rounding is not the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge.training.backends import Backend
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload, changed_keys
from forge.training.data.inputs import Inputs
from forge.training.system.errors import ConfigurationError, DataError, DiskError
from forge.training.system.files import remove
from forge.training.train.record import RunRecord, read_record
from forge.training.train.status import NAME as STATUS

_MADE_BY_A_RUN = (
    *("run.json", "steps.jsonl", "checkpoints", "best", "adapter", "examples", "tensorboard", "workload.yaml"),
    *("evaluation.json", "merged", "export", "outcome.json", STATUS),
)
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "unsloth_zoo")
_REMEDY = "resume with what it was started with, train into another directory, or start afresh with --force"


def previous_run(run_dir: Path, workload: Workload, backend: Backend, *, resume: bool, force: bool) -> RunRecord | None:
    """The run to resume, ``None`` to begin one. Touches nothing.

    Raises :class:`ConfigurationError` if the directory holds other work, :class:`DataError` if
    ``resume`` is asked and there is nothing to resume, :class:`DiskError` if somebody else's files are there.
    """
    if resume and force:
        raise ConfigurationError("--resume continues a run and --force starts afresh", remedy="choose one")
    if force:
        return None
    if not (run_dir / "run.json").exists():
        if resume:
            raise DataError(f"{run_dir} holds no run to resume", remedy="start it without --resume")
        unknown = [name for name in _MADE_BY_A_RUN if (run_dir / name).exists()]
        if unknown and not (run_dir / STATUS).exists():
            raise DiskError(
                f"{run_dir / unknown[0]} exists already, and no run.json says what it is",
                remedy="name another directory with --out, or replace it with --force",
            )
        return None
    before = read_record(run_dir)
    if (before.workload_sha256, before.backend) == (workload.digest(), backend):
        return before
    changed = [f"  backend: {before.backend} -> {backend}"] if before.backend != backend else []
    changed += changed_keys(before.workload, workload.model_dump(mode="json"))
    raise ConfigurationError(f"{run_dir} holds a run of other settings:\n" + "\n".join(changed), remedy=_REMEDY)


def refuse_other_inputs(run_dir: Path, before: Inputs, now: Inputs) -> None:
    """Raise :class:`DataError` with old -> new if base, tokenizer or data are not what the run began with."""
    what = {
        "base_sha256": "the base model's weights",
        "tokenizer_sha256": "the tokenizer",
        "train_examples_sha256": "the training examples",
        "validation_examples_sha256": "the held-out examples",
    }
    changed = [
        f"  {name}: {getattr(before, key)} -> {getattr(now, key)}"
        for key, name in what.items()
        if getattr(before, key) != getattr(now, key)
    ]
    if changed:
        raise DataError(f"{run_dir} was started with other content:\n" + "\n".join(changed), remedy=_REMEDY)


def allowed_changes(before: RunRecord, plan: Plan, environment: dict[str, Any]) -> list[str]:
    """What differs and may: one line ``key: old -> new`` per difference."""
    lines = [
        f"plan.{key}: {before.plan.get(key)} -> {value}"
        for key, value in plan.model_dump().items()
        if before.plan.get(key) != value
    ]
    old, new = before.environment.get("packages") or {}, environment.get("packages") or {}
    lines += [f"{name}: {old.get(name)} -> {new.get(name)}" for name in _PACKAGES if old.get(name) != new.get(name)]
    return lines


def clear(run_dir: Path) -> None:
    """Delete what an earlier run left: a fresh one shares nothing with it."""
    for name in _MADE_BY_A_RUN:
        remove(run_dir / name)


def clear_partials(run_dir: Path, announce: Callable[[str], None]) -> None:
    """Delete what a killed process was still writing beside its final name."""
    for path in [*run_dir.glob(".*.part"), *run_dir.glob(".*.old")]:
        announce(f"{path.name} is left of a process that was killed: deleted")
        remove(path)
