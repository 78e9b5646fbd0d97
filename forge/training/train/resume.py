"""The same command again: what a run directory holds, and whether this run is the same work.

Free to change on a resume, because it changes nothing that the run computes: names, descriptions and
paths (data and weights are known by content), ``report_to``, ``export``, ``evaluation``, ``gate``,
``model.offline``, ``training.save_every_*``, ``training.spike_limit``, ``training.sample_answers``, and the plan.
Packages may change too, and are reported: their rounding is not the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from forge.training.backends import Backend
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload, changed_keys
from forge.training.data.inputs import Inputs
from forge.training.data.records import several
from forge.training.system.errors import ConfigurationError, DataError, DiskError
from forge.training.system.files import beside, disk_errors, remove, sha256_file, write_text
from forge.training.train.checkpoint import delete_all
from forge.training.train.record import TRAINING_VERSION, Predecessor, RunRecord, read_record
from forge.training.train.status import NAME as STATUS

_MADE_BEFORE_THE_RECORD = (
    *("corpus.jsonl", "corpus.train.jsonl", "corpus.validation.jsonl", "examples"),
    *("workload.yaml", "workload.plans.yaml"),
)
_MADE_BY_A_RUN = (
    *("checkpoints", "best", "adapter", "steps.jsonl", "tensorboard", "merged", "export", "evaluation.json"),
    *("outcome.json", "report.html", *_MADE_BEFORE_THE_RECORD),
    *("run.json", STATUS),  # last, so that what is left of a move is still seen to be a run
)
_LEFT_BY_A_KILL = re.compile(
    rf"\.({'|'.join(map(re.escape, ('inputs', *_MADE_BY_A_RUN)))})\.[a-z0-9_]{{8}}\.(part|old)"
)
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "unsloth_zoo")
_REMEDY = "go back to what it was trained with, train into another directory with --out, or again with --force"


def previous_run(
    run_dir: Path,
    workload: Workload,
    backend: Backend,
    *,
    resume: bool,
    force: bool,
    continues: list[Predecessor] | None = None,
) -> RunRecord | None:
    """The run to resume, ``None`` to begin one. Touches nothing.

    Raises :class:`ConfigurationError` if the directory holds other work, :class:`DataError` if
    ``resume`` is asked and there is nothing to resume, :class:`DiskError` if somebody else's files are there.
    """
    if resume and force:
        raise ConfigurationError("--resume continues a run and --force starts afresh", remedy="choose one")
    if force:
        foreign = sorted(path.name for path in _entries(run_dir) if path.name not in _MADE_BY_A_RUN)
        if foreign:
            raise DiskError(
                f"{run_dir} holds what no run made: {several(foreign)}",
                remedy="move that elsewhere, or name another directory with --out: --force replaces a run and no more",
            )
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
    first, first_now = (_short(chain[-1].adapter_sha256 if chain else None) for chain in (before.continues, continues))
    if (before.workload_sha256, before.backend, first) == (workload.digest(), backend, first_now):
        return before
    changed = [f"  backend: {before.backend} -> {backend}"] if before.backend != backend else []
    changed += [f"  the adapter that it continues (--continue): {first} -> {first_now}"] if first != first_now else []
    changed += changed_keys(before.workload, workload.model_dump(mode="json"))
    raise ConfigurationError(f"{run_dir} holds a run of other settings:\n" + "\n".join(changed), remedy=_REMEDY)


def refuse_other_inputs(run_dir: Path, before: RunRecord, now: Inputs) -> None:
    """Raise :class:`DataError` with old -> new if base, tokenizer or data are not what the run was trained on.

    So too if this Forge trains in another way than the one that wrote the record.
    """
    what = {
        "base_sha256": "the base model's weights",
        "tokenizer_sha256": "the tokenizer",
        "train_examples_sha256": "the training examples",
        "validation_examples_sha256": "the held-out examples",
    }
    old, new = before.inputs, now
    changed = [
        f"  {name}: {_short(getattr(old, key))} -> {_short(getattr(new, key))}"
        for key, name in what.items()
        if getattr(old, key) != getattr(new, key)
    ]
    counts = (("training", "num_train_examples"), ("held-out", "num_validation_examples"))
    changed += [
        f"  number of {side} examples: {getattr(old, key):,} -> {getattr(new, key):,}"
        for side, key in counts
        if getattr(old, key) != getattr(new, key)
    ]
    if before.training_version != TRAINING_VERSION:
        changed.append(f"  Forge's version of training: {before.training_version} -> {TRAINING_VERSION}")
    if changed:
        raise DataError(f"{run_dir} was trained on something else:\n" + "\n".join(changed), remedy=_REMEDY)


def refuse_other_base(predecessor: RunRecord, now: Inputs) -> None:
    """Raise :class:`DataError` if the run whose adapter is continued was trained on another base or tokenizer."""
    for key, what in (("base_sha256", "weights"), ("tokenizer_sha256", "tokenizer")):
        old, new = getattr(predecessor.inputs, key), getattr(now, key)
        if old != new:
            raise DataError(
                f"the adapter to continue was trained on another base: {what} {_short(old)}, here {_short(new)}",
                remedy="continue on its own base: set model.path to it",
            )


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:16]


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


def first_adapter_of(continued: Path, chain: list[Predecessor], run_dir: Path) -> Path:
    """The weights of a complete run's adapter. Raises :class:`DataError` if they are not those that it trained.

    Raises :class:`ConfigurationError` if the run that continues it would take its place.
    """
    if continued.resolve() == run_dir.resolve():
        raise ConfigurationError(f"{run_dir} is the run to continue", remedy="name another directory with --out")
    path = continued / "adapter" / "adapter_model.safetensors"
    if not path.is_file() or sha256_file(path) != chain[-1].adapter_sha256:
        raise DataError(f"{path} is not the adapter that this run trained", remedy="put it back, or train it again")
    return path


def same_command(*, force: bool) -> str:
    """What resumes a run that a command began: with ``--force`` it would begin afresh once more."""
    return "the same command without --force" if force else "the same command"


def is_complete(run: RunRecord | None) -> bool:
    """Whether there is a run and it was trained to its end."""
    return run is not None and run.status == "completed"


def completed_again(
    before: RunRecord, workload: Workload, base_dir: Path, run_dir: Path, announce: Callable[[str], None]
) -> RunRecord:
    """The record of a run that is complete and was trained on just this.

    What does not change training may have changed (facts, quantisations, paths): the steps after it read it here.
    """
    delete_all(run_dir / "checkpoints")  # of a process killed between its last two writes
    now = workload.model_dump(mode="json")
    changed = changed_keys(before.workload, now)
    if changed:
        announce("changed since it was trained, and no part of training:\n" + "\n".join(changed))
    if changed or before.base_path != str(base_dir):
        before.workload, before.base_path = now, str(base_dir)
        before.write(run_dir)
        write_text(run_dir / "workload.yaml", workload.to_yaml())
    announce(f"{run_dir} is complete, and trained on these documents and this base: nothing to do")
    return before


def set_aside(run_dir: Path, announce: Callable[[str], None]) -> None:
    """Move what an earlier run made to ``NAME.1`` (2, 3, ...) beside it, and say so, unless it is not worth it.

    Nothing is deleted: a fresh run shares nothing with it, and who forced one can go back. A start that failed
    before its record left only what the next one makes again.
    """
    made = [run_dir / name for name in _MADE_BY_A_RUN if os.path.lexists(run_dir / name)]
    if {path.name for path in made} <= {*_MADE_BEFORE_THE_RECORD, STATUS}:
        return
    with disk_errors(run_dir):
        place = next(path for n in count(1) if not os.path.lexists(path := beside(run_dir, f".{n}")))
        place.mkdir()
        for path in made:
            os.replace(path, place / path.name)
    announce(f"the run that was in {run_dir} is kept in {place}: delete it when you no longer need it")


def clear_partials(run_dir: Path, announce: Callable[[str], None]) -> None:
    """Delete what a killed process was still writing beside its final name."""
    for path in sorted(run_dir.glob(".*")):
        if not _LEFT_BY_A_KILL.fullmatch(path.name):
            continue
        announce(f"{path.name} is left of a process that was killed: deleted")
        remove(path)


def _entries(run_dir: Path) -> list[Path]:
    """What is in a directory, its lock and what a killed process left aside."""
    if not run_dir.is_dir():
        return []
    return [path for path in run_dir.iterdir() if path.name != ".lock" and not _LEFT_BY_A_KILL.fullmatch(path.name)]
