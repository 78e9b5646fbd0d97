"""Does what lies on disk belong to the run? Asked before anything is evaluated, merged or exported."""

from __future__ import annotations

import os
from pathlib import Path

from forge.training.adapter.adapter_config import CONFIG, AdapterConfig
from forge.training.adapter.lora import WEIGHTS, check_adapter
from forge.training.config.workload import Workload
from forge.training.models.base import refuse_unsafe_files
from forge.training.models.digests import base_sha256, tokenizer_sha256
from forge.training.models.weights import ModelWeights, read_weights
from forge.training.system.errors import DataError
from forge.training.system.files import sha256_file
from forge.training.train.record import RunRecord


def read_own_base(run: RunRecord, directory: Path | None = None) -> ModelWeights:
    """The headers of a run's base, whose tokenizer must be the run's; its weights :func:`require_own_base` compares.

    ``directory``: where the base is now, by default where it was. Raises :class:`DataError` also for a directory that
    asks for code or names files outside itself.
    """
    if directory is None and not os.path.isdir(run.base_path):
        raise DataError(
            f"the run's base is no longer in {run.base_path}: that is not a directory",
            remedy="say where it is now: --base DIR (its content must be the same; `forge base NAME` prints a"
            " directory)",
        )
    base = read_weights(directory or Path(run.base_path))
    refuse_unsafe_files(base.directory)
    actual, expected = tokenizer_sha256(base.directory), run.inputs.tokenizer_sha256
    if actual != expected:
        raise DataError(
            f"the tokenizer in {base.directory} is not the run's: SHA-256 {actual}, the run had {expected}",
            remedy="put the tokenizer that was trained with back, unchanged, or name the run's base with --base DIR",
        )
    return base


def require_own_base(directory: Path, expected_sha256: str) -> None:
    """Raise :class:`DataError` unless a base's weights are, by content, those that were trained on."""
    actual = base_sha256(directory)
    if actual != expected_sha256:
        raise DataError(
            f"{directory} is not the base that was trained on: SHA-256 {actual}, the run had {expected_sha256}",
            remedy="put the run's base back, unchanged, or say where it is with --base DIR",
        )


def require_own_adapter(run: RunRecord, run_dir: Path, base: ModelWeights, adapter_dir: Path | None = None) -> int:
    """Bytes of the run's adapter, which must be the one it wrote, whole, of this base, and scaled as it was trained.

    ``adapter_dir``: where it is, if not in ``run_dir/adapter``.
    Raises :class:`DataError`. Parsed in a child process: a run directory may come from elsewhere.
    """
    adapter_dir = adapter_dir or run_dir / "adapter"
    path = adapter_dir / WEIGHTS
    if not path.is_file():
        raise DataError(f"{path} is missing", remedy="train again, or name a run with its adapter")
    actual = sha256_file(path)
    if actual != run.adapter_sha256:
        raise DataError(
            f"{path} is not the adapter that this run trained: SHA-256 {actual}, the run had {run.adapter_sha256}",
            remedy="put the run's own adapter back, or train again",
        )
    _require_trained_scale(run, adapter_dir, check_adapter(adapter_dir, base.directory), base)
    return path.stat().st_size


def _require_trained_scale(
    run: RunRecord, adapter_dir: Path, actual: dict[str, tuple[int, float]], base: ModelWeights
) -> None:
    """The configuration beside the weights is in no digest: an edited alpha would scale what was learned."""
    lora = Workload.model_validate(run.workload).lora  # which completed_record has checked
    trained = AdapterConfig(
        peft_type="LORA",
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        use_rslora=lora.use_rslora,
    )
    modules = (name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight"))
    wanted = {name: (trained.rank(name), trained.scale(name)) for name in modules if trained.targets(name)}
    differing = sorted(name for name in wanted | actual if wanted.get(name) != actual.get(name))
    if differing:
        name = differing[0]
        raise DataError(
            f"{adapter_dir / CONFIG} is not what the run trained with: {name} has {_described(actual.get(name))}, "
            f"the run's config {_described(wanted.get(name))} ({len(differing)} of {len(wanted)} modules)",
            remedy="put the run's own adapter_config.json back (lora_alpha, r, use_rslora, target_modules)",
        )


def _described(change: tuple[int, float] | None) -> str:
    return "no factors" if change is None else f"rank {change[0]} and scale {change[1]:g}"
