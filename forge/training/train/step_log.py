"""``steps.jsonl``: a line per optimizer step, per held-out loss and per sample answer, read without numpy or torch."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOG = "steps.jsonl"
_LARGEST_BYTES = 64 << 20  # some 100,000 steps
_PACE_STEPS = 20  # the last ones, which say how fast a run is now


@dataclass(frozen=True)
class Sample:
    """What the model being trained answered at a step."""

    step: int
    question: str
    answer: str


@dataclass(frozen=True)
class StepLog:
    """``losses``, ``validation``: (step, nats per trained token). Rates are of the last steps; ``None``: not known."""

    losses: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    samples: list[Sample]
    seconds_per_step: float | None = None
    tokens_per_second: float | None = None

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest held-out loss."""
        return min(self.validation, key=lambda point: point[1], default=None)


def loss_window(num_steps: int) -> int:
    """How many steps at either end of a run its first and last train loss are means of: up to five, never shared."""
    return max(1, min(5, num_steps // 2))


def log_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole: a kill cuts the last one short. None of a log that is absent or larger than any."""
    if not path.is_file() or path.stat().st_size > _LARGEST_BYTES:
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def read_step_log(run_dir: Path) -> StepLog:
    """A run's log so far; what is in no line of it is left out."""
    losses, validation, samples, timed = [], [], [], []
    for line in log_lines(run_dir / LOG):
        step = line["step"]
        if _is_number(line.get("loss")):
            losses.append((step, float(line["loss"])))
            if _is_number(line.get("seconds")) and _is_number(line.get("tokens")):
                timed.append((float(line["seconds"]), float(line["tokens"])))
        elif _is_number(line.get("validation_loss")):
            validation.append((step, float(line["validation_loss"])))
        elif isinstance(line.get("answer"), str) and isinstance(line.get("question"), str):
            samples.append(Sample(step, line["question"], line["answer"]))
    return StepLog(losses, validation, samples, *_pace(timed))


def _pace(timed: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Seconds per step and tokens per second of the last steps; the first step, which warms up, where it is alone."""
    last = (timed[1:] or timed)[-_PACE_STEPS:]
    seconds = sum(took for took, _ in last)
    if not last or seconds <= 0:
        return None, None
    return statistics.median(took for took, _ in last), sum(tokens for _, tokens in last) / seconds


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
