"""Charts of deviations: a run's curve within a band of noise, and paired differences against a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forge.training.report.charts.style import colour, finished, legend, name_axes
from forge.training.report.charts.svg import GOOD, INK, MUTED, SMALL_SIZE, mark, paper
from forge.training.report.page.content import Chart


def within_band(
    name: str,
    title: str,
    names: tuple[str, str],
    middle: Sequence[float],
    half_width: Sequence[float],
    values: Sequence[float],
    y_label: str,
    description: str,
) -> Chart:
    """Over steps from 1: the baseline's mean, the band around it, and the candidate's line."""
    from matplotlib.ticker import MaxNLocator

    baseline, candidate = names
    steps = range(1, len(middle) + 1)
    with paper(256, left=56, right=8, top=50, bottom=40) as axes:
        low, high = ([m + sign * h for m, h in zip(middle, half_width, strict=True)] for sign in (-1, 1))
        band = axes.fill_between(steps, low, high, color=colour(baseline), alpha=0.3, linewidth=0)
        mark(band, baseline, f"band of {baseline}'s own rounding")
        axes.plot(steps, middle, color=colour(baseline), linewidth=1)
        (line,) = axes.plot(steps, values, color=colour(candidate), linewidth=1.3)
        mark(line, candidate, f"{candidate}: {values[0]:.4g} at step 1, {values[-1]:.4g} at step {len(values)}")
        axes.margins(x=0.02, y=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(useOffset=False)
        axes.grid(axis="y")
        name_axes(axes, "optimizer step", y_label)
        legend(axes, [(baseline, baseline), (candidate, candidate)], key="swatch")
        return finished(axes, name, title, description)


@dataclass(frozen=True)
class Difference:
    """``low``, ``high``: an interval around it, where it has one."""

    label: str
    middle: float
    low: float | None = None
    high: float | None = None


def differences(name: str, title: str, items: Sequence[Difference], margin: float | None) -> Chart:
    """Paired differences, one per row, with a line at 0; ``margin``: how far from 0 is still equal."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    is_long = len(items) > 16  # then rows have no names
    row = 6.0 if is_long else 19.0
    with paper(row * len(items) + 60, left=8 if is_long else 60, right=12, top=8, bottom=40) as axes:
        axes.set(ylim=(len(items) - 0.4, -0.6))
        if margin is not None:
            area = axes.axvspan(-margin, margin, color=GOOD, alpha=0.15, linewidth=0)
            mark(area, "margin", f"equal: within {margin:g} nats per token")
        axes.axvline(0, color=INK, linewidth=1)
        for position, item in enumerate(items):
            if item.low is not None and item.high is not None:
                axes.plot([item.low, item.high], [position] * 2, color=INK, linewidth=3, solid_capstyle="butt")
            (dot,) = axes.plot([item.middle], [position], "o", color=MUTED if item.low is None else INK)
            dot.set(markersize=3 if is_long else 6, clip_on=False)
            interval = "" if item.low is None else f" ({item.low:+.4f} to {item.high:+.4f})"
            mark(dot, item.label, f"{item.label}: {item.middle:+.4f}{interval}")
        axes.set_yticks([] if is_long else range(len(items)), [] if is_long else [item.label for item in items])
        axes.tick_params(axis="y", labelsize=SMALL_SIZE)
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g}" if value else "0"))
        axes.grid(axis="x")
        axes.set_xlabel("nats per token; below 0 is better", loc="right", fontsize=SMALL_SIZE, labelpad=3)
        ends = f"from {min(i.middle for i in items):+.4f} to {max(i.middle for i in items):+.4f}"
        within = f"; margin {margin:g}" if margin is not None else ""
        return finished(axes, name, title, f"{len(items)} differences {ends} nats per token{within}.")
