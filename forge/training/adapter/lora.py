"""A PEFT LoRA adapter on disk: checked against its base to the last key, read, made canonical.

PEFT merges a wrong adapter with at most a warning: half the keys missing, all keys foreign, a
deeper base. Here each of these is an error. :func:`inspect_adapter` needs no torch and little
memory, so that :func:`check_adapter` can have it done in a child process before anything else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from forge.training.adapter.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from forge.training.llamacpp.parent import run_child, time_limit_seconds
from forge.training.models.weights import (
    FLOAT_DTYPES,
    ModelWeights,
    Tensor,
    read_float_values,
    read_shard,
    read_tensor,
    read_weights,
)
from forge.training.system.errors import DataError
from forge.training.system.files import atomic_file, write_json

WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_CHECK_BYTES = 2 << 30  # of address space: Python and numpy


@dataclass(frozen=True)
class Factors:
    """Where the two factors of one module's change lie: B @ A * scale, A (rank, in), B (out, rank)."""

    module: str
    rank: int
    scale: float
    a: Tensor
    b: Tensor

    @property
    def weight_name(self) -> str:
        """The base tensor that they change."""
        return f"{self.module}.weight"


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: ``factors`` by the name of the base tensor they change."""

    directory: Path
    config: AdapterConfig
    factors: Mapping[str, Factors]

    def read(self, factors: Factors) -> tuple[Any, Any]:
        """The values of A and B (torch, CPU)."""
        with open(self.directory / WEIGHTS, "rb") as stream:
            return read_tensor(stream, factors.a), read_tensor(stream, factors.b)


def check_adapter(adapter_dir: Path, base_dir: Path) -> dict[str, tuple[int, float]]:
    """Check an adapter in a child process with limits of time and memory; rank and scale by module.

    Raises :class:`DataError` as :func:`inspect_adapter`, :class:`CheckError` if the child dies or hangs of it.
    """
    num_bytes = _weights_file(adapter_dir).stat().st_size
    answer = run_child(
        "check_adapter",
        {"adapter_dir": str(adapter_dir.absolute()), "base_dir": str(base_dir.absolute())},
        doing=f"read the adapter {adapter_dir}",
        limit_seconds=time_limit_seconds(num_bytes),
        memory_limit_bytes=_CHECK_BYTES,
    )
    return {module: (int(rank), float(scale)) for module, (rank, scale) in answer.value["modules"].items()}


def describe_adapter(adapter_dir: str, base_dir: str) -> dict[str, Any]:
    """What :func:`check_adapter` has a child process answer, as plain JSON values."""
    inspected = inspect_adapter(Path(adapter_dir), read_weights(Path(base_dir)))
    return {"modules": {factors.module: [factors.rank, factors.scale] for factors in inspected.factors.values()}}


def inspect_adapter(adapter_dir: Path, base: ModelWeights) -> Adapter:
    """Check an adapter against its base, holding one stretch of a tensor in memory at a time.

    Raises :class:`DataError` for everything that plain LoRA, rsLoRA and rank or alpha patterns
    do not cover, and for missing, foreign, ill-shaped, non-finite or untrained factors.
    """
    config = read_adapter_config(adapter_dir)
    path = _weights_file(adapter_dir)
    tensors = {tensor.name: tensor for tensor in read_shard(path).tensors}
    odd = next((tensor for tensor in tensors.values() if tensor.dtype not in FLOAT_DTYPES), None)
    if odd is not None:
        raise DataError(f"{path}: {odd.name} is {odd.dtype}; only 16- and 32-bit factors are read")
    with open(path, "rb") as stream:
        sides = _find_factors(path, stream, tensors, base)
        _check_complete(adapter_dir, config, sides, base)
        factors = {}
        for module, pair in sorted(sides.items()):
            factor = Factors(module, config.rank(module), config.scale(module), pair["A"], pair["B"])
            _check_shapes(adapter_dir, factor, base)
            factors[factor.weight_name] = factor
        _check_values(path, stream, factors)
    return Adapter(directory=adapter_dir, config=config, factors=factors)


def write_canonical_adapter(adapter_dir: Path, base_dir: Path, out_dir: Path) -> None:
    """Rewrite an adapter so that its scale is lora_alpha / rank for every module, as llama.cpp computes it.

    rsLoRA and the patterns are folded into lora_B (float32). Raises :class:`DataError`, :class:`DiskError`.
    """
    from safetensors.torch import save

    adapter = inspect_adapter(adapter_dir, read_weights(base_dir))
    alpha = adapter.config.lora_alpha
    tensors = {}
    for factors in adapter.factors.values():
        a, b = adapter.read(factors)
        prefix = f"base_model.model.{factors.module}"
        tensors[f"{prefix}.lora_A.weight"] = a.float().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = (b.float() * (factors.scale * factors.rank / alpha)).contiguous()
    with atomic_file(out_dir / WEIGHTS, "wb") as stream:
        stream.write(save(tensors))
    folded = {"use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}}
    write_json(out_dir / CONFIG, {**adapter.config.model_dump(mode="json"), **folded})


def _weights_file(adapter_dir: Path) -> Path:
    path = adapter_dir / WEIGHTS
    if not path.is_file():
        raise DataError(f"{path} is missing", remedy="only safetensors adapters are read")
    return path


def _find_factors(
    path: Path, stream: IO[bytes], tensors: dict[str, Tensor], base: ModelWeights
) -> dict[str, dict[str, Tensor]]:
    """The factors by module and side. Whatever else there is must say nothing new."""
    sides: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        if match := _KEY.match(key):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
        elif not _is_base_weight(stream, tensor, base):
            foreign.append(key)
    for module in sides:
        if base.ties_embeddings and module.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise DataError(
                f"{path} changes {module}, but the base ties lm_head to the embedding: the change would land in both",
                remedy="leave lm_head and embed_tokens out of the LoRA targets",
            )
    if foreign:
        raise DataError(f"{path} holds {len(foreign)} tensors that are not LoRA factors: {foreign[0]:.200}, ...")
    return sides


def _is_base_weight(stream: IO[bytes], tensor: Tensor, base: ModelWeights) -> bool:
    """PEFT saves lm_head's own weight too where lm_head is a target; unchanged, it says nothing new."""
    name = tensor.name.removeprefix("base_model.model.").replace(".base_layer.weight", ".weight")
    own = base.tensors.get(name)
    if ".base_layer." not in tensor.name or own is None or own.dtype not in FLOAT_DTYPES or own.shape != tensor.shape:
        return False
    with open(base.file_of(own), "rb") as source:
        stretches = zip(read_float_values(stream, tensor), read_float_values(source, own), strict=True)
        return all(np.array_equal(given, wanted) for given, wanted in stretches)


def _check_complete(
    adapter_dir: Path, config: AdapterConfig, sides: dict[str, dict[str, Tensor]], base: ModelWeights
) -> None:
    modules = {name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")}
    foreign = sorted(set(sides) - modules)
    if foreign:
        message = f"{adapter_dir} belongs to another base: {base.directory} has no {foreign[0]:.200}"
        raise DataError(
            message + f" ({len(foreign)} of {len(sides)} modules)", remedy="name the base it was trained on"
        )
    halves = sorted(module for module, pair in sides.items() if set(pair) != {"A", "B"})
    if halves:
        raise DataError(f"{adapter_dir} is incomplete: {halves[0]} has only one of lora_A and lora_B")
    expected = {module for module in modules if config.targets(module)}
    missing = sorted(expected - set(sides))
    if missing:
        message = f"{adapter_dir} is incomplete: no factors for {missing[0]}"
        raise DataError(
            message + f" ({len(missing)} of {len(expected)} modules that {CONFIG} names)",
            remedy="name the base it was trained on: a deeper one has more modules; or train again",
        )
    unnamed = sorted(set(sides) - expected)
    if unnamed:
        raise DataError(f"{adapter_dir} holds factors for {unnamed[0]}, which {CONFIG} does not name")
    if not sides:
        raise DataError(f"{adapter_dir} changes nothing: it holds no factors")


def _check_shapes(adapter_dir: Path, factors: Factors, base: ModelWeights) -> None:
    a, b, rank = factors.a.shape, factors.b.shape, factors.rank
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise DataError(f"{adapter_dir}: {factors.module} has A {a}, B {b} where {CONFIG} says rank {rank}")
    shape = base.tensors[factors.weight_name].shape
    if shape != (b[0], a[1]):
        change = f"it changes {factors.module} by {(b[0], a[1])}, the base has {shape}"
        raise DataError(f"{adapter_dir} belongs to another base: {change}", remedy="name the base it was trained on")


def _check_values(path: Path, stream: IO[bytes], factors: Mapping[str, Factors]) -> None:
    untrained = []
    for factor in factors.values():
        for tensor in (factor.a, factor.b):
            if not all(bool(np.isfinite(values).all()) for values in read_float_values(stream, tensor)):
                raise DataError(
                    f"{path}: {tensor.name} holds NaN or infinity", remedy="the training diverged; train again"
                )
        if not any(bool(values.any()) for values in read_float_values(stream, factor.b)):
            untrained.append(factor.module)
    if untrained:
        share = "every lora_B" if len(untrained) == len(factors) else f"lora_B of {untrained[0]}"
        message = f"{path} was never trained: {share} is zero ({len(untrained)} of {len(factors)} modules)"
        raise DataError(message, remedy="train it first")
