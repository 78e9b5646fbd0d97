"""What happens around each optimizer step. Import only after the backend's ``prepare()``: it imports transformers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from forge.training.backends.job import TrainingJob
from forge.training.data.batching import step_order
from forge.training.data.records import several
from forge.training.system.errors import DivergedError, ForgeError
from forge.training.system.signals import StopRequest
from forge.training.train.checkpoint import Saver, read_best, save_adapter
from forge.training.train.metrics import Meter
from forge.training.train.record import RunRecord
from forge.training.train.samples import Question, choose_question, sample_answer

if TYPE_CHECKING:
    from forge.training.train.run import Listener

SPIKE_FACTOR = 2.0  # times the median: what llm-foundry's KillLossSpike takes of a running mean
SPIKE_WINDOW = 32  # steps
FEWEST_STEPS = 8  # before any loss is called a spike
# PyTorch's scaler begins at 2^16 and halves at every skip: past 24 in a row the scale is not the cause
MOST_SKIPPED = 24


class StoppedEarly(Exception):
    """The patience was already used up when the run resumed: nothing is left to train."""


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Finite numbers, the step log, the best adapter, early stopping, saves by time, stops."""

    def __init__(
        self,
        job: TrainingJob,
        meter: Meter,
        saver: Saver,
        stop: StopRequest,
        listener: Listener,
    ) -> None:
        self.job, self.meter, self.saver, self.stop = job, meter, saver, stop
        self.listener = listener
        self.figures: dict[str, Any] = {}
        self.best = read_best(job.run_dir / "best")
        self._rehearsal_seconds: float | None = None
        self._notes: list[str] = []
        self._spikes = SpikeDetector(meter.losses, job.workload.training.spike_limit)
        self._skipped = SkippedSteps()
        self._question: Question | None = None

    def begin(self, step: int, rehearse: Callable[[], float], evaluate: Callable[[], object]) -> None:
        """Before the first step: :attr:`~forge.training.backends.job.StepObserver.begin`."""
        if self.job.plan.rehearsal:
            self._rehearsal_seconds = rehearse()
            self.meter.phase("rehearsal")
        try:
            self._question = choose_question(self.job)
        except ForgeError as error:
            self.listener.announce(f"no sample answers: {error.message}")
        if self._evaluation_is_due(step):
            evaluate()
        if self.is_out_of_patience():
            raise StoppedEarly
        self.meter.resume_clock()

    def _evaluation_is_due(self, step: int) -> bool:
        """Whether the run was stopped between a step and its evaluation."""
        every = self.job.workload.training.evaluate_every_steps
        due = every and self.job.validation is not None and step and step % every == 0
        return bool(due) and all(evaluated != step for evaluated, _ in self.meter.validation)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Stop before a number that is not finite reaches the weights."""
        step, loss = state.global_step + 1, self.meter.step_loss()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
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
            self._notes.append(line)
            self.listener.announce(line)

    def _documents(self, step: int) -> str:
        order = step_order(self.job.workload, len(self.job.train))
        names = [self.job.train.document_ids[i] for i in order[step - 1]]
        return several(names, most=8)

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
            self.listener.on_step(state.global_step, self.figures)
            self.figures = {}
            if control.should_evaluate:
                self.listener.on_evaluating(len(self.job.validation or ()))
        self.meter.resume_clock()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, *, metrics: dict[str, float], model: Any, **_: Any
    ) -> None:
        loss = float(metrics["eval_loss"])
        if not math.isfinite(loss):
            raise DivergedError(
                f"the held-out loss at step {state.global_step} is {loss}",
                remedy="lower optimizer.learning_rate, or look at the held-out documents",
            )
        self.meter.validation.append((state.global_step, loss))
        self.meter.write({"step": state.global_step, "validation_loss": loss})
        if self.best is None or loss < self.best[1]:
            self.best = (state.global_step, loss)
            save_adapter(model, self.job, self.job.run_dir / "best", self.best)
        self.listener.on_evaluation(state.global_step, loss, self.best)
        self._ask(state.global_step, model)
        if self.is_out_of_patience():
            control.should_training_stop = True
        self.meter.resume_clock()

    def _ask(self, step: int, model: Any) -> None:
        """A sample answer for people: whatever goes wrong with it ends the samples and not the run."""
        if self._question is None:
            return
        try:
            answer = sample_answer(model, self._question, lambda: self.stop.number is not None)
        except Exception as error:
            self._question = None
            self.listener.announce(f"no sample answers from here on: {type(error).__name__}: {error}"[:300])
            return
        if answer is not None:
            self.meter.write({"step": step, "question": self._question.text, "answer": answer})
            self.listener.on_sample(step, self._question.text, answer)

    def is_out_of_patience(self) -> bool:
        """Whether held-out loss has not improved for as many evaluations as the config waits."""
        patience, best = self.job.workload.training.early_stopping_patience, self.best
        if patience is None or best is None:
            return False
        return sum(step > best[0] for step, _ in self.meter.validation) >= patience

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.resume_clock()

    def fill(self, record: RunRecord) -> None:
        """Put what was seen around the steps into the run's record."""
        record.timing.rehearsal_seconds = self._rehearsal_seconds
        record.notes += self._notes
        if self.meter.validation:
            record.losses.first_validation_loss = self.meter.validation[0][1]
            record.losses.last_validation_loss = self.meter.validation[-1][1]
            if self.best is not None:
                record.losses.best_step, record.losses.best_validation_loss = self.best


class SpikeDetector:
    """Watches a run's step losses (nats per trained token), those before a resume included.

    A spike is a loss of more than twice the median of the last 32 steps, once there are eight. It never
    counts towards the median, so a loss that stays up stays a spike. ``limit``: so many in a row end the run.
    """

    def __init__(self, losses: Iterable[float], limit: int | None) -> None:
        self._losses: list[float] = []
        self._in_a_row = 0
        self._limit = limit
        for loss in losses:
            self._note(loss)

    def watch(self, step: int, loss: float) -> str | None:
        """A line about a spike, ``None`` for none. Raises :class:`DivergedError` past the limit."""
        factor = self._note(loss)
        if factor is None:
            return None
        line = f"step {step}: loss {loss:.4f} is {factor:.1f} times the median of the steps before"
        if self._limit is not None and self._in_a_row >= self._limit:
            raise DivergedError(
                f"{line}; {self._in_a_row} such steps in a row, and training.spike_limit is {self._limit}",
                remedy="lower optimizer.learning_rate, look at those documents, or raise training.spike_limit",
            )
        return line

    def _note(self, loss: float) -> float | None:
        median = statistics.median(self._losses) if len(self._losses) >= FEWEST_STEPS else None
        if median is None or loss <= SPIKE_FACTOR * median:
            self._losses = [*self._losses[-(SPIKE_WINDOW - 1) :], loss]
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        return loss / median if median > 0 else float("inf")


class SkippedSteps:
    """Counts the steps in a row that fp16's loss scaler skips: some at the start are how it finds its scale."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def note(self, step: int, *, is_finite: bool) -> None:
        """Raises :class:`DivergedError` where no scale can be the reason any more."""
        self._in_a_row = 0 if is_finite else self._in_a_row + 1
        if self._in_a_row > MOST_SKIPPED:
            raise DivergedError(
                f"step {step}: no finite gradient in {self._in_a_row} steps in a row, at any loss scale",
                remedy="set model.dtype to bfloat16, or lower optimizer.learning_rate",
            )
