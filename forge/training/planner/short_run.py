"""A process that has a run's trainer after its first real step: adapter, optimizer state and kernels are there.

What measures layouts and lengths stands inside such a run and ends it when it is done.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.training.backends import Backend, load_backend, load_plan
from forge.training.backends.job import StepObserver, TrainingJob
from forge.training.config.plan import Plan
from forge.training.config.workload import load_workload
from forge.training.data.inputs import prepare_inputs
from forge.training.system.card import Card
from forge.training.system.errors import MachineError
from forge.training.system.oom import memory_that_ran_out
from forge.training.train.run import base_directory

_ALONE = (  # two steps are planned, the first is taken, and nothing else is done
    *("training.max_steps=2", "training.evaluate_every_steps=null", "training.early_stopping_patience=null"),
    *("training.save_every_steps=null", "training.save_every_minutes=null", "report_to=[]"),
    *("data.documents=null", "data.validation=null", "data.sample=null", "data.validation_share=0"),
)


class _Done(Exception):
    """All is measured."""


@dataclass(frozen=True)
class ShortRun:
    """How it was laid out, on what card (None: a CPU), and whether not even its first step fitted."""

    plan: Plan
    card: Card | None
    ran_out: bool


Look = Callable[[Any, Any, Path, Card | None], None]
"""Takes the trainer, its model, the base's directory and the card."""


def measure_in_short_run(
    workload_name: str,
    overrides: Sequence[str],
    backend: Backend,
    plan_overrides: Sequence[str],
    budget_bytes: int | None,
    look: Look,
    *,
    needs_gpu: str | None = None,
) -> ShortRun:
    """Take the first step of a config's run over short documents and have ``look`` measure.

    ``budget_bytes``: of the GPU that this process has from before the model is loaded; ``None``: the GPU as it is.
    ``needs_gpu``: what is measured, where a CPU will not do. Raises :class:`ConfigurationError` for a wrong config and
    :class:`MachineError` where the backend or the GPU is missing.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        own = [f"data.train={_short_documents(folder)}", *_ALONE]
        workload = load_workload(workload_name, [*overrides, *own])
        plan = load_plan(workload, backend, plan_overrides)
        module = load_backend(backend)
        module.refuse(workload, plan)
        import torch

        has_gpu = torch.cuda.is_available()
        if needs_gpu and not has_gpu:
            raise MachineError(f"{needs_gpu} is measured on a CUDA GPU and none is visible on this machine")
        base = base_directory(workload)
        module.prepare(plan)  # as a run does: before anything of CUDA begins
        card = Card(budget_bytes) if has_gpu else None
        with card or nullcontext():
            from transformers import TrainerCallback

            inputs = prepare_inputs(workload, base, folder / "run")
            job = TrainingJob(workload, plan, backend, base, folder / "run", inputs.train, None)

            class Callback(TrainerCallback):  # type: ignore[misc]
                def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
                    look(trainer, model, base, card)
                    raise _Done

            try:
                trainer = module.build(job, StepObserver())
                trainer.add_callback(Callback())
                with suppress(_Done):
                    trainer.train()
            except RuntimeError as error:
                if memory_that_ran_out(error) != "GPU":
                    raise
                return ShortRun(plan, card, ran_out=True)
    return ShortRun(plan, card, ran_out=False)


def _short_documents(folder: Path) -> Path:
    """Enough for the first steps at any effective batch in use."""
    path = folder / "short.jsonl"
    rows = [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
