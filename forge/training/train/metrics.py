"""What a run measures about itself: seconds, tokens and labels a step, memory by phase.

The trainer's own counters are not used: they count padding as tokens, hide NaN and restart after
a resume. Labels are hashed as they reach the model, in a form that does not depend on how a
backend lays them out, so that two backends can be shown to have trained on the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from forge.training.data.conversation import IGNORED
from forge.training.system.files import write_text
from forge.training.train.record import MemoryPhase


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


class Meter:
    """Collects micro-batches as they are fetched and turns them into one line a step."""

    def __init__(
        self,
        log_path: Path,
        accumulation: int,
        cuda: bool,
        *,
        resumed_step: int = 0,
        loss_counts_first_labels: bool = False,
    ) -> None:
        """``resumed_step``: steps of the log that still count; later ones are done again.

        ``loss_counts_first_labels``: the stack divides a step's loss by all labels, those included
        that no token predicts (transformers 4, ``get_batch_samples``); the log has it per trained token.
        """
        before = _read_log(log_path, resumed_step)
        write_text(log_path, "".join(json.dumps(line) + "\n" for line in before))
        self.path = log_path
        self._log = open(log_path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - lives as long as the run
        self._accumulation = accumulation
        self._cuda = cuda
        self._loss_counts_first_labels = loss_counts_first_labels
        self._pending: deque[tuple[list[bytes], list[int], int, int]] = deque()
        self._mark = time.perf_counter()
        self._loss: Any = None
        steps = [line for line in before if "loss" in line]
        self.step_seconds: list[float] = [line["seconds"] for line in steps]
        self.step_tokens: list[int] = [line["tokens"] for line in steps]
        self.step_documents: list[int] = [line["documents"] for line in steps]
        self.losses: list[float] = [line["loss"] for line in steps]
        self.batch_digests: list[str] = [line["labels_sha256"] for line in steps]
        self.validation = [(line["step"], line["validation_loss"]) for line in before if "validation_loss" in line]
        self.memory: list[MemoryPhase] = []

    def fetched(self, batch: Mapping[str, Any]) -> None:
        """Note a collated micro-batch; the loader may fetch one ahead of the step it belongs to."""
        documents = document_labels(batch)
        trained = sum(_num_trained(d) for d in documents)
        counted = int((batch["labels"] != IGNORED).sum()) if self._loss_counts_first_labels else trained
        self._pending.append((documents, [len(d) // 4 + 1 for d in documents], trained, counted))

    def add_loss(self, loss: Any) -> None:
        """Add a micro-batch's share of the step's loss (a detached scalar on its device)."""
        self._loss = loss if self._loss is None else self._loss + loss

    def step_loss(self) -> float:
        """The step's loss so far, nats per trained token. Waits for the GPU."""
        return float("nan") if self._loss is None else float(self._loss)

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
        batches = [self._pending.popleft() for _ in range(min(count, len(self._pending)))]
        documents = sorted(d for batch in batches for d in batch[0])
        trained = sum(batch[2] for batch in batches)
        figures: dict[str, Any] = {
            "seconds": now - self._mark,
            "documents": len(documents),
            "tokens": sum(sum(batch[1]) for batch in batches),
            "tokens_squared": sum(n * n for batch in batches for n in batch[1]),
            "micro_batch_tokens": [sum(batch[1]) for batch in batches],
            "trained_tokens": trained,
            "labels_sha256": hashlib.sha256(b"".join(hashlib.sha256(d).digest() for d in documents)).hexdigest(),
            "loss": self.step_loss() * (sum(batch[3] for batch in batches) / trained if trained else 1.0),
        }
        self._mark, self._loss = now, None
        self.step_seconds.append(figures["seconds"])
        self.step_tokens.append(figures["tokens"])
        self.step_documents.append(len(documents))
        self.losses.append(figures["loss"])
        self.batch_digests.append(figures["labels_sha256"])
        return figures

    def write(self, line: dict[str, Any]) -> None:
        """Append one line to the step log."""
        self._log.write(json.dumps(line, allow_nan=True) + "\n")

    def phase(self, name: str) -> None:
        """Record the memory peaks reached by the end of a phase."""
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

    def flush(self) -> None:
        """Have the disk hold the step log: a checkpoint is about to rely on it."""
        self._log.flush()
        os.fsync(self._log.fileno())

    def close(self) -> None:
        """Close the step log."""
        self._log.close()


def _read_log(path: Path, until_step: int) -> list[dict[str, Any]]:
    if not until_step or not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the line that a kill cut short
        if line["step"] <= until_step:
            lines.append(line)
    return lines


def _num_trained(document: bytes) -> int:
    import numpy as np

    return int((np.frombuffer(document, dtype="<i4") != IGNORED).sum())
