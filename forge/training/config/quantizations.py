"""The GGUF types that an export makes: the one table. Another type is another row."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from forge.training.system.errors import ConfigurationError

_HALVES = frozenset({"F16", "BF16"})
_LARGER = _HALVES | {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"}


@dataclass(frozen=True)
class GgufType:
    """A type of a whole file, in llama.cpp's words.

    ``tensor_type``: of most of its matrices, with ``block`` weights in a block. ``bits_per_weight``: of the whole file,
    its larger embeddings included. ``is_quantized``: made from the f16 file; the others are written by the converter.
    """

    tensor_type: str
    block: int
    bits_per_weight: float
    is_quantized: bool

    @property
    def fallbacks(self) -> frozenset[str]:
        """What llama.cpp stores instead, without an error, where a row does not divide into blocks."""
        return _LARGER if self.block > 32 else _HALVES if self.block > 1 else frozenset()


GGUF_TYPES = {
    "f32": GgufType("F32", 1, 32.0, is_quantized=False),
    "f16": GgufType("F16", 1, 16.0, is_quantized=False),
    "bf16": GgufType("BF16", 1, 16.0, is_quantized=False),
    "q8_0": GgufType("Q8_0", 32, 8.5, is_quantized=True),
    "q6_k": GgufType("Q6_K", 256, 6.6, is_quantized=True),
    "q5_k_m": GgufType("Q5_K", 256, 5.9, is_quantized=True),
    "q4_k_m": GgufType("Q4_K", 256, 5.1, is_quantized=True),
    "q3_k_m": GgufType("Q3_K", 256, 4.2, is_quantized=True),
    "q2_k": GgufType("Q2_K", 256, 3.6, is_quantized=True),
}
QUANTIZED = tuple(name for name, kind in GGUF_TYPES.items() if kind.is_quantized)


def gguf_type(name: Any) -> Any:
    """The table's name of a type as people write it: ``Q4_K_M`` and ``q4km`` are ``q4_k_m``.

    What is no text is returned as it is. Raises ``ValueError`` for an unknown type, with the nearest one.
    """
    if not isinstance(name, str):
        return name
    plain = _plain(name)
    known = {_plain(own): own for own in GGUF_TYPES}
    if plain in known:
        return known[plain]
    near = [own for short, own in known.items() if short[:2] == plain[:2]] or [
        known[match] for match in difflib.get_close_matches(plain[:60], known, 1)
    ]
    shown = name[:40] if name.isprintable() else repr(name)[:40]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"no GGUF type {shown} is made here; {hint}there are {', '.join(GGUF_TYPES)}")


def gguf_types(text: str) -> list[str]:
    """The types in a list with commas. Raises :class:`ConfigurationError` for an unknown one."""
    try:
        return [gguf_type(name.strip()) for name in text.split(",") if name.strip()]
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


if TYPE_CHECKING:
    Quantization = str
else:
    Quantization = Literal[tuple(GGUF_TYPES)]
