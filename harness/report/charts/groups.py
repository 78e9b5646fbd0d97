"""Charts of upright bars: one value per arm and phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from forge.training.report.charts.style import colour, finished, is_variant, legend, name_axes
from forge.training.report.charts.svg import INK, SMALL_SIZE, mark, paper
from forge.training.report.page.content import Chart


def groups(
    name: str,
    title: str,
    categories: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    unit: str,
    show: Callable[[float], str],
    reference: tuple[float, str] | None = None,
) -> Chart:
    """Upright bars: ``series`` of (label, backend, one value per category), a line across for ``reference``."""
    from matplotlib.ticker import MaxNLocator

    values = [value for *_, row in series for value in row if value is not None]
    with paper(256, left=30, right=6, top=50, bottom=24) as axes:
        most = max([*values, reference[0] if reference else 0.0], default=0.0)
        axes.set(xlim=(-0.5, len(categories) - 0.5), ylim=(0, most * 1.1 or 1.0))
        width = 0.84 / len(series)
        size = SMALL_SIZE if len(values) <= 10 else 8
        for place, (label, backend, row) in enumerate(series):
            for position, value in enumerate(row):
                if value is None:
                    continue
                at = position - 0.42 + width * (place + 0.5)
                (drawn,) = axes.bar(at, value, width=width * 0.86, color=colour(backend))
                drawn.set_alpha(0.55 if is_variant(label, backend) else 1)
                mark(drawn, label, f"{label}, {categories[position]}: {show(value)} {unit}")
                written: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": size, "color": INK}
                axes.annotate(show(value), (at, value), (0, 2), textcoords="offset points", **written)
        if reference:
            axes.axhline(reference[0], color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        axes.set_xticks(range(len(categories)), categories)
        axes.tick_params(axis="x", length=0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        name_axes(axes, "", unit)
        legend(
            axes, [(label, backend) for label, backend, _ in series], line_across=reference[1] if reference else None
        )
        line = f" Line: {reference[1]}." if reference else ""
        return finished(axes, name, title, f"In {unit}. {_in_words(categories, series, show)}.{line}")


def _in_words(categories: Sequence[str], series: Sequence[tuple[str, str, Sequence[float | None]]], show: Any) -> str:
    return "; ".join(
        f"{label}: " + ", ".join(f"{c} {show(v)}" for c, v in zip(categories, row, strict=True) if v is not None)
        for label, _, row in series
    )
