"""Which base, length and plan a machine can train: a conservative table, for `forge init`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forge.training.backends import Backend

_GIB = 1 << 30
# GiB of the card, from there: longest example in tokens and plan, for 7 billion parameters in 4 bits.
# unsloth: 2,048 tokens took 5.4 GiB on a card of 7 (docs/small-gpus.md); 24 GiB and more as genome_8k is measured.
_SMALL = {"micro_batch": 1, "mlp_tile_tokens": 2048, "loss_chunk_gib": 0.125}
_CARDS: dict[Backend, tuple[tuple[float, int, dict[str, Any]], ...]] = {
    "unsloth": (
        (22.0, 8192, {"micro_batch": 4, "mlp_tile_tokens": 8192, "loss_chunk_gib": 1.0}),
        (15.0, 8192, _SMALL),
        (10.0, 4096, _SMALL),
        (0.0, 2048, _SMALL),
    ),
    "trl": ((22.0, 4096, {"micro_batch": 1}), (15.0, 2048, {"micro_batch": 1}), (0.0, 512, {"micro_batch": 1})),
}
# GiB of the card, from there: the base, in 4 bits or not.
_BASES_4_BIT = ((6.5, "Qwen/Qwen2-7B-Instruct"), (4.0, "Qwen/Qwen2-1.5B-Instruct"), (2.5, "Qwen/Qwen2-0.5B-Instruct"))
_BASES_16_BIT = ((22.0, "Qwen/Qwen2-1.5B-Instruct"), (6.5, "Qwen/Qwen2-0.5B-Instruct"))
_CPU_LENGTH, _CPU_PLAN = 512, {"micro_batch": 4, "gradient_checkpointing": "none"}
_STANDINS_LIMIT = 4096  # tiny has so many positions


@dataclass(frozen=True)
class Layout:
    """What to write into a config and its plan. ``why``: one reason per dotted key of the config."""

    base: str
    quantization: str
    dtype: str
    optimizer: str
    max_length: int  # tokens
    plans: dict[Backend, dict[str, Any]]
    why: dict[str, str] = field(default_factory=dict)

    @property
    def is_trial(self) -> bool:
        """Whether the base is the small one that is made on the spot: every step works, and it knows little."""
        return self.base == "tiny"


def suggest_layout(
    gpu: Mapping[str, Any] | None, backend: Backend, *, has_bitsandbytes: bool, base: str | None = None
) -> Layout:
    """The base, precision, length and plan for a card (of :func:`describe_gpu`), or for a CPU where there is none.

    ``base``: the one that is wanted; by default the largest of Qwen2 that a card of that size trains, and ``tiny``
    without one. Nothing is measured or fetched.
    """
    card = (gpu["memory_total_bytes"] or 0) / _GIB if gpu else 0.0
    can_4_bit = gpu is not None and has_bitsandbytes
    chosen = base or next(
        (name for least, name in (_BASES_4_BIT if can_4_bit else _BASES_16_BIT) if card >= least), "tiny"
    )
    is_4_bit = can_4_bit and chosen not in ("tiny", "small")
    why = {"model.path": _why_base(gpu, card, base, can_4_bit)}
    if gpu is None:
        why["data.max_length"] = f"a CPU takes seconds per step: {_CPU_LENGTH} tokens"
        is_trial = chosen == "tiny"
        plan: dict[str, Any] = dict(_CPU_PLAN) if is_trial else {"micro_batch": 1}
        return Layout(chosen, "none", "float32", "adamw_torch", _CPU_LENGTH, {backend: plan}, why)
    has_bfloat16 = float(gpu["compute_capability"] or 8.0) >= 8.0
    # a table for 7 billion parameters: others take a share of the card in proportion
    room = card * 7.0 / max(_billions(chosen), 0.5) if is_4_bit else card
    _, length, plan = next(row for row in _CARDS.get(backend, _CARDS["trl"]) if room >= row[0])
    if not is_4_bit:
        length = min(length, 2048)
    if chosen == "tiny":
        length = min(length, _STANDINS_LIMIT)
    why["data.max_length"] = f"conservative for {backend} on {card:.1f} GiB; `forge context` measures how far it goes"
    why["model.dtype"] = "the card has bfloat16" if has_bfloat16 else "the card is older than Ampere: no bfloat16"
    return Layout(
        base=chosen,
        quantization="nf4" if is_4_bit else "none",
        dtype="bfloat16" if has_bfloat16 else "float16",
        optimizer="paged_adamw_8bit" if can_4_bit else "adamw_torch",
        max_length=length,
        plans={backend: dict(plan)},
        why=why,
    )


def _why_base(gpu: Mapping[str, Any] | None, card: float, base: str | None, can_4_bit: bool) -> str:
    if base is not None:
        return "as asked with --base"
    if gpu is None:
        return "no GPU: a small model made on the spot, to try every step; it will know little (--base names another)"
    if not can_4_bit:
        return f"{card:.1f} GiB without bitsandbytes, which requirements-gpu.txt holds: no 4 bits, so a small base"
    return f"the largest Qwen2 that {card:.1f} GiB train in 4 bits"


def _billions(base: str) -> float:
    """Parameters by the name, in billions: `Qwen2-1.5B` has 1.5; 7 where it does not say."""
    match = re.search(r"(\d+(?:\.\d+)?)\s*[bB](?![a-zA-Z])", base.rpartition("/")[2])
    return float(match[1]) if match else 7.0
