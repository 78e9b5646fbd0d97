"""What a run's end writes into its record: the error in the user's words, and what was measured."""

from __future__ import annotations

import math
import statistics
from typing import Any

from forge.training.backends.job import TrainingJob
from forge.training.system.errors import DivergedError, ForgeError, GpuMemoryError, Interrupted
from forge.training.system.files import as_disk_error, sha256_json
from forge.training.system.signals import StopRequest
from forge.training.train.metrics import Meter
from forge.training.train.record import Losses, RunRecord, Status, Trainable

NUM_WARMUP_STEPS = 2  # left out of the steady figures: compilation, allocator, caches


_OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Error out of memory",
)


def translated(error: BaseException, job: TrainingJob, stop: StopRequest) -> BaseException:
    """The error as :mod:`forge.training.system.errors` has it, where it is the user's: memory, disk, a signal."""
    import torch

    if isinstance(error, ForgeError):
        return error
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(said in text for said in _OUT_OF_MEMORY):
        remedies = []
        if job.plan.micro_batch > 1:
            remedies.append("--plan micro_batch=1 (the same mathematics)")
        if job.plan.gradient_checkpointing == "none":
            remedies.append("--plan gradient_checkpointing=full (the same mathematics)")
        remedies += ["--set data.max_length=... (shorter documents)", "--set lora.rank=... (a smaller adapter)"]
        first = text.partition("\n")[0]  # of an error that says nothing it is empty
        return GpuMemoryError(f"out of GPU memory: {first:.300}", remedy="in order of cost: " + "; ".join(remedies))
    if stop.caused(error):
        return stop.interrupted(" before it trained")
    return as_disk_error(error, job.run_dir) or error


def status_of(error: BaseException) -> Status:
    """The record's status for an error that ended a run."""
    kinds: dict[type[BaseException], Status] = {
        GpuMemoryError: "out_of_memory",
        DivergedError: "diverged",
        Interrupted: "interrupted",
    }
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), "failed")


def describe_trainable(model: Any) -> Trainable:
    """Count and digest the trainable parameters under names that no backend's wrapper changes."""
    rows, dtypes = [], set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rows.append([name.replace(".default", "").replace("._orig_mod", ""), list(parameter.shape)])
            dtypes.add(str(parameter.dtype).removeprefix("torch."))
    return Trainable(
        num_parameters=sum(math.prod(shape) for _, shape in rows),
        names_sha256=sha256_json(sorted(rows)),
        dtype=",".join(sorted(dtypes)),
    )


def fill_record(record: RunRecord, meter: Meter, callback: Any, job: TrainingJob) -> None:
    """What was measured, into the record. Steady figures need more steps than the warm-up."""
    record.memory = meter.memory
    record.batch_digests = meter.batch_digests
    record.num_steps = len(meter.losses)
    if meter.losses:
        record.losses = Losses(
            first_train_loss=_finite(statistics.fmean(meter.losses[:5])),
            last_train_loss=_finite(statistics.fmean(meter.losses[-5:])),
        )
        skip = NUM_WARMUP_STEPS if len(meter.step_seconds) > NUM_WARMUP_STEPS + 1 else 0
        seconds = meter.step_seconds[skip:]
        record.timing.num_warmup_steps_left_out = skip
        record.timing.steady_step_seconds_median = statistics.median(seconds)
        record.timing.documents_per_second = sum(meter.step_documents[skip:]) / sum(seconds)
        record.timing.tokens_per_second = sum(meter.step_tokens[skip:]) / sum(seconds)
    if callback is not None:
        record.timing.rehearsal_seconds = callback.rehearsal_seconds
        record.notes += callback.notes
    if callback is not None and callback.validation:
        record.losses.first_validation_loss = callback.validation[0][1]
        record.losses.last_validation_loss = callback.validation[-1][1]
        if callback.best is not None:
            record.losses.best_step, record.losses.best_validation_loss = callback.best


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
