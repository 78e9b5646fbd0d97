"""What a person sees of a training run: the plan, lines that stay, a bar below them, the summary, where it stands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from forge.training.system.command import rows_table, say, say_next, shown_path
from forge.training.train.record import RunRecord
from forge.training.train.step_log import loss_window

if TYPE_CHECKING:
    from rich.console import Console

    from forge.training.backends.job import TrainingJob

_LINE_EVERY_SECONDS = 10.0
_LONG_RUN_SECONDS, _LONG_RUN_LINE_EVERY_SECONDS = 600.0, 60.0  # a run of a night leaves some hundred lines
_BAR_WIDTH = 24
_SHOWN_CHARACTERS = 300  # of a question and of an answer


class TrainingDisplay:
    """Lines on the console it is given; on a terminal, a bar below them while the run goes on."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._num_steps = 0
        self._started = self._last_line = time.monotonic()
        self._first_step: int | None = None
        self._first_step_ended = 0.0
        self._tokens, self._seconds = 0, 0.0  # since the last line
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR_WIDTH),
            MofNCompleteColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> TrainingDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def announce(self, line: str) -> None:
        """Say one line, as it is: it may quote a document."""
        say(self.console, line)

    def show_plan(self, job: TrainingJob, start: dict[str, Any]) -> None:
        """Say what is about to be done, before the first step."""
        workload, plan, report = job.workload, job.plan, job.train.report
        lora, optimizer, model, trainable = workload.lora, workload.optimizer, workload.model, start["trainable"]
        tokens = f"{report.num_tokens:,} per epoch, {report.num_trained_tokens:,} of them trained"
        cut = f"; {report.num_cut:,} documents cut" if report.num_cut else ""
        divided = f"; {report.num_divided:,} documents divided into {report.num_parts:,}" if report.num_divided else ""
        steps = f"{job.num_steps:,} of {workload.training.effective_batch} examples"
        layout = f"padding {plan.padding}, checkpointing {plan.gradient_checkpointing}, attention {plan.attention}"
        adapter = f"rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout:g} on {', '.join(lora.targets)}"
        rate = f"learning rate {optimizer.learning_rate:g}, {optimizer.schedule}, warm-up {optimizer.warmup_ratio:.0%}"
        every = workload.training.evaluate_every_steps
        held_out = f"{len(job.validation or ()):,} held out" + (f", evaluated every {every} steps" if every else "")
        rows = [
            ("examples", f"{len(job.train):,} train, {held_out}"),
            ("tokens", f"{tokens} ({workload.data.loss_on}){cut}{divided}"),
            ("steps", f"{steps}, as {plan.describe_batches(workload)}"),
            ("layout", layout),
            ("adapter", f"{adapter}: {trainable.num_parameters:,} parameters in {trainable.dtype}"),
            ("optimizer", f"{optimizer.name}, {rate}, gradient norm {optimizer.max_grad_norm:g}"),
            ("base", f"{model.path}, {model.quantization}, {model.dtype}"),
            ("seed", str(workload.training.seed)),
        ]
        rows += [("resumes", start["resumed_from"])] if start["resumed_from"] else []
        self.console.print(rows_table(f"plan: {workload.name} with {job.backend}", rows))
        say(self.console, shown_path(job.run_dir), "run directory: ")
        self._num_steps = job.num_steps
        self._started = time.monotonic()
        self._task = self._progress.add_task("training", total=job.num_steps)
        self._progress.start()

    def show_step(self, step: int, figures: dict[str, Any]) -> None:
        """Move the bar; now and then, at the first and at the last step, leave a line."""
        now = time.monotonic()
        self._tokens += figures["tokens"]
        self._seconds += figures["seconds"]
        is_first = self._first_step is None
        if self._first_step is None:
            self._first_step, self._first_step_ended = step, now
        self._progress.update(self._task, completed=step, description="training")
        is_long = now - self._started > _LONG_RUN_SECONDS
        every = _LONG_RUN_LINE_EVERY_SECONDS if is_long else _LINE_EVERY_SECONDS
        if not (is_first or step == self._num_steps or now - self._last_line >= every):
            return
        pieces = [
            self._at(step),
            f"loss {figures['loss']:.4f}",
            f"{self._tokens / max(self._seconds, 1e-9):,.0f} tokens/s",
        ]
        if step < self._num_steps:
            # the first step warms up: it says how long the others take only while it is alone
            began, taken = (self._started, 1) if is_first else (self._first_step_ended, step - self._first_step)
            pieces.append(f"eta {duration((now - began) / taken * (self._num_steps - step))}")
        self._line([*pieces, _memory()])
        self._last_line, self._tokens, self._seconds = now, 0, 0.0

    def show_evaluating(self, num_examples: int) -> None:
        """The bar stands still meanwhile: say why."""
        self._progress.update(self._task, description=f"evaluating {num_examples:,}")

    def show_evaluation(self, step: int, loss: float, best: tuple[int, float]) -> None:
        """Say a held-out loss that was just measured, and whether it is the best so far."""
        compared = "best so far" if best[0] == step else f"best {best[1]:.4f} at step {best[0]:,}"
        self._line([self._at(step), f"held-out loss {loss:.4f}", compared])

    def show_sample(self, step: int, question: str, answer: str) -> None:
        """Show what the model answers by now."""
        say(self.console, _one_line(question), "  asked:    ")
        say(self.console, _one_line(answer) or "(nothing)", "  answered: ")

    def _at(self, step: int) -> str:
        return f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}"

    def _line(self, pieces: list[str]) -> None:
        """Figures two blanks apart, broken between them where a terminal is narrow."""
        lines = [pieces[0]]
        for piece in pieces[1:]:
            if self.console.is_terminal and len(lines[-1]) + 2 + len(piece) > self.console.width:
                lines.append(" " * len(pieces[0]) + f"  {piece}")
            else:
                lines[-1] += f"  {piece}"
        self.console.print("\n".join(lines), markup=False, soft_wrap=True)

    def show_summary(self, record: RunRecord, run_dir: Path, console: Console) -> None:
        """Say what came out. What was not measured is not there."""
        console.print(rows_table(f"trained: {record.workload['name']} with {record.backend}", summary_rows(record)))
        say(console, shown_path(run_dir), "run directory: ")
        say(console, shown_path(run_dir / "adapter"), "adapter: ")


def summary_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Name and value of each figure that a run has."""
    losses, timing = record.losses, record.timing
    took = f" in {duration(timing.train_seconds)}" if timing.train_seconds is not None else ""
    rows = [("steps", f"{record.num_steps:,}{took}")]
    if losses.first_train_loss is not None and losses.last_train_loss is not None:
        rows.append(("train loss", _train_loss(losses.first_train_loss, losses.last_train_loss, record.num_steps)))
    if losses.best_validation_loss is not None:
        best = f"best {losses.best_validation_loss:.4f} at step {losses.best_step}"
        ends = f"{losses.first_validation_loss:.4f} at first, {best}, {losses.last_validation_loss:.4f} at last"
        rows.append(("held-out loss", ends))
    if timing.documents_per_second and timing.tokens_per_second:
        units = {None: "examples", 0: "documents"}  # a document that was divided is several examples
        unit = units.get(record.inputs.num_divided_records, "parts of documents")
        speed = f"{timing.documents_per_second:.2f} {unit} per second, {timing.tokens_per_second:,.0f} tokens"
        rows.append(("speed", speed))
    if record.memory:
        allocated, reserved = record.memory[-1].peak_allocated_bytes, record.memory[-1].peak_reserved_bytes
        rows.append(("peak GPU memory", f"{allocated / 2**30:.2f} GiB allocated, {reserved / 2**30:.2f} reserved"))
    elif record.process_memory:
        rows.append(("peak memory", f"{record.process_memory[-1].peak_resident_bytes / 2**30:.2f} GiB of this process"))
    return rows


def _train_loss(first: float, last: float, num_steps: int) -> str:
    width = loss_window(num_steps)
    if num_steps <= 1:
        return f"{last:.4f} nats per token, in the only step"
    ends = ("step 1", f"step {num_steps}")
    if width > 1:
        ends = (f"steps 1 to {width}", f"steps {num_steps - width + 1:,} to {num_steps:,}")
    return f"{first:.4f} ({ends[0]}) -> {last:.4f} ({ends[1]}) nats per token"


def show_status(status: dict[str, Any], run_dir: Path, console: Console) -> None:
    """A run from :func:`~.progress.describe_status`: a line about its state, then a line a figure."""
    say(console, describe_status_line(status))
    rows = [("run directory", shown_path(run_dir))]
    if status["loss"] is not None:
        rows.append(("loss", f"{status['loss']:.4f} nats per token"))
    if status["validation_loss"] is not None:
        best = f"best {status['best_validation_loss']:.4f} at step {status['best_step']:,}"
        rows.append(("held-out loss", f"{status['validation_loss']:.4f}, {best}"))
    if status["tokens_per_second"] is not None:
        rows.append(("speed", f"{status['tokens_per_second']:,.0f} tokens/s"))
    if status["seconds_left"] is not None:
        rows.append(("eta" if status["holder"] else "left to train", duration(status["seconds_left"])))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(console, value, f"{name:<{width}}  ")
    if status["remedy"]:
        say(console, status["remedy"], "-> ")
    say_next(console, status["next"])


def describe_status_line(status: dict[str, Any]) -> str:
    """One line about a run: its state, its steps, its newest checkpoint and why it ended."""
    steps = f"step {status['step']} of {status['num_planned_steps']}" if status["num_planned_steps"] else "no step yet"
    kept = f", newest checkpoint {status['checkpoint']}" if status["checkpoint"] else ""
    if status["killed"]:
        return f"killed at {steps} or later{kept}" + (": it can be resumed" if status["next"] else "")
    why = f": {status['message']}" if status["message"] else ""
    who = f" (process {status['holder']})" if status["holder"] else ""
    return f"{status['state']}{who}, {steps}{kept}{why}"


def duration(seconds: float) -> str:
    """``9 s``, ``12 min 05 s``, ``1 h 22 min``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _memory() -> str:
    """The peak so far: of the GPU where there is one, else of this process."""
    import torch

    from forge.training.train.metrics import peak_resident_bytes

    if torch.cuda.is_available():
        return f"GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return f"memory {peak_resident_bytes() / 2**30:.1f} GiB"


def _one_line(text: str) -> str:
    """A text of any shape as one line that a terminal can show."""
    from forge.training.system.command import printable

    line = printable(" ".join(text.split()))
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]} ..."
