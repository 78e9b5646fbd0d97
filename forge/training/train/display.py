"""What a person sees of a training run: the plan, progress with an ETA, the summary."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from forge.training.system.command import rows_table
from forge.training.train.record import RunRecord

if TYPE_CHECKING:
    from rich.console import Console

    from forge.training.backends.job import TrainingJob

PLAIN_LINE_EVERY_SECONDS = 10.0


class TrainingDisplay:
    """A bar on a terminal, plain lines elsewhere; everything on the console it is given."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._num_steps = 0
        self._last_line = 0.0
        self._started = time.monotonic()
        self._first_step = 0
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
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
        self.console.print(Text(line))

    def show_plan(self, job: TrainingJob, start: dict[str, Any]) -> None:
        """Say what is about to be done, before the first step."""
        workload, plan, report = job.workload, job.plan, job.train.report
        lora, optimizer, model, trainable = workload.lora, workload.optimizer, workload.model, start["trainable"]
        tokens = f"{report.num_tokens:,} per epoch, {report.num_trained_tokens:,} of them trained"
        documents = f"{report.num_cut} documents cut, {report.num_divided} divided into {report.num_parts}"
        steps = f"{job.num_steps:,} of {workload.training.effective_batch} examples"
        layout = f"padding {plan.padding}, checkpointing {plan.gradient_checkpointing}, attention {plan.attention}"
        adapter = f"rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout:g} on {', '.join(lora.targets)}"
        rate = f"learning rate {optimizer.learning_rate:g}, {optimizer.schedule}, warm-up {optimizer.warmup_ratio:.0%}"
        rows = [
            ("examples", f"{len(job.train):,} train, {len(job.validation or ()):,} validation"),
            ("tokens", f"{tokens} ({workload.data.loss_on}); {documents}"),
            ("steps", f"{steps}, as {plan.micro_batch} x {job.accumulation}"),
            ("layout", layout),
            ("adapter", f"{adapter}: {trainable.num_parameters:,} parameters in {trainable.dtype}"),
            ("optimizer", f"{optimizer.name}, {rate}, gradient norm {optimizer.max_grad_norm:g}"),
            ("base", f"{model.path}, {model.quantization}, {model.dtype}"),
            ("seed", str(workload.training.seed)),
            ("writes", str(job.run_dir)),
        ]
        rows += [("resumes", start["resumed_from"])] if start["resumed_from"] else []
        self.console.print(rows_table(f"plan: {workload.name} with {job.backend}", rows))
        self._num_steps = job.num_steps
        self._progress.start()
        self._task = self._progress.add_task("training", total=job.num_steps, figures="")
        self._started = time.monotonic()

    def show_step(self, step: int, figures: dict[str, Any]) -> None:
        """Show one step's loss, speed and memory."""
        import torch

        speed = figures["tokens"] / max(figures["seconds"], 1e-9)
        text = f"loss {figures['loss']:.4f}  {speed:,.0f} tokens/s"
        if torch.cuda.is_available():
            text += f"  peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        if self.console.is_terminal:
            self._progress.update(self._task, completed=step, figures=text)
            return
        self._first_step = self._first_step or step
        now = time.monotonic()
        if now - self._last_line >= PLAIN_LINE_EVERY_SECONDS or step in (self._first_step, self._num_steps):
            self._last_line = now
            pace = (now - self._started) / (step - self._first_step + 1)
            self.console.print(f"step {step}/{self._num_steps}  {text}  eta {pace * (self._num_steps - step):.0f} s")

    def show_summary(self, record: RunRecord, run_dir: Path, console: Console) -> None:
        """Say what came out and what to do next."""
        losses, timing = record.losses, record.timing
        rows = [
            ("steps", f"{record.num_steps:,} in {timing.train_seconds or 0:.1f} s"),
            ("train loss", f"{losses.first_train_loss:.4f} -> {losses.last_train_loss:.4f} nats per token"),
        ]
        if losses.best_validation_loss is not None:
            best = f"best {losses.best_validation_loss:.4f} at step {losses.best_step}"
            ends = f"{losses.first_validation_loss:.4f} at first, {best}, {losses.last_validation_loss:.4f} at last"
            rows.append(("held-out loss", ends))
        if timing.documents_per_second and timing.tokens_per_second:
            speed = f"{timing.documents_per_second:.2f} documents/s, {timing.tokens_per_second:,.0f} tokens/s"
            rows.append(("speed", speed))
        if record.memory:
            allocated, reserved = record.memory[-1].peak_allocated_bytes, record.memory[-1].peak_reserved_bytes
            rows.append(("peak memory", f"{allocated / 2**30:.2f} GiB allocated, {reserved / 2**30:.2f} reserved"))
        rows.append(("adapter", str(run_dir / "adapter")))
        console.print(rows_table(f"trained: {record.workload['name']} with {record.backend}", rows))
        shown = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
        console.print(f"next: forge evaluate {shown}")


def describe_status_line(status: dict[str, Any]) -> str:
    """One line about a run from :func:`forge.training.train.status.describe_status`."""
    steps = f"step {status['step']} of {status['num_planned_steps']}" if status["num_planned_steps"] else "no step yet"
    kept = f", newest checkpoint {status['checkpoint']}" if status["checkpoint"] else ""
    if status["killed"]:
        return f"killed at {steps} or later{kept}: the same command resumes it"
    why = f": {status['message']}" if status["message"] else ""
    who = f" (process {status['holder']})" if status["holder"] else ""
    return f"{status['state']}{who}, {steps}{kept}{why}"
