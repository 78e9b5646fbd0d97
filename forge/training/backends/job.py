"""TrainingJob: one run's inputs, as every backend receives them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from forge.training.config.plan import Backend, Plan, num_steps
from forge.training.config.workload import Workload
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
    def accumulation(self) -> int:
        """Micro-batches an optimizer step."""
        return self.plan.accumulation(self.workload)
