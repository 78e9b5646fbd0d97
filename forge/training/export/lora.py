"""A PEFT LoRA adapter on disk: read, checked against its base to the last key, made canonical.

PEFT merges a wrong adapter with at most a warning: half the keys missing, all keys foreign, a
deeper base. Here each of these is an error. Names and rules are those of peft 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.training.errors import DataError
from forge.training.export.weights import (
    FLOAT_DTYPES,
    ModelWeights,
    read_tensor_by_name,
    read_weights,
)
from forge.training.files import read_json_object, write_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_MERGE_INSTEAD = "train with plain LoRA; this export carries nothing else"

# Fields of adapter_config.json that say nothing about the mathematics of the trained weights.
_NEUTRAL = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config"),
    *("eva_config", "ensure_weight_tying"),
}
# Fields that this module implements.
_UNDERSTOOD = {
    *("r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "bias", "init_lora_weights"),
}
# Initialisations that leave the base weights alone. PiSSA, OLoRA, CorDA, LoftQ and others change them.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", None)


@dataclass(frozen=True)
class Pair:
    """The two factors of one module's change: B @ A * scale, A (rank, in), B (out, rank)."""

    module: str
    rank: int
    scale: float
    a: Any  # torch.Tensor
    b: Any

    @property
    def weight_name(self) -> str:
        """The base tensor that the pair changes."""
        return f"{self.module}.weight"


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: ``pairs`` by the name of the base tensor they change."""

    directory: Path
    config: dict[str, Any]
    pairs: Mapping[str, Pair]


def read_adapter(adapter_dir: Path, base: ModelWeights) -> Adapter:
    """Read an adapter and check it against its base.

    Raises :class:`DataError` for everything that plain LoRA, rsLoRA and rank or alpha patterns
    do not cover, and for missing, foreign, ill-shaped, non-finite or untrained factors.
    """
    config = read_json_object(adapter_dir / CONFIG)
    _check_config(adapter_dir, config)
    factors = _read_factors(adapter_dir, config, base)
    _check_complete(adapter_dir, config, factors, base)
    pairs = {}
    for module, sides in sorted(factors.items()):
        pair = _make_pair(adapter_dir, config, module, sides["A"], sides["B"])
        _check_shapes(adapter_dir, pair, base)
        pairs[pair.weight_name] = pair
    if not any(bool(pair.b.any()) for pair in pairs.values()):
        raise DataError(f"{adapter_dir} was never trained: every lora_B is zero", remedy="train it first")
    return Adapter(directory=adapter_dir, config=config, pairs=pairs)


def write_canonical_adapter(adapter_dir: Path, base_dir: Path, out_dir: Path) -> None:
    """Rewrite an adapter so that its scale is lora_alpha / rank for every module, as llama.cpp computes it.

    rsLoRA and the patterns are folded into lora_B (float32). Raises :class:`DataError`.
    """
    from safetensors.torch import save_file

    adapter = read_adapter(adapter_dir, read_weights(base_dir))
    alpha = float(adapter.config["lora_alpha"])
    tensors = {}
    for pair in adapter.pairs.values():
        prefix = f"base_model.model.{pair.module}"
        tensors[f"{prefix}.lora_A.weight"] = pair.a.float().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = (pair.b.float() * (pair.scale * pair.rank / alpha)).contiguous()
    out_dir.mkdir(parents=True)
    save_file(tensors, out_dir / WEIGHTS)
    folded = {"use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}, "base_model_name_or_path": None}
    write_json(out_dir / CONFIG, {**adapter.config, **folded})


def _check_config(adapter_dir: Path, config: dict[str, Any]) -> None:
    def refuse(what: str) -> DataError:
        return DataError(f"{adapter_dir / CONFIG}: {what}", remedy=_MERGE_INSTEAD)

    if config.get("peft_type") != "LORA":
        raise refuse(f"peft_type is {config.get('peft_type')!r}, not 'LORA'")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or not config[key] > 0:
            raise refuse(f"{key} is {config.get(key)!r}, not a positive number")
    if config.get("bias", "none") != "none":
        raise refuse(f"bias is {config['bias']!r}: trained biases cannot be merged")
    if config.get("init_lora_weights", True) not in _INITIALISATIONS:
        raise refuse(f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base weights too")
    unknown = sorted(key for key, value in config.items() if value and key not in _NEUTRAL | _UNDERSTOOD)
    if unknown:
        listed = ", ".join(f"{key} = {config[key]!r:.60}" for key in unknown)
        raise refuse(f"uses what cannot be merged: {listed}")


def _read_factors(adapter_dir: Path, config: dict[str, Any], base: ModelWeights) -> dict[str, dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = adapter_dir / WEIGHTS
    if not path.is_file():
        raise DataError(f"{path} is missing", remedy="only safetensors adapters are read")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a complete safetensors file: {error}") from error
    factors: dict[str, dict[str, Any]] = {}
    foreign = []
    for key, tensor in tensors.items():
        if match := _KEY.match(key):
            if not bool(tensor.isfinite().all()):
                raise DataError(f"{path}: {key} holds NaN or infinity", remedy="the training diverged; train again")
            factors.setdefault(match["module"], {})[match["side"]] = tensor
        elif not _is_base_weight(key, tensor, base):
            foreign.append(key)
    for module in factors:
        if base.ties_embeddings and module.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise DataError(
                f"{path} changes {module}, but the base ties lm_head to the embedding: the change would land in both",
                remedy="leave lm_head and embed_tokens out of the LoRA targets",
            )
    if foreign:
        raise DataError(f"{path} holds {len(foreign)} tensors that are not LoRA factors: {foreign[0]}, ...")
    return factors


def _is_base_weight(key: str, tensor: Any, base: ModelWeights) -> bool:
    """PEFT saves lm_head's own weight too where lm_head is a target; unchanged, it says nothing new."""
    import torch

    name = key.removeprefix("base_model.model.").replace(".base_layer.weight", ".weight")
    if ".base_layer." not in key or name not in base.tensors or base.tensors[name].dtype not in FLOAT_DTYPES:
        return False
    return bool(torch.equal(tensor.float(), read_tensor_by_name(base, name).float()))


def _check_complete(
    adapter_dir: Path, config: dict[str, Any], factors: dict[str, dict[str, Any]], base: ModelWeights
) -> None:
    modules = [name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]
    expected = {module for module in modules if _is_target(config, module)}
    foreign = sorted(set(factors) - set(modules))
    if foreign:
        message = f"{adapter_dir} belongs to another base: {base.directory} has no {foreign[0]}"
        raise DataError(
            message + f" ({len(foreign)} of {len(factors)} modules)", remedy="name the base it was trained on"
        )
    halves = sorted(module for module, sides in factors.items() if set(sides) != {"A", "B"})
    if halves:
        raise DataError(f"{adapter_dir} is incomplete: {halves[0]} has only one of lora_A and lora_B")
    missing = sorted(expected - set(factors))
    if missing:
        message = f"{adapter_dir} is incomplete: no factors for {missing[0]}"
        raise DataError(message + f" ({len(missing)} of {len(expected)} modules that {CONFIG} names)")
    unnamed = sorted(set(factors) - expected)
    if unnamed:
        raise DataError(f"{adapter_dir} holds factors for {unnamed[0]}, which {CONFIG} does not name")


def _is_target(config: dict[str, Any], module: str) -> bool:
    """PEFT's own rule, tuners_utils.check_target_module_exists, for the fields accepted here."""
    if _matches(config.get("exclude_modules"), module) or not _matches(config.get("target_modules"), module):
        return False
    layers = config.get("layers_to_transform")
    if layers is None:
        return True
    number = re.search(r"\.layers\.(\d+)\.", module)
    return number is not None and int(number[1]) in ([layers] if isinstance(layers, int) else layers)


def _matches(patterns: Any, module: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in patterns or ())


def _make_pair(adapter_dir: Path, config: dict[str, Any], module: str, a: Any, b: Any) -> Pair:
    rank = int(_of_pattern(config.get("rank_pattern"), module, config["r"]))
    alpha = float(_of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
        raise DataError(f"{adapter_dir}: {module} has {shapes} where {CONFIG} says rank {rank}")
    return Pair(module, rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank, a, b)


def _of_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule, peft.utils.get_pattern_key: the first pattern that matches the end of the name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_shapes(adapter_dir: Path, pair: Pair, base: ModelWeights) -> None:
    shape = base.tensors[pair.weight_name].shape
    change = (pair.b.shape[0], pair.a.shape[1])
    if shape != change:
        message = f"{adapter_dir} belongs to another base: it changes {pair.module} by {change}, the base has {shape}"
        raise DataError(message, remedy="name the base it was trained on")
