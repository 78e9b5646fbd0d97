"""The GGUF types that an export makes: the one table. Another type is another row.

llama.cpp's TQ1_0, TQ2_0, Q1_0, Q2_0, MXFP4_MOE and NVFP4 are for weights that were trained in them, and not made here.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from forge.training.system.errors import ConfigurationError

_HALVES = frozenset({"F16", "BF16"})
_LARGER = _HALVES | {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"}
_BLOCKS_OF_32 = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"}


@dataclass(frozen=True)
class GgufType:
    """A type of a whole file, in llama.cpp's words.

    ``tensor_type``: of most of its matrices, with ``block`` weights in a block. ``bits_per_weight``: of the whole file,
    its larger embeddings included. ``is_quantized``: made from the unquantised file; the others are written by the
    converter. ``flagged_kl``, ``refused_kl``: mean KL of the trained adapter's predictions to the file's, in nats a
    token, above which the file is flagged or not handed out; what the merge's own rounding costs is allowed beside it.
    ``needs_imatrix``: llama.cpp refuses to make it without an importance matrix.
    """

    tensor_type: str
    block: int
    bits_per_weight: float
    is_quantized: bool
    flagged_kl: float
    refused_kl: float
    needs_imatrix: bool = False

    @property
    def fallbacks(self) -> frozenset[str]:
        """What llama.cpp stores instead, without an error, where a row does not divide into blocks."""
        if self.block > 32:
            return _LARGER
        return _HALVES if self.block > 1 else frozenset()

    @property
    def uses_imatrix(self) -> bool:
        """Whether an importance matrix changes the file."""
        return self.is_quantized and self.tensor_type != "Q8_0"


def _exact(tensor_type: str, bits: float, flagged_kl: float, refused_kl: float) -> GgufType:
    return GgufType(tensor_type, 1, bits, False, flagged_kl, refused_kl)


def _quantized(
    tensor_type: str, bits: float, flagged_kl: float, refused_kl: float, *, needs_imatrix: bool = False
) -> GgufType:
    block = 32 if tensor_type in _BLOCKS_OF_32 else 256
    return GgufType(tensor_type, block, bits, True, flagged_kl, refused_kl, needs_imatrix)


# The limits: a file that is flagged has lost more than such a file usually does (docs/export.md has what small models
# lose, which is the most); one that is refused is broken.
GGUF_TYPES = {
    "f32": _exact("F32", 32.0, 3e-5, 1e-4),
    "f16": _exact("F16", 16.0, 3e-5, 1e-4),
    "bf16": _exact("BF16", 16.0, 5e-3, 0.1),
    "q8_0": _quantized("Q8_0", 8.5, 5e-3, 0.05),
    "q6_k": _quantized("Q6_K", 6.6, 0.01, 0.1),
    "q5_k_m": _quantized("Q5_K", 5.9, 0.03, 0.2),
    "q5_k_s": _quantized("Q5_K", 5.7, 0.03, 0.2),
    "q5_1": _quantized("Q5_1", 6.1, 0.03, 0.2),
    "q5_0": _quantized("Q5_0", 5.7, 0.03, 0.2),
    "q4_k_m": _quantized("Q4_K", 5.1, 0.1, 0.6),
    "q4_k_s": _quantized("Q4_K", 4.8, 0.1, 0.6),
    "q4_1": _quantized("Q4_1", 5.2, 0.1, 0.6),
    "q4_0": _quantized("Q4_0", 4.8, 0.15, 0.6),
    "iq4_nl": _quantized("IQ4_NL", 4.8, 0.1, 0.6),
    "iq4_xs": _quantized("IQ4_XS", 4.6, 0.1, 0.6),
    "q3_k_l": _quantized("Q3_K", 4.4, 0.3, 1.5),
    "q3_k_m": _quantized("Q3_K", 4.2, 0.3, 1.5),
    "q3_k_s": _quantized("Q3_K", 3.8, 0.4, 1.5),
    "iq3_m": _quantized("IQ3_S", 4.0, 0.4, 1.5),
    "iq3_s": _quantized("IQ3_S", 3.8, 0.4, 1.5),
    "iq3_xs": _quantized("IQ3_S", 3.7, 0.4, 1.5),
    "iq3_xxs": _quantized("IQ3_XXS", 3.5, 0.5, 2.0),
    "q2_k": _quantized("Q2_K", 3.6, 0.8, 3.0),
    "q2_k_s": _quantized("Q2_K", 3.3, 0.8, 3.0, needs_imatrix=True),
    "iq2_m": _quantized("IQ2_S", 3.4, 0.8, 3.0, needs_imatrix=True),
    "iq2_s": _quantized("IQ2_XS", 3.2, 1.0, 3.0, needs_imatrix=True),
    "iq2_xs": _quantized("IQ2_XS", 3.1, 1.0, 4.0, needs_imatrix=True),
    "iq2_xxs": _quantized("IQ2_XXS", 2.9, 1.5, 4.0, needs_imatrix=True),
    "iq1_m": _quantized("IQ1_M", 2.6, 2.0, 6.0, needs_imatrix=True),
    "iq1_s": _quantized("IQ1_S", 2.4, 2.0, 6.0, needs_imatrix=True),
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
