"""Charts of points and lines: trade-offs, context against memory, intervals and bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forge.training.report.charts.style import colour, finished, is_variant, legend, marker, name_axes
from forge.training.report.charts.svg import BAD, DOUBT, GOOD, INK, MUTED, PAPER, SMALL_SIZE, WIDTH, mark, paper
from forge.training.report.page.content import Chart
from forge.training.report.page.numbers import digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# status -> colour, shape, sign
_LINE_HEIGHT = 14.0  # pixels from one line of text to the next
_MARGINS = (0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 1.5, 2, 3, 5, 8, 15, 30)
_STATUS = {
    "PASS": (GOOD, "o", "✓"),
    "FAIL": (BAD, "X", "✗"),
    "INCONCLUSIVE": (DOUBT, "d", "?"),
    "INCOMPLETE": (DOUBT, "s", "…"),
}


@dataclass(frozen=True)
class Dot:
    """A point with its own name; ``text`` says its values."""

    label: str
    backend: str
    x: float
    y: float
    text: str


def trade_off(name: str, title: str, dots: Sequence[Dot], x_label: str, y_label: str) -> Chart:
    """Points where left and up is better, and a line through those that no other beats in both."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with paper(270, left=42, right=10, top=26, bottom=40) as axes:
        edge = max(dot.x for dot in dots) * 1.12
        axes.set(xlim=(0, edge), ylim=(0, max(dot.y for dot in dots) * 1.15))
        best = undominated(dots)
        across, up = [best[0].x, *(dot.x for dot in best), edge], [0.0, *(dot.y for dot in best), best[-1].y]
        axes.step(across, up, where="post", color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        for dot in dots:
            _point(axes, dot.x, dot.y, dot.label, dot.backend, f"{dot.label}: {dot.text}")
        _names_beside(axes, [(dot.x, dot.y, dot.label) for dot in dots])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.grid(True)
        axes.set_axisbelow(True)
        name_axes(axes, x_label, y_label)
        values = "; ".join(f"{dot.label} {dot.text}" for dot in dots)
        return finished(axes, name, title, f"{values}. Beaten by none in both: {', '.join(dot.label for dot in best)}.")


def undominated(dots: Sequence[Dot]) -> list[Dot]:
    """The Pareto front, by rising x."""
    kept: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.x, -dot.y)):
        if not kept or dot.y > kept[-1].y:
            kept.append(dot)
    return kept


@dataclass(frozen=True)
class Reach:
    """A backend's peak memory (GiB) at context lengths, and how far it comes in each budget (GiB -> tokens)."""

    backend: str
    points: tuple[tuple[int, float], ...]
    longest: dict[float, int]


def reaches(name: str, title: str, series: Sequence[Reach]) -> Chart:
    """Memory against context on logarithmic axes; lines across at the budgets, a ring where a context still fits."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    budgets = sorted({budget for reach in series for budget in reach.longest})
    with paper(290, left=42, right=10, top=50, bottom=40) as axes:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for reach in series:
            if reach.points:
                axes.plot(*zip(*reach.points, strict=True), color=colour(reach.backend), linewidth=1.2)
            for tokens, peak in reach.points:
                tooltip = f"{reach.backend}: {digits(peak)} GiB at {tokens:,} tokens"
                _point(axes, tokens, peak, reach.backend, reach.backend, tooltip, size=6)
            for budget, tokens in reach.longest.items():
                (ring,) = axes.plot([tokens], [budget], "o", color=colour(reach.backend), markersize=11, clip_on=False)
                ring.set(markerfacecolor="none", markeredgewidth=1.8)
                mark(ring, reach.backend, f"{reach.backend}: {tokens:,} tokens fit in {budget:g} GiB")
        for budget in budgets:
            axes.axhline(budget, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))
        axes.yaxis.set_major_locator(FixedLocator(budgets))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.grid(axis="x")
        name_axes(axes, "tokens in one document", "GiB")
        legend(axes, [(reach.backend, reach.backend) for reach in series], key="shape", line_across="budget")
        values = "; ".join(
            f"{reach.backend}: " + ", ".join(f"{tokens:,} tokens in {budget:g} GiB" for budget, tokens in longest)
            for reach in series
            if (longest := sorted(reach.longest.items()))
        )
        return finished(axes, name, title, f"Longest that fits. {values}.")


@dataclass(frozen=True)
class Estimate:
    """A claim's interval on a scale where 1 is the bar and more is better."""

    label: str
    status: str
    text: str
    middle: float | None
    low: float | None
    high: float | None


def margins(name: str, title: str, items: Sequence[Estimate]) -> Chart:
    """Intervals on one logarithmic scale, the bar a line at 1; a claim without an interval shows words only."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    known = [v for item in items for v in (item.low, item.middle, item.high) if v]
    low, high = min([0.8, *(v / 1.15 for v in known)]), max([1.25, *(v * 1.15 for v in known)])
    with paper(36.0 * len(items) + 46, left=12, right=12, top=2, bottom=42) as axes:
        axes.set_xscale("log")
        axes.set(xlim=(low, high), ylim=(len(items) - 0.45, -0.6))
        for position, item in enumerate(items):
            shade, shape, sign = _STATUS[item.status]
            label = f"{sign} {item.label}: {item.text}"
            axes.text(-0.03, position - 0.27, label, transform=axes.get_yaxis_transform(), va="center")
            at = position + 0.17
            axes.plot([1, 1], [at - 0.2, at + 0.2], color=INK, linewidth=1.4)
            if item.low and item.high:
                (line,) = axes.plot([item.low, item.high], [at, at], color=shade, linewidth=3.5, solid_capstyle="butt")
                ends = axes.transData.transform([(item.low, 0), (item.high, 0)])
                if ends[1][0] - ends[0][0] > 1:  # pixel: a narrower one is hidden by its own dot
                    mark(line, item.label, f"{item.label}: {item.status}, {item.text}")
            if item.middle:
                (dot,) = axes.plot([item.middle], [at], shape, color=shade, markersize=7)
                dot.set(markerfacecolor=shade if item.status in ("PASS", "FAIL") else PAPER, markeredgewidth=1.5)
                mark(dot, item.label, f"{item.label}: {item.status}, {item.text}")
        axes.xaxis.set_major_locator(FixedLocator(_spaced(axes, [v for v in _MARGINS if low <= v <= high])))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "the bar" if value == 1 else f"{value:g}×"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_visible(False)
        axes.set_xlabel("times better than the bar asks", loc="right", fontsize=SMALL_SIZE, labelpad=3)
        values = "; ".join(f"{item.label}: {item.status}, {item.text}" for item in items)
        return finished(axes, name, title, f"{values}.")


def _spaced(axes: Axes, ticks: Sequence[float]) -> list[float]:
    """The ticks whose labels do not touch; 1 first, then outwards."""
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda tick: abs(math.log(tick))):
        at = axes.transData.transform((tick, 0))[0]
        if all(abs(at - axes.transData.transform((other, 0))[0]) >= 38 for other in kept):
            kept.append(tick)
    return kept


def _thousands(tokens: float) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"


def _halo() -> dict[str, Any]:
    """A patch of paper behind a text, so that lines do not cross it."""
    return {"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.8}


def _point(axes: Axes, x: float, y: float, label: str, backend: str, tooltip: str, *, size: float = 9) -> None:
    """A mark in its backend's shape, hollow for a variant."""
    (drawn,) = axes.plot([x], [y], marker(backend), color=colour(backend), markersize=size, clip_on=False)
    face = PAPER if is_variant(label, backend) else colour(backend)
    drawn.set(markerfacecolor=face, markeredgewidth=1.6, zorder=3)
    mark(drawn, label, tooltip)


def _names_beside(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside their points: to the left in the right half, moved apart where they would lie on each other."""
    taken: list[float] = []
    for x, y, text in sorted(points, key=lambda p: p[1]):
        across, up = axes.transData.transform((x, y))
        line = up
        while any(abs(line - other) < _LINE_HEIGHT for other in taken):
            line += 1.0
        taken.append(line)
        left = across > WIDTH / 2
        placed: dict[str, Any] = {"ha": "right" if left else "left", "va": "center", "color": INK, "bbox": _halo()}
        axes.annotate(text, (x, y), (-9 if left else 9, line - up), textcoords="offset points", **placed)
