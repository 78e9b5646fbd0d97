"""A run's examples as its trainer fetches them: the micro-batches in order, and what is largest among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from forge.training.backends.job import TrainingJob
from forge.training.config.plan import micro_batches, step_order
from forge.training.data.examples import Examples


class StepBatches(torch.utils.data.BatchSampler):  # type: ignore[misc]
    """The run's micro-batches in order: all of step 1, all of step 2, ... (indices of examples)."""

    def __init__(self, job: TrainingJob) -> None:
        lengths = np.array([len(ids) for ids in job.train.input_ids], dtype=np.int64)
        steps = step_order(job.workload, len(job.train))
        self._batches = [batch for step in steps for batch in micro_batches(step, lengths, job.plan)]
        super().__init__(range(len(job.train)), batch_size=job.plan.micro_batch, drop_last=False)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def largest_micro_batch(job: TrainingJob) -> list[int]:
    """The micro-batch of the run that takes most memory: by tokens, padding included where the plan pads."""
    lengths = [len(ids) for ids in job.train.input_ids]

    def size(batch: list[int]) -> int:
        longest = max(lengths[i] for i in batch)
        return sum(lengths[i] for i in batch) if job.plan.padding == "none" else longest * len(batch)

    return max(StepBatches(job), key=size)


def longest_document(batch: dict[str, Any]) -> int:
    """Tokens of a collated micro-batch's longest document, padding counted where there is any."""
    positions = batch.get("position_ids")
    return int(batch["input_ids"].shape[1]) if positions is None else int(positions.max()) + 1


def to_dataset(examples: Examples, max_length: int) -> Any:
    """The examples as a ``datasets.Dataset`` of ``input_ids`` and ``labels``."""
    from datasets import Dataset

    dataset = Dataset.from_dict({"input_ids": examples.input_ids, "labels": examples.labels})
    # Unsloth refuses padding-free batches unless somebody vouches that no row exceeds max_length
    dataset._unsloth_truncated_to = max_length
    return dataset
