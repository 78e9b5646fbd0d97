"""What an export will need and whether it can work, known before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence

from forge.training.adapter.merge import float32_bytes
from forge.training.config.quantizations import GGUF_TYPES, QUANTIZED
from forge.training.export.proof import reference_bytes
from forge.training.llamacpp.install import supported_architectures
from forge.training.models.digests import largest_weight
from forge.training.models.weights import ModelWeights
from forge.training.system.errors import ConfigurationError, DataError, MachineError

_MARGIN_BYTES = 64 << 20  # tokenizer, records, file system
_MARGIN_SHARE = 0.02
_LARGEST_FLOAT16 = 65504.0


def check_quantizations(quantizations: Sequence[str], *, imatrix: bool = True) -> None:
    """Raise :class:`ConfigurationError` unless each is known, stands once and has the importance matrix it needs."""
    unknown = [name for name in quantizations if name not in GGUF_TYPES]
    if unknown or not quantizations:
        message = f"unknown quantisation {unknown[0]!r}" if unknown else "no quantisation was asked for"
        raise ConfigurationError(message, remedy=f"choose from {', '.join(GGUF_TYPES)}")
    if len(set(quantizations)) != len(quantizations):
        raise ConfigurationError(f"a quantisation appears twice: {', '.join(quantizations)}")
    needy = [name for name in quantizations if GGUF_TYPES[name].needs_imatrix]
    if needy and not imatrix:
        raise ConfigurationError(f"{needy[0]} cannot be made without an importance matrix", remedy="add --imatrix auto")


def check_architecture(base: ModelWeights) -> None:
    """Raise :class:`MachineError` if llama.cpp's converter does not know the model's architecture."""
    names = base.config.get("architectures") or ["(none)"]
    known = supported_architectures()
    if names[0] not in known:
        raise MachineError(
            f"llama.cpp's converter does not support the architecture {names[0]} of {base.directory}",
            remedy="train from a base of an architecture that llama.cpp supports, such as Qwen2ForCausalLM",
        )


def check_row_sizes(base: ModelWeights, quantizations: Sequence[str]) -> None:
    """Raise :class:`ConfigurationError` where rows do not divide into a type's blocks.

    llama.cpp would then store those tensors in larger types, without an error and under the same name.
    """
    for quantization in quantizations:
        block = GGUF_TYPES[quantization].block
        names = [name for name, tensor in base.tensors.items() if len(tensor.shape) == 2 and tensor.shape[1] % block]
        if names:
            width = base.tensors[names[0]].shape[1]
            raise ConfigurationError(
                f"{quantization} needs rows of a multiple of {block} weights; {len(names)} tensors do not have them, "
                f"such as {names[0]} with {width}: llama.cpp would fall back to larger types",
                remedy="leave it out, choose q8_0 or f16, or accept the larger types with --allow-fallback",
            )


def source_type(base: ModelWeights, largest_merged: float | None = None) -> str:
    """What a quantised file is made from: f16, or bf16 where float16 cannot hold a weight. Reads the weights once.

    Both are of the same size; bf16 has float32's range and three bits less of precision. ``largest_merged``: the
    largest weight that the merge made. Raises :class:`DataError` for a base with a weight that is no number.
    """
    largest = largest_weight(base.directory)
    if not math.isfinite(largest.value):
        raise DataError(
            f"{largest.file}: {largest.tensor} holds {largest.value}, which is no weight",
            remedy="copy the base again, or take another one",
        )
    return "bf16" if max(largest.value, largest_merged or 0.0) > _LARGEST_FLOAT16 else "f16"


def check_range(base: ModelWeights, quantizations: Sequence[str]) -> str:
    """:func:`source_type`. Raises :class:`ConfigurationError` where f16 is asked for and cannot hold the weights."""
    source = source_type(base)
    if source == "bf16" and "f16" in quantizations:
        largest = largest_weight(base.directory)
        raise ConfigurationError(
            f"f16 cannot hold {largest.tensor} of {largest.file}: its largest value is {largest.value:g}, "
            f"float16 ends at {_LARGEST_FLOAT16:g}",
            remedy="take bf16 in its place; quantised files are made from bf16 then",
        )
    return source


def file_bytes(base: ModelWeights, quantization: str) -> int:
    """About how long a GGUF file of the base's size and of this type is."""
    return int(base.num_parameters * GGUF_TYPES[quantization].bits_per_weight / 8)


def peak_disk_bytes(
    base: ModelWeights,
    quantizations: Sequence[str],
    *,
    adapter_bytes: int,
    writes_merged: bool,
    keeps_merged: bool,
    has_source: bool = False,
) -> int:
    """The most bytes on disk at any time during an export, beside what is there already.

    ``has_source``: the 16-bit file that the others are quantised from is there already.
    """
    converted = [name for name in quantizations if name not in QUANTIZED]
    if any(name in QUANTIZED for name in quantizations) and "f16" not in converted and not has_source:
        converted.append("f16")  # or bf16, of the same size
    merged = base.num_bytes if writes_merged else 0
    while_converting = merged + sum(file_bytes(base, name) for name in converted)
    in_the_end = while_converting - (0 if keeps_merged else merged)
    in_the_end += sum(file_bytes(base, name) for name in quantizations if name in QUANTIZED)
    return with_margin(max(while_converting, in_the_end)) + 3 * adapter_bytes + reference_bytes(base)


def float32_peak_bytes(base: ModelWeights, quantizations: Sequence[str]) -> int:
    """The most bytes at any time of an export whose merge is in float32: the merge, its f32 file, then the files."""
    wide = float32_bytes(base)
    made = sum(file_bytes(base, name) for name in quantizations)
    return with_margin(2 * wide + made) + reference_bytes(base)


def with_margin(num_bytes: int) -> int:
    """Space for a write of about so many bytes: the estimate's error, tokenizer, records, the file system's own."""
    return int(num_bytes * (1 + _MARGIN_SHARE)) + _MARGIN_BYTES
