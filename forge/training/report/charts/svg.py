"""Paper for charts: matplotlib figures that become inline SVG in the page's own fonts and colours.

matplotlib draws with stand-in colours which are replaced by CSS variables, so that one drawing is
right in light, dark and print. Figures are drawn at about the width of a phone, where their text has
its natural size; a wider page sets two side by side. Text stays text, ids are unique in the page, and
equal data gives equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from forge.training.backends import BACKENDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 380  # of every chart, in CSS pixels of a phone's page
TEXT_SIZE = 10.5
SMALL_SIZE = 9.5
INK, MUTED, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"
GOOD, BAD, DOUBT = "#010105", "#010106", "#010107"
SERIES = (*BACKENDS, "train", "held-out")  # what a chart compares: backends, or the two losses of one run
SERIES_COLOURS: dict[str, str] = {name: f"#0102{place:02x}" for place, name in enumerate(SERIES)}
_VARIABLES = {
    **{INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", GOOD: "good", BAD: "bad", DOUBT: "doubt"},
    **{colour: name for name, colour in SERIES_COLOURS.items()},
}
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text as text, in the page's font
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": TEXT_SIZE,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": SMALL_SIZE,
    "ytick.color": RULE,
    "ytick.labelcolor": MUTED,
    "ytick.labelsize": SMALL_SIZE,
    "ytick.left": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "patch.linewidth": 0,
    "hatch.linewidth": 0.8,
}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"


@contextmanager
def paper(height: float, *, left: float = 6, right: float = 6, top: float = 8, bottom: float = 26) -> Iterator[Axes]:
    """Axes ``height`` pixels high in all, with margins in pixels. Their figure is ``axes.figure``."""
    import matplotlib
    from matplotlib.figure import Figure

    defaults: dict[Any, Any] = dict(matplotlib.rcParamsDefault)  # not what a matplotlibrc on this machine says
    defaults.update(_SETTINGS, backend="svg")
    with matplotlib.rc_context(defaults):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
        yield figure.add_axes(box)


def mark(artist: Any, series: str, tooltip: str) -> None:
    """Make an artist a mark: a group of class ``mark`` in the SVG that names itself when pointed at."""
    artist.set_gid(f"mark|{series}|{tooltip}")


def to_svg(axes: Axes, name: str, title: str, description: str) -> str:
    """The figure as one ``<svg>`` element to set into HTML. ``name`` must be unique in the page."""
    figure: Figure = axes.figure  # type: ignore[assignment]
    stream = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=empty)
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(stream.getvalue())
    _clean(root, name)
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-labelledby": f"{name}-title {name}-desc"})
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(position, element)
    text = ElementTree.tostring(root, encoding="unicode").replace(f' xmlns="{_SVG}"', "", 1)
    return re.sub(r">\s+<", "><", text)


def _clean(root: ElementTree.Element, name: str) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)  # its style sheet would hold for the whole page
            elif child.tag == f"{{{_SVG}}}defs" and not any(c.tag != f"{{{_SVG}}}style" for c in child):
                parent.remove(child)
    names: dict[str, str] = {}
    for element in root.iter():
        _set_style(element)
        gid = element.get("id")
        if gid is None:
            continue
        if gid.startswith("mark|"):
            _, series, tooltip = gid.split("|", 2)
            del element.attrib["id"]
            element.set("class", "mark")
            element.set("data-series", series)
            caption = ElementTree.Element(f"{{{_SVG}}}title")
            caption.text = tooltip
            element.insert(0, caption)
        else:
            names[gid] = f"{name}-{len(names)}"
            element.set("id", names[gid])
    used = set()
    for element in root.iter():
        if (target := element.attrib.pop(_XLINK, None)) is not None:
            element.set("href", f"#{names[target[1:]]}")
            used.add(names[target[1:]])
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        for key, value in list(element.attrib.items()):
            if key in ("d", "x", "y", "width", "height", "transform"):
                element.set(key, " ".join(re.sub(r"(\.\d\d)\d+", r"\1", value).split()))
            for old in re.findall(r"url\(#([^)]+)\)", value):
                element.set(key, value.replace(f"url(#{old})", f"url(#{names[old]})"))
                used.add(names[old])
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _set_style(element: ElementTree.Element) -> None:
    style = element.get("style")
    for key in ("fill", "stroke"):
        if (colour := element.attrib.pop(key, None)) is not None:
            style = f"{key}: {colour}; {style or ''}"
    if style is None:
        return
    rules = dict(part.strip().split(": ", 1) for part in style.split(";") if ": " in part)
    if (font := rules.pop("font", None)) is not None:
        rules["font-size"] = re.findall(r"[\d.]+px", font)[0]
        if "bold" in font or re.search(r"\b[67]00\b", font):
            rules["font-weight"] = "600"
    rules.pop("font-family", None)
    for key, value in rules.items():
        if value in _VARIABLES:
            rules[key] = f"var(--{_VARIABLES[value]})"
    element.set("style", ";".join(f"{key}:{value}" for key, value in rules.items()))
