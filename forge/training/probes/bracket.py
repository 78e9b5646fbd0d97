"""Where between a length that fits and one that does not the longest lies: arithmetic, and what takes steps for it."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any, Protocol

from forge.training.errors import MachineError

GRAIN = 64  # tokens
STEP = 0.03  # of the length: how far apart the longest that fits and the shortest that does not may end
MOST_TRIES = 12  # a budget


class Stepper(Protocol):
    """What takes a document of so many tokens through a training step."""

    def step(self, num_tokens: int) -> tuple[int, float] | None:
        """Peak bytes and seconds; ``None``: it does not fit."""


class Points:
    """Peaks at rising ``lengths``, measured as they are needed. ``measured``: (tokens, peak bytes, seconds)."""

    def __init__(self, lengths: list[int]) -> None:
        self.measured: list[tuple[int, int, float]] = []
        self._waiting = list(lengths)

    def measure_beyond(self, stepper: Stepper, cap: int, *, most_seconds: float) -> None:
        """Measure until a peak is above ``cap`` bytes, a length does not fit or, at the square of the pace before it,
        might take longer than ``most_seconds``; two lengths at least.

        Raises :class:`MachineError` where the first two do not fit.
        """
        while self._waiting and (len(self.measured) < 2 or self.measured[-1][1] <= cap):
            length = self._waiting[0]
            if len(self.measured) >= 2:
                before, _, seconds = self.measured[-1]
                if seconds * (length / before) ** 2 > most_seconds:
                    return
            got = stepper.step(length)
            if got is not None:
                self.measured.append((length, *got))
                del self._waiting[0]
            elif len(self.measured) < 2:
                raise MachineError(f"{length} tokens do not fit on this GPU at all")
            else:
                self._waiting.clear()


def predict(points: list[tuple[int, int]], cap: int) -> float:
    """The length whose peak is ``cap`` bytes, on the line through the two ``points`` nearest to it.

    A peak is no single line: up to a tile's length the MLPs are whole, and short documents fill no chunk of the loss.
    """
    pairs = list(pairwise(points))
    (t0, b0), (t1, b1) = next((pair for pair in pairs if cap <= pair[1][1]), pairs[-1])
    return t0 + (cap - b0) * (t1 - t0) / max(1, b1 - b0)


def bracket(
    stepper: Stepper, predicted: float, seconds: float, result: dict[str, Any], *, pace: tuple[int, float]
) -> None:
    """Search around the prediction until one length fits and one longer by :data:`STEP`, or by a grain, does not.

    In one direction the stride doubles from try to try; between a length that fits and one that does not the middle
    is next.

    ``pace``: a length and its seconds. A longer one takes at most the square of that, as attention does, and is not
    begun where that is more than is left: the probe's limit would take all its answers with it.
    """
    started = time.perf_counter()
    stride = max(GRAIN, int(predicted * STEP) // GRAIN * GRAIN)
    tokens = max(GRAIN, int(predicted - stride / 2) // GRAIN * GRAIN)
    for _ in range(MOST_TRIES):
        left = seconds - (time.perf_counter() - started)
        needed = pace[1] * max(1.0, tokens / pace[0]) ** 2
        if needed > left:
            result["why"] = f"stopped: a step of {tokens:,} tokens may take {needed:.0f} s and {left:.0f} s were left"
            return
        begun = time.perf_counter()
        got = stepper.step(tokens)
        result["tries"].append({"tokens": tokens, "fits": got is not None, "peak_bytes": got[0] if got else None})
        if got is None:
            result["tokens_fails"] = tokens
        else:
            result["tokens_fits"] = tokens
            pace = tokens, 1.3 * (time.perf_counter() - begun)  # no two steps take the same
        fits, fails = result["tokens_fits"], result["tokens_fails"]
        if fits and fails:
            if fails - fits <= max(GRAIN, STEP * fails):
                return
            tokens = (fits + fails) // 2 // GRAIN * GRAIN
        elif fails == GRAIN:
            break
        else:
            tokens = max(GRAIN, tokens + (stride if fits else -stride))
            stride *= 2
    result["why"] = f"{len(result['tries'])} tries did not bracket it"
