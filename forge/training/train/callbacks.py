"""What happens around each optimizer step. Import only after the backend's ``prepare()``: it imports transformers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from forge.training.backends.job import TrainingJob
from forge.training.data.batching import step_order
from forge.training.system.errors import DivergedError
from forge.training.system.signals import StopRequest
from forge.training.train.health import SkippedSteps, SpikeDetector
from forge.training.train.metrics import Meter
from forge.training.train.saving import Saver, read_best, save_adapter

_MOST_DOCUMENTS_NAMED = 8


class StoppedEarly(Exception):
    """The patience was already used up when the run resumed: nothing is left to train."""


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Finite numbers, the step log, the best adapter, early stopping, saves by time, stops."""

    def __init__(
        self,
        trainer: Any,
        meter: Meter,
        saver: Saver,
        stop: StopRequest,
        on_step: Callable[[int, dict[str, Any]], None],
        announce: Callable[[str], None],
    ) -> None:
        self.trainer = trainer
        self.job: TrainingJob = trainer.job
        self.meter = meter
        self.saver = saver
        self.stop = stop
        self.on_step = on_step
        self.announce = announce
        self.figures: dict[str, Any] = {}
        self.validation: list[tuple[int, float]] = meter.validation
        self.best = read_best(self.job.run_dir / "best")
        self.rehearsal_seconds: float | None = None
        self.notes: list[str] = []
        self._spikes = SpikeDetector(meter.losses, self.job.workload.training.spike_limit)
        self._skipped = SkippedSteps()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.job.plan.rehearsal:
            self.rehearsal_seconds = self.trainer.rehearse(model)
            self.meter.phase("rehearsal")
        if self._evaluation_is_due(args, state):
            self.trainer.evaluate()
        if self.is_out_of_patience():
            raise StoppedEarly
        self.meter.resume_clock()

    def _evaluation_is_due(self, args: Any, state: Any) -> bool:
        """Whether the run was stopped between a step and its evaluation."""
        every, step = self.job.workload.training.evaluate_every_steps, state.global_step
        due = args.eval_strategy != "no" and every and step and step % every == 0
        return bool(due) and all(evaluated != step for evaluated, _ in self.validation)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop before a number that is not finite reaches the weights."""
        step, loss = state.global_step + 1, self.meter.step_loss()
        grads = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        norms = torch._foreach_norm(grads) if grads else []
        finite = bool(torch.isfinite(torch.stack([n.float() for n in norms])).all()) if norms else False
        if args.fp16 and math.isfinite(loss):
            self._skipped.note(step, is_finite=finite)  # the scaler leaves the weights alone
        elif not finite or not math.isfinite(loss):
            what = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
            raise DivergedError(
                f"step {step}: {what}; the adapter was not touched by this step. "
                f"Its documents: {self._documents(step)}",
                remedy="lower optimizer.learning_rate, or look at those documents",
            )
        line = self._spikes.watch(step, loss)
        if line is not None:
            self.notes.append(line)
            self.announce(line)

    def _documents(self, step: int) -> str:
        order = step_order(self.job.workload, len(self.job.train))
        names = [self.job.train.document_ids[i] for i in order[step - 1]]
        more = f" and {len(names) - _MOST_DOCUMENTS_NAMED} more" if len(names) > _MOST_DOCUMENTS_NAMED else ""
        return ", ".join(names[:_MOST_DOCUMENTS_NAMED]) + more

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_last = state.global_step >= self.job.num_steps
        self.figures = {"step": state.global_step, **self.meter.step_ended(is_last)}
        if is_last:
            return
        if self.stop.number is not None:
            control.should_evaluate = False  # the resume does it
            control.should_save = control.should_training_stop = True
        minutes = self.job.workload.training.save_every_minutes
        if minutes is not None and time.monotonic() - self.saver.last_saved >= 60 * minutes:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "grad_norm" in logs and self.figures:
            self.figures["grad_norm"] = float(logs["grad_norm"])
            self.figures["learning_rate"] = float(logs["learning_rate"])
            self.meter.write(self.figures)
            self.on_step(state.global_step, self.figures)
            self.figures = {}
        self.meter.resume_clock()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        loss = float(metrics["eval_loss"])
        if not math.isfinite(loss):
            raise DivergedError(
                f"the held-out loss at step {state.global_step} is {loss}",
                remedy="lower optimizer.learning_rate, or look at the held-out documents",
            )
        self.validation.append((state.global_step, loss))
        self.meter.write({"step": state.global_step, "validation_loss": loss})
        if self.best is None or loss < self.best[1]:
            self.best = (state.global_step, loss)
            save_adapter(self.trainer.model, self.job, self.job.run_dir / "best", self.best)
        if self.is_out_of_patience():
            control.should_training_stop = True
        self.meter.resume_clock()

    def is_out_of_patience(self) -> bool:
        """Whether held-out loss has not improved for as many evaluations as the workload waits."""
        patience, best = self.job.workload.training.early_stopping_patience, self.best
        if patience is None or best is None:
            return False
        return sum(step > best[0] for step, _ in self.validation) >= patience

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.resume_clock()
