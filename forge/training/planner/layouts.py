"""Which layouts there are for a run's steps, and which of them should be fastest within a budget.

No torch here: a layout is judged by the models of memory and speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from forge.training.config.plan import Plan
from forge.training.data.batching import micro_batches
from forge.training.planner.memory import MemoryModel
from forge.training.planner.speed import SpeedModel

_GIB = 1 << 30
MICRO_BATCH_TOKENS = (2048, 4096, 8192, 16384, 32768)
TILES = (None, 8192, 4096, 2048, 1024)
SAFE = 0.97  # of the budget: what a prediction may reach. Allocators lose a little between their blocks


@dataclass(frozen=True)
class Work:
    """A run's optimizer steps: tokens of the documents of each."""

    steps: tuple[tuple[int, ...], ...]
    _laid_out: dict[Any, list[tuple[int, ...]]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_documents(self) -> int:
        """Of all steps."""
        return sum(len(step) for step in self.steps)

    def micro_batches(self, plan: Plan) -> list[tuple[int, ...]]:
        """Lengths of the documents of each micro-batch of the run under a plan."""
        key = plan.micro_batch_tokens, plan.micro_batch, plan.grouping
        if key not in self._laid_out:
            self._laid_out[key] = self._lay_out(plan)
        return self._laid_out[key]

    def _lay_out(self, plan: Plan) -> list[tuple[int, ...]]:
        found = []
        for step in self.steps:
            lengths = np.array(step, dtype=np.int64)
            batches = micro_batches(np.arange(len(step)), lengths, plan)
            found += [tuple(sorted((step[i] for i in batch), reverse=True)) for batch in batches]
        return found

    def largest(self, plan: Plan) -> tuple[int, ...]:
        """Of the micro-batches under a plan the one that holds most tokens, padding counted where the plan pads."""
        return max(self.micro_batches(plan), key=lambda batch: num_tokens(batch, plan))


def num_tokens(batch: Sequence[int], plan: Plan) -> int:
    """Tokens of a micro-batch given by its documents' lengths, padding counted where the plan pads."""
    return sum(batch) if plan.padding == "none" else max(batch) * len(batch)


@dataclass(frozen=True)
class Layout:
    """A plan of Forge's layers with what the models say of it."""

    plan: Plan
    peak_bytes: int
    seconds: float  # of all micro-batches of the run

    def differs(self, other: Layout) -> bool:
        """Whether more than a detail: what is kept, by how much, or how many tokens go together."""
        mine, its = self.plan, other.plan
        return (mine.micro_batch_tokens, mine.gradient_checkpointing, mine.dequantize_once) != (
            its.micro_batch_tokens,
            its.gradient_checkpointing,
            its.dequantize_once,
        )


def layouts(
    work: Work, start: Plan, fixed: Sequence[str], memory: MemoryModel, speed: SpeedModel, budget_bytes: int
) -> list[Layout]:
    """Those that fit, the fastest first. ``fixed``: keys of ``start`` that are the user's and stay.

    ``budget_bytes``: what may be allocated. Where none fits, the one that takes least.
    """
    found, least = [], None
    seen: set[str] = set()
    for plan in _plans(work, start, fixed, memory, budget_bytes):
        key = plan.model_dump_json()
        if key in seen:
            continue
        seen.add(key)
        layout = judged(plan, work, memory, speed)
        if layout.peak_bytes <= SAFE * budget_bytes:
            found.append(layout)
        if least is None or layout.peak_bytes < least.peak_bytes:
            least = layout
    return sorted(found, key=lambda layout: layout.seconds) or ([least] if least else [])


def judged(plan: Plan, work: Work, memory: MemoryModel, speed: SpeedModel) -> Layout:
    """A plan with its predicted peak and seconds."""
    batches = work.micro_batches(plan)
    tokens = [num_tokens(batch, plan) for batch in batches]
    offload = plan.gradient_checkpointing == "offload"
    seconds = sum(
        speed.seconds(
            total,
            sum(n * n for n in batch),
            memory.num_kept(plan, total),
            plan.mlp_tile_tokens,
            offload,
            plan.dequantize_once,
        )
        for batch, total in zip(batches, tokens, strict=True)
    )
    return Layout(plan, memory.peak_bytes(plan, tokens), seconds)


def _plans(work: Work, start: Plan, fixed: Sequence[str], memory: MemoryModel, budget_bytes: int) -> Iterator[Plan]:
    longest_step = max(sum(step) for step in work.steps)
    together = [n for n in MICRO_BATCH_TOKENS if n < longest_step]
    choices: dict[str, Sequence[Any]] = {
        "micro_batch_tokens": [*together, _rounded_up(longest_step)],
        "mlp_tile_tokens": TILES,
        "gradient_checkpointing": ("none", "full") if memory.is_on_host else ("none", "full", "offload"),
        "dequantize_once": (False, True) if memory.sizes.is_nf4 else (False,),
    }
    for key in fixed:
        if key in choices:
            choices[key] = (getattr(start, key),)
    for values in product(*choices.values()):
        plan = start.model_copy(update=dict(zip(choices, values, strict=True)))
        if "kept_activations_gib" in fixed:
            yield plan
        elif plan.gradient_checkpointing == "none":
            yield plan.model_copy(update={"kept_activations_gib": None})
        else:
            plan = plan.model_copy(update={"kept_activations_gib": _most_kept(plan, work, memory, budget_bytes)})
            largest = num_tokens(work.largest(plan), plan)
            if memory.num_kept(plan, largest) < memory.sizes.num_layers:  # else it is "none" by another name
                yield plan


def _most_kept(plan: Plan, work: Work, memory: MemoryModel, budget_bytes: int) -> float:
    """GiB of activations that can be kept within the budget, to a quarter."""
    tokens = [num_tokens(batch, plan) for batch in work.micro_batches(plan)]
    low, high = 0, int(4 * budget_bytes / _GIB) + 1  # quarters: fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        trial = plan.model_copy(update={"kept_activations_gib": middle / 4})
        if memory.peak_bytes(trial, tokens) <= SAFE * budget_bytes:
            low = middle
        else:
            high = middle
    return low / 4


def _rounded_up(tokens: int) -> int:
    """To the next power of two: a plan for people."""
    return 1 << (tokens - 1).bit_length()
