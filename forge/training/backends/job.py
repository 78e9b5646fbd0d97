"""TrainingJob: one run's inputs, as every backend receives them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from forge.training.backends import Backend
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload
from forge.training.data.batching import all_micro_batches, num_steps
from forge.training.data.examples import Examples


@dataclass(frozen=True)
class TrainingJob:
    """``base_dir`` holds the 16-bit base model, ``run_dir`` everything the run leaves."""

    workload: Workload
    plan: Plan
    backend: Backend
    base_dir: Path
    run_dir: Path
    train: Examples
    validation: Examples | None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return num_steps(self.workload, len(self.train))

    @property
    def lengths(self) -> list[int]:
        """Tokens of every training example."""
        return [len(ids) for ids in self.train.input_ids]

    @cached_property
    def micro_batches(self) -> list[list[int]]:
        """The whole run's, in order: indices of examples."""
        return all_micro_batches(self.workload, self.plan, self.lengths)

    @property
    def accumulation(self) -> int:
        """Micro-batches an optimizer step."""
        return self.plan.accumulation(self.workload)
