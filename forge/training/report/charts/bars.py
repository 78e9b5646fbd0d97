"""Charts of bars: one value per arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forge.training.report.charts.style import colour, finished, text_width
from forge.training.report.charts.svg import INK, MUTED, RULE, SMALL_SIZE, TEXT_SIZE, WIDTH, mark, paper
from forge.training.report.page.content import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EDGE = 1.0  # margin left and right, pixels
_ROW = 40.0


@dataclass(frozen=True)
class Bar:
    """``text`` stands at its end; without a ``value`` it stands alone. ``outer``: a longer, paler bar behind.

    ``low``, ``high``: the extremes of the runs, a thin line.
    """

    label: str
    backend: str
    value: float | None
    text: str
    outer: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def end(self) -> float:
        return max(self.value or 0.0, self.outer or 0.0, self.high or 0.0)


def bars(name: str, title: str, items: Sequence[Bar], reference: tuple[float, str] | None = None) -> Chart:
    """Horizontal bars with their names above them. ``reference``: a value and its name, a line across all bars."""
    top = 26.0 if reference else 4.0
    with paper(_ROW * len(items) + top + 4, left=_EDGE, right=_EDGE, top=top, bottom=4) as axes:
        longest = _longest(items, reference)
        axes.set(xlim=(0, longest), ylim=(len(items) - 0.5, -0.5))
        axes.axis("off")
        for position, bar in enumerate(items):
            axes.text(0, position - 0.3, bar.label, color=INK, va="center")
            _draw(axes, bar, position + 0.12)
        axes.plot([0, 0], [-0.1, len(items) - 0.6], color=RULE, linewidth=1)
        if reference:
            _line_across(axes, *reference, longest=longest, num=len(items))
        values = "; ".join(f"{bar.label} {bar.text}" for bar in items)
        return finished(axes, name, title, f"{values}." + (f" Line: {reference[1]}." if reference else ""))


def _draw(axes: Axes, bar: Bar, at: float) -> None:
    if bar.outer is not None:
        axes.barh(at, bar.outer, height=0.36, color=colour(bar.backend), alpha=0.3)
    if bar.value is not None:
        (drawn,) = axes.barh(at, bar.value, height=0.36, color=colour(bar.backend))
        mark(drawn, bar.label, f"{bar.label}: {bar.text}")
    if bar.low is not None and bar.high is not None and bar.high > bar.low:
        axes.plot([bar.low, bar.high], [at, at], color=INK, linewidth=1.2, solid_capstyle="butt")
    written: dict[str, Any] = {"color": MUTED, "style": "italic"} if bar.value is None else {"color": INK}
    axes.annotate(bar.text, (bar.end, at), (6, -0.5), textcoords="offset points", va="center", **written)


def _longest(items: Sequence[Bar], reference: tuple[float, str] | None) -> float:
    """The value at the right edge: every bar and the text at its end must fit in front of it."""
    width = WIDTH - 2 * _EDGE
    ends = [bar.end * width / max(width - text_width(bar.text, TEXT_SIZE) - 8, width / 4) for bar in items]
    return max([*ends, reference[0] * 1.02 if reference else 0.0]) or 1.0


def _line_across(axes: Axes, value: float, text: str, *, longest: float, num: int) -> None:
    for position in range(num):  # beside the bars only: the names between them stay readable
        axes.plot([value, value], [position - 0.12, position + 0.36], color=INK, linewidth=1.1)
    right = (WIDTH - 2 * _EDGE) * (1 - value / longest)  # of the line, pixels
    side = "left" if right > text_width(text, SMALL_SIZE) else "right"
    axes.plot([value, value], [-0.86, -0.62], color=INK, linewidth=1.1, clip_on=False)
    at = (4 if side == "left" else -4, 0)
    written: dict[str, Any] = {"ha": side, "va": "center", "fontsize": SMALL_SIZE, "color": INK}
    axes.annotate(text, (value, -0.75), at, textcoords="offset points", annotation_clip=False, **written)
