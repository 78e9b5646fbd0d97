"""What the gate's report says of several runs: medians with their extremes, ratios, times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from forge.training.report.page.numbers import NONE, digits, tied


@dataclass(frozen=True)
class Spread:
    """The median of one value per run, with the extremes."""

    middle: float
    low: float
    high: float
    num: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """None if no value is known."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    return Spread(statistics.median(known), known[0], known[-1], len(known))


def number(value: float | None, significant: int = 3) -> str:
    return NONE if value is None else digits(value, significant)


def with_range(values: Spread | None, significant: int = 3, scale: float = 1.0) -> str:
    """``9.49 (9.41 to 9.60)``; the range only where runs differ in the digits shown."""
    if values is None:
        return NONE
    middle, low, high = (digits(value / scale, significant) for value in (values.middle, values.low, values.high))
    return middle if low == high else f"{middle} {tied(f'({low} to {high})')}"


def times(value: float | None, significant: int = 3) -> str:
    return NONE if value is None else f"{digits(value, significant)}×"


def percent(value: float | None, significant: int = 3) -> str:
    return NONE if value is None else f"{digits(100 * value, significant)}%"


def duration(seconds: float | None) -> str:
    """``47 s``, ``12 min 5 s``, ``1 h 22 min``."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return tied(f"{digits(seconds, 2)} s")
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return tied(f"{minutes} min {rest:02d} s")
    hours, minutes = divmod(round(seconds / 60), 60)
    return tied(f"{hours:,} h {minutes:02d} min")


def count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"
