"""What every backend receives: one run's inputs, and whom its trainer tells of its steps. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from forge.training.config.plan import Plan
from forge.training.config.workload import Workload
from forge.training.data.batching import num_steps, step_micro_batches
from forge.training.data.examples import Examples


@dataclass(frozen=True)
class TrainingJob:
    """``base_dir`` holds the 16-bit base model, ``run_dir`` everything the run leaves.

    ``first_adapter``: the safetensors file of the adapter that is trained on; ``None``: a new one.
    ``template_date``: the day that a dated chat template says, ISO 8601.
    """

    workload: Workload
    plan: Plan
    backend: str
    base_dir: Path
    run_dir: Path
    train: Examples
    validation: Examples | None
    first_adapter: Path | None = None
    template_date: str | None = None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return num_steps(self.workload, len(self.train))

    @property
    def lengths(self) -> list[int]:
        """Tokens of every training example."""
        return [len(ids) for ids in self.train.input_ids]

    @cached_property
    def steps(self) -> list[list[list[int]]]:
        """The whole run's micro-batches by optimizer step: indices of examples."""
        return step_micro_batches(self.workload, self.plan, self.lengths)

    @cached_property
    def micro_batches(self) -> list[list[int]]:
        """The whole run's, in order: indices of examples."""
        return [batch for step in self.steps for batch in step]

    @property
    def accumulation(self) -> int:
        """What the trainer fetches per optimizer step."""
        return self.plan.accumulation(self.workload)


@dataclass(frozen=True)
class StepObserver:
    """What a trainer calls around its steps. The trainer holds it from its construction; it holds no trainer.

    The defaults observe nothing: for a measurement that takes steps and is no run.
    """

    begin: Callable[[int, Callable[[], float], Callable[[], object]], object] = lambda *_: None
    """Once, before the first step of this process: steps done so far, the trainer's rehearsal and its evaluation."""
    fetched: Callable[..., object] = lambda *_: None
    """For what was collated at once, one micro-batch or all of a step; it may be fetched ahead of its step."""
    add_loss: Callable[[Any], object] = lambda _: None
    """For every micro-batch's share of its step's loss: a detached scalar on its device."""
    saving: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()
    """Around the save of a checkpoint, given its step."""
    is_stop_requested: Callable[[], bool] = lambda: False
    """Whether the run is to end after this step."""
