"""Numbers as people read them. Units are always named; what is not known is a dash, never a zero."""

from __future__ import annotations

import math

NONE = "–"
_TIED = "\u00a0"  # between a number and what belongs to it: no line break
GIB = 1 << 30


def tied(text: str) -> str:
    """The text without a place for a line break."""
    return text.replace(" ", _TIED)


def digits(value: float, significant: int = 3) -> str:
    """At least ``significant`` digits, thousands parted: 0.187, 2.31, 74.5, 6,475."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, significant - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 9)}f}"


def gib(value: float | None) -> str:
    return NONE if value is None else tied(f"{digits(value / GIB)} GiB")
