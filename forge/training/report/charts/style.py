"""What the charts share: how each series looks, legends, axis titles.

Colour is never the only sign: a mark is labelled, or has a shape or a line style of its own. Looks are dealt out to
the list of backends in order: a new backend takes the next one. The losses of one run have their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from forge.training.backends import BACKENDS
from forge.training.report.charts import svg
from forge.training.report.charts.svg import INK, MUTED, SERIES_COLOURS, SMALL_SIZE, WIDTH
from forge.training.report.page.content import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Look(NamedTuple):
    """How a series is drawn. ``light``, ``dark``: colours on paper of that kind. ``line``: style of its lines."""

    light: str
    dark: str
    marker: str
    line: dict[str, Any]


LOOKS = (
    Look("#77736b", "#a19c92", "o", {"linewidth": 5, "alpha": 0.45, "solid_capstyle": "round"}),
    Look("#2f68b1", "#7db0f0", "s", {"linewidth": 2.2, "linestyle": (0, (4, 2))}),
    Look("#b84a14", "#f0925c", "^", {"linewidth": 1.3}),
    Look("#6b4fa0", "#b9a0ec", "v", {"linewidth": 1.8, "linestyle": (0, (6, 2, 1, 2))}),
    Look("#1f7a72", "#62c7bd", "P", {"linewidth": 2.2, "linestyle": (0, (2, 2))}),
    Look("#a3286f", "#ef8dc2", "p", {"linewidth": 1.3, "linestyle": (0, (8, 3))}),
)
_LOOK_OF: dict[str, Look] = {
    **dict(zip(BACKENDS, cycle(LOOKS), strict=False)),
    "train": Look("#8d8980", "#8f8a80", "o", {"linewidth": 1.1}),
    "held-out": Look("#2f68b1", "#7db0f0", "s", {"linewidth": 2.2}),
}
_VARIANT = {"linewidth": 1.6, "linestyle": (0, (1, 1.5))}
_CHARACTER = 0.56  # mean width of a character, in text sizes; generous, since the page's font is not known here


def colour_variables(series: Sequence[str]) -> str:
    """The colours of those series as CSS: a variable each, for light and for dark pages."""
    light, dark = (
        " ".join(f"--{name}: {getattr(_LOOK_OF[name], scheme)};" for name in series) for scheme in ("light", "dark")
    )
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def colour(backend: str) -> str:
    return SERIES_COLOURS.get(backend, MUTED)


def marker(backend: str) -> str:
    return _LOOK_OF[backend].marker if backend in _LOOK_OF else "D"


def is_variant(label: str, backend: str) -> bool:
    """Whether an arm is a backend in another layout than its plain arm: drawn hollow, paler or dash-dotted."""
    return label != backend


def line_style(label: str, backend: str) -> dict[str, Any]:
    """Lines that lie on each other are all seen: they differ in width and dashes."""
    own = _LOOK_OF[backend].line if backend in _LOOK_OF else {}
    return {"dash_capstyle": "butt", **(_VARIANT if is_variant(label, backend) else own)}


def text_width(text: str, size: float) -> float:
    """About how many pixels a text takes."""
    return len(text) * size * _CHARACTER


def legend(
    axes: Axes,
    entries: Sequence[tuple[str, str]],
    *,
    key: Literal["swatch", "shape", "line"] = "swatch",
    line_across: str | None = None,
) -> None:
    """The names of series (label, backend) in rows above the axes; ``line_across`` names a broken line."""
    left, top = axes.transAxes.transform((0, 1))
    x, up = 0.0, 37.0
    for label, backend in [*entries, *([(line_across, "")] if line_across else [])]:
        width = 22 if key == "line" or not backend else 15
        needed = width + text_width(label, SMALL_SIZE) + 8
        if x + needed > WIDTH and x > 0:
            x, up = 0.0, up - 12.5
        style: dict[str, Any] = {"transform": None, "clip_on": False, "color": colour(backend)}
        if not backend:
            axes.plot([x, x + 17], [top + up] * 2, **{**style, "color": INK}, linewidth=1.1, linestyle=(0, (4, 2)))
        elif key == "line":
            axes.plot([x, x + 17], [top + up] * 2, **style, **line_style(label, backend))
        else:
            shape = marker(backend) if key == "shape" else "s"
            (drawn,) = axes.plot([x + 5], [top + up], shape, **style)
            drawn.set(markersize=8, alpha=0.55 if is_variant(label, backend) else 1, markeredgewidth=0)
        written: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "va": "center",
            "color": INK,
        }
        axes.annotate(label, (0, 1), (x - left + width, up - 0.5), fontsize=SMALL_SIZE, **written)
        x += needed


def name_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """The unit of y stands flat above its axis, that of x below its right end."""
    at = (1 - axes.transAxes.transform((0, 1))[0], 7)
    written: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "color": MUTED}
    axes.annotate(y_label, (0, 1), at, fontsize=SMALL_SIZE, **written)
    axes.set_xlabel(x_label, loc="right", fontsize=SMALL_SIZE, labelpad=3)


def finished(axes: Axes, name: str, title: str, description: str) -> Chart:
    return Chart(name, title, description, svg.to_svg(axes, name, title, description))
