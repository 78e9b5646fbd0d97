"""Finds the longest document that fits, by bracketing between a length that fits and one that does not."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

GRAIN = 64  # tokens
STEP = 0.03  # of the length: how far apart the longest that fits and the shortest that does not may end
MOST_TRIES = 12
_LEAST_GAIN = 1.1  # a length that the time allows instead of the predicted one must be so much longer than what fits


class Stepper(Protocol):
    """What takes a document of so many tokens through a training step."""

    def step(self, num_tokens: int) -> tuple[int, float] | None:
        """Peak bytes and seconds; ``None``: it does not fit."""


def measure(stepper: Stepper, lengths: list[int], seconds: float) -> tuple[list[tuple[int, int, float]], int | None]:
    """(tokens, peak bytes, seconds) of each of the rising ``lengths`` that fits, and the first that does not, if any.

    From the third on none is begun that, at the square of the pace before it, might take longer than ``seconds``.
    """
    measured: list[tuple[int, int, float]] = []
    for length in lengths:
        if len(measured) >= 2 and measured[-1][2] * (length / measured[-1][0]) ** 2 > seconds:
            break
        peak = stepper.step(length)
        if peak is None:
            return measured, length
        measured.append((length, *peak))
    return measured, None


def predict(points: list[tuple[int, int, float]], cap: int) -> float:
    """The length whose peak is ``cap`` bytes, on the line through the last two ``points``, the nearest to it.

    A peak is no single line: up to a tile's length the MLPs are whole, and short documents fill no chunk of the loss.
    """
    (t0, b0, _), (t1, b1, _) = points[-2:]
    return t0 + (cap - b0) * (t1 - t0) / max(1, b1 - b0)


def bracket(
    stepper: Stepper, predicted: float, seconds: float, result: dict[str, Any], *, pace: tuple[int, float]
) -> None:
    """Search around the prediction until one length fits and one longer by :data:`STEP`, or by a grain, does not.

    ``result`` holds what is known before, ``tokens_fits`` and ``tokens_fails``, and receives what is found. In one
    direction the stride doubles from try to try; once a try ended otherwise than the one before, the middle is next.

    ``pace``: a length and its seconds. A longer one takes at most the square of that, as attention does, and is not
    begun where that is more than is left: the probe's limit would take all its answers with it. The longest that the
    time allows is tried instead.
    """
    started = time.perf_counter()
    stride = max(GRAIN, _whole(predicted * STEP))
    tokens, before, is_between = _whole(predicted - stride / 2), None, False
    for _ in range(MOST_TRIES):
        if _is_bracketed(result) or result["tokens_fails"] == GRAIN:
            break
        fits, fails = result["tokens_fits"] or 0, result["tokens_fails"] or math.inf
        middle = max(fits + GRAIN, _whole((fits + fails) / 2)) if fails < math.inf else math.inf
        if is_between:
            tokens = int(middle)
        elif tokens <= fits:
            tokens = int(min(fits + stride, middle))
        elif tokens >= fails:
            tokens = int(max(fails - stride, middle))
        left = seconds - (time.perf_counter() - started)
        needed = _needed(tokens, pace)
        if needed > left:
            allowed = _whole(pace[0] * math.sqrt(max(0.0, left) / pace[1]))
            if allowed < _LEAST_GAIN * max(fits, GRAIN):
                result["why"] = (
                    f"stopped: a step of {tokens:,} tokens may take {needed:,.0f} s and {left:.0f} s were left"
                )
                return
            tokens = allowed
        begun = time.perf_counter()
        got = stepper.step(tokens)
        result["tries"].append({"tokens": tokens, "fits": got is not None, "peak_bytes": got[0] if got else None})
        result["tokens_fails" if got is None else "tokens_fits"] = tokens
        if got is not None:
            pace = tokens, 1.3 * (time.perf_counter() - begun)  # no two steps take the same
        is_between |= before is not None and before is not (got is None)
        before = got is None
        tokens += -stride if got is None else stride
        stride *= 2
    if not _is_bracketed(result):
        result["why"] = f"{len(result['tries'])} tries did not bracket it"


def _is_bracketed(result: dict[str, Any]) -> bool:
    fits, fails = result["tokens_fits"], result["tokens_fails"]
    return bool(fits and fails) and fails - fits <= max(GRAIN, STEP * fails)


def _whole(tokens: float) -> int:
    """In grains, one at least."""
    return max(1, int(tokens) // GRAIN) * GRAIN


def _needed(tokens: int, pace: tuple[int, float]) -> float:
    return pace[1] * max(1.0, tokens / pace[0]) ** 2
