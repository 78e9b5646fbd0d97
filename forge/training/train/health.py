"""Losses that jump, and fp16's skipped steps: what is still a number and yet a sign."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from forge.training.system.errors import DivergedError

FACTOR = 2.0  # of the median: what llm-foundry's KillLossSpike takes of a running mean
WINDOW = 32
FEWEST = 8
# PyTorch's scaler begins at 2^16 and halves at every skip: past 24 in a row the scale is not the cause
MOST_SKIPPED = 24


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
        median = statistics.median(self._losses) if len(self._losses) >= FEWEST else None
        if median is None or loss <= FACTOR * median:
            self._losses = [*self._losses[-(WINDOW - 1) :], loss]
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
