"""Which examples each optimizer step trains on, how they are laid out in micro-batches, and the largest of those.

No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from forge.training.config.plan import LONG_DOCUMENT_TOKENS, Plan
from forge.training.config.workload import Workload


def num_steps(workload: Workload, num_examples: int) -> int:
    """Optimizer steps of a whole run. The last may hold fewer than ``effective_batch`` examples."""
    training = workload.training
    if training.max_steps is not None:
        return training.max_steps
    total = int(np.ceil(num_examples * training.epochs))
    return max(1, int(np.ceil(total / training.effective_batch)))


def step_order(workload: Workload, num_examples: int) -> list[np.ndarray]:
    """Which examples each optimizer step trains on: int64 arrays of shape (effective_batch,).

    Epochs are shuffles of all examples, joined into one stream and cut into steps, so a step may
    straddle two epochs and none is short but the last. The same for every backend and plan.
    """
    training = workload.training
    steps, size = num_steps(workload, num_examples), training.effective_batch
    total = steps * size
    if training.max_steps is None:
        total = min(total, int(np.ceil(num_examples * training.epochs)))
    generator = np.random.Generator(np.random.PCG64(training.seed))
    stream = np.concatenate([generator.permutation(num_examples) for _ in range(-(-total // num_examples))])
    return [stream[i : min(i + size, total)] for i in range(0, total, size)]


def micro_batches(step: np.ndarray, lengths: np.ndarray, plan: Plan) -> list[list[int]]:
    """Lay one step's examples out: lists of example indices, ceil(step size / ``micro_batch``) of them.

    ``lengths``: tokens of every example, int64 of shape (examples,). Grouped, the largest micro-batch
    comes first (memory is claimed once). By tokens each example goes, longest first, to the
    micro-batch that holds fewest (Graham 1969: at most 4/3 of the least possible maximum), so a
    document longer than all others of its step together stays alone.
    """
    indices = [int(i) for i in step]
    if plan.micro_batch_tokens is not None:
        return _filled(indices, lengths, plan.micro_batch_tokens)
    if plan.grouping != "none":
        indices.sort(key=lambda i: (-int(lengths[i]), i))
    if plan.grouping != "tokens":
        return [indices[i : i + plan.micro_batch] for i in range(0, len(indices), plan.micro_batch)]
    groups: list[list[int]] = [[] for _ in range(-(-len(indices) // plan.micro_batch))]
    totals = [0] * len(groups)
    for index in indices:
        least = totals.index(min(totals))
        groups[least].append(index)
        totals[least] += int(lengths[index])
    return [group for _, group in sorted(zip(totals, groups, strict=True), key=lambda pair: -pair[0])]


def _filled(indices: list[int], lengths: np.ndarray, num_tokens: int) -> list[list[int]]:
    """First fit, longest first. A long document stays alone: attention's kernel is chosen by the longest."""
    groups: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (-int(lengths[i]), i)):
        length = int(lengths[index])
        for group in groups:
            held = [int(lengths[i]) for i in group]
            if max(held) < LONG_DOCUMENT_TOKENS and sum(held) + length <= num_tokens:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def step_micro_batches(workload: Workload, plan: Plan, lengths: Sequence[int]) -> list[list[list[int]]]:
    """A whole run's micro-batches by optimizer step (indices of examples). ``lengths``: tokens of every example."""
    sizes = np.array(lengths, dtype=np.int64)
    return [micro_batches(step, sizes, plan) for step in step_order(workload, len(sizes))]


def largest_micro_batch(batches: Sequence[list[int]], lengths: Sequence[int], plan: Plan) -> list[int]:
    """Of a run's micro-batches the one that takes most memory: by tokens, padding included where the plan pads."""

    def size(batch: list[int]) -> int:
        longest = max(lengths[i] for i in batch)
        return sum(lengths[i] for i in batch) if plan.padding == "none" else longest * len(batch)

    return max(batches, key=size)


def longest_document(batch: dict[str, Any]) -> int:
    """Tokens of a collated micro-batch's longest document, padding counted where there is any."""
    positions = batch.get("position_ids")
    return int(batch["input_ids"].shape[1]) if positions is None else int(positions.max()) + 1
