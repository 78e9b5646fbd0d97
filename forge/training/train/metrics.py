"""What a run measures about itself: seconds, tokens and labels per step, memory by phase.

The trainer's own counters are not used: they count padding as tokens, hide NaN and restart after
a resume. Labels are hashed as they reach the model, in a form that does not depend on how a
backend lays them out, so that two backends can be shown to have trained on the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import statistics
import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from forge.training.data.conversation import IGNORED
from forge.training.system.files import write_text
from forge.training.train.record import Losses, MemoryPhase, ProcessMemory, RunRecord
from forge.training.train.step_log import loss_window

NUM_WARMUP_STEPS = 2  # left out of the steady figures: compilation, allocator, caches


class MicroBatch(NamedTuple):
    """One micro-batch as it was collated. ``labels``: of each document, as :func:`document_labels` has them."""

    labels: list[bytes]
    num_tokens: list[int]  # of each document
    num_trained: int  # tokens that carry a loss
    num_divisor: int  # labels that the backend divides the loss by


def document_labels(batch: Mapping[str, Any]) -> list[bytes]:
    """Each document's labels in one collated micro-batch, as int32 bytes without the first and padding.

    ``batch`` holds ``labels`` (rows, tokens) and either ``attention_mask`` of that shape or, where
    documents were flattened into one row, ``position_ids`` that restart at 0 with each.
    The first label is never a target (the model shifts) and packing masks it, so it is left out.
    """
    labels = batch["labels"].to("cpu").numpy()
    documents = []
    if batch.get("attention_mask") is not None:
        mask = batch["attention_mask"].to("cpu").numpy().astype(bool)
        documents = [row[keep] for row, keep in zip(labels, mask, strict=True)]
    else:
        positions = batch["position_ids"].to("cpu").numpy()[0]
        starts = [i for i, position in enumerate(positions) if position == 0]
        bounds = [*starts, len(positions)]
        documents = [labels[0][a:b] for a, b in pairwise(bounds)]
    return [d[1:].astype("<i4").tobytes() for d in documents]


def cut_log(path: Path, until_step: int) -> list[dict[str, Any]]:
    """Cut the step log down to the steps that still count, the others being done again. Returns its lines."""
    lines = []
    if until_step and path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # the line that a kill cut short
            if line["step"] <= until_step:
                lines.append(line)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


class Meter:
    """Collects micro-batches as they are fetched and turns them into one line per step. Enter it to open the log."""

    def __init__(
        self,
        log_path: Path,
        lines: list[dict[str, Any]],
        accumulation: int,
        cuda: bool,
        *,
        loss_counts_first_labels: bool = False,
    ) -> None:
        """``lines``: of the steps before a resume. ``loss_counts_first_labels``: of the backend's module."""
        self._log_path = log_path
        self._log: IO[str] | None = None
        self._accumulation = accumulation
        self._cuda = cuda
        self._loss_counts_first_labels = loss_counts_first_labels
        self._pending: deque[list[MicroBatch]] = deque()
        self._mark = time.perf_counter()
        self._loss: Any = None
        self._steps = [line for line in lines if "loss" in line]
        validation = [line for line in lines if "validation_loss" in line]
        self.validation: list[tuple[int, float]] = [(line["step"], line["validation_loss"]) for line in validation]
        self.memory: list[MemoryPhase] = []
        self.process_memory: list[ProcessMemory] = []

    def __enter__(self) -> Meter:
        self._log = open(self._log_path, "a", encoding="utf-8", buffering=1)  # a checkpoint copies whole lines
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            self._log.close()

    def fetched(self, *batches: Mapping[str, Any]) -> None:
        """Note what was collated at once; the loader may fetch one ahead of the step it belongs to."""
        self._pending.append([self._measured(batch) for batch in batches])

    def _measured(self, batch: Mapping[str, Any]) -> MicroBatch:
        labels = document_labels(batch)
        trained = sum(int((np.frombuffer(document, dtype="<i4") != IGNORED).sum()) for document in labels)
        divisor = int((batch["labels"] != IGNORED).sum()) if self._loss_counts_first_labels else trained
        return MicroBatch(labels, [len(d) // 4 + 1 for d in labels], trained, divisor)

    def add_loss(self, loss: Any) -> None:
        """Add a micro-batch's share of the step's loss (a detached scalar on its device)."""
        self._loss = loss if self._loss is None else self._loss + loss

    def step_loss(self) -> float:
        """The step's loss so far, nats per trained token. Waits for the GPU."""
        return float("nan") if self._loss is None else float(self._loss)

    @property
    def losses(self) -> list[float]:
        """Of every step so far, nats per trained token."""
        return [step["loss"] for step in self._steps]

    def resume_clock(self) -> None:
        """Leave what happened since the last step (evaluation, saving) out of the next step's time."""
        self._mark = time.perf_counter()

    def step_ended(self, is_last: bool) -> dict[str, Any]:
        """Close a step and return its figures, without the loss's place in the log."""
        if self._cuda:
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        count = len(self._pending) if is_last else self._accumulation
        fetched = [self._pending.popleft() for _ in range(min(count, len(self._pending)))]
        batches = [batch for batches in fetched for batch in batches]
        documents = sorted(document for batch in batches for document in batch.labels)
        trained = sum(batch.num_trained for batch in batches)
        figures: dict[str, Any] = {
            "seconds": now - self._mark,
            "documents": len(documents),
            "tokens": sum(sum(batch.num_tokens) for batch in batches),
            "tokens_squared": sum(n * n for batch in batches for n in batch.num_tokens),
            "micro_batch_tokens": [sum(batch.num_tokens) for batch in batches],
            "trained_tokens": trained,
            "labels_sha256": hashlib.sha256(b"".join(hashlib.sha256(d).digest() for d in documents)).hexdigest(),
            "loss": self.step_loss() * (sum(batch.num_divisor for batch in batches) / trained if trained else 1.0),
        }
        self._mark, self._loss = now, None
        self._steps.append(figures)
        return figures

    def write(self, line: dict[str, Any]) -> None:
        """Append one line to the step log."""
        assert self._log is not None
        self._log.write(json.dumps(line, allow_nan=True) + "\n")

    def phase(self, name: str) -> None:
        """Record the memory peaks reached by the end of a phase."""
        self.process_memory.append(ProcessMemory(phase=name, peak_resident_bytes=peak_resident_bytes()))
        if not self._cuda:
            return
        import torch

        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        self.memory.append(
            MemoryPhase(
                phase=name,
                peak_allocated_bytes=torch.cuda.max_memory_allocated(),
                peak_reserved_bytes=torch.cuda.max_memory_reserved(),
                device_used_bytes=total - free,
            )
        )

    def fill(self, record: RunRecord) -> None:
        """Put what was measured into the run's record. Steady figures need more steps than the warm-up."""
        record.memory, record.process_memory = self.memory, self.process_memory
        record.batch_digests = [step["labels_sha256"] for step in self._steps]
        record.num_steps = len(self._steps)
        if not self._steps:
            return
        losses = self.losses
        record.losses = Losses(
            first_train_loss=_finite(statistics.fmean(losses[: loss_window(len(losses))])),
            last_train_loss=_finite(statistics.fmean(losses[-loss_window(len(losses)) :])),
        )
        skip = NUM_WARMUP_STEPS if len(self._steps) > NUM_WARMUP_STEPS + 1 else 0
        steady = self._steps[skip:]
        seconds = [step["seconds"] for step in steady]
        record.timing.num_warmup_steps_left_out = skip
        record.timing.steady_step_seconds_median = statistics.median(seconds)
        record.timing.documents_per_second = sum(step["documents"] for step in steady) / sum(seconds)
        record.timing.tokens_per_second = sum(step["tokens"] for step in steady) / sum(seconds)


def peak_resident_bytes() -> int:
    """The most memory of this process that was resident at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
