"""Charts of lines over steps."""

from __future__ import annotations

from collections.abc import Sequence

from forge.training.report.charts.style import colour, finished, legend, line_style, marker, name_axes
from forge.training.report.charts.svg import mark, paper
from forge.training.report.page.content import Chart


def curves(
    name: str,
    title: str,
    series: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    x_label: str,
    y_label: str,
    description: str,
) -> Chart:
    """Lines over steps: ``series`` of (label, backend, points). Dashes tell lines apart that lie on each other."""
    from matplotlib.ticker import MaxNLocator

    with paper(256, left=42, right=8, top=50, bottom=40) as axes:
        for label, backend, points in series:
            xs, ys = zip(*points, strict=True)
            shape = marker(backend) if len(xs) == 1 else ""  # one point is no line
            (line,) = axes.plot(xs, ys, marker=shape, color=colour(backend), **line_style(label, backend))
            mark(line, label, f"{label}: {ys[0]:.3f} at step {xs[0]:g}, {ys[-1]:.3f} at step {xs[-1]:g}")
        axes.margins(x=0.02, y=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(useOffset=False)
        axes.grid(axis="y")
        name_axes(axes, x_label, y_label)
        legend(axes, [(label, backend) for label, backend, _ in series], key="line")
        return finished(axes, name, title, description)
