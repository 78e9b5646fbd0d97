"""A report as one HTML page that needs nothing beside it, every value escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from forge.training.report.charts.style import colour_variables
from forge.training.report.page.content import Chart, Listing, Part, Section, Table, printable

SIGNS = {"PASS": "✓", "FAIL": "✗", "INCONCLUSIVE": "?", "INCOMPLETE": "…"}
TEMPLATES = Path(__file__).parents[1] / "templates"


@dataclass(frozen=True)
class Page:
    """``kicker`` stands above the heading, ``facts`` below ``lead``. ``status``: a verdict that colours the heading."""

    kicker: str
    heading: str
    lead: str
    headline: str  # the page's description, without markup
    facts: tuple[str, ...]
    sections: tuple[Section, ...]
    status: str | None = None


def render_page(page: Page, series: Sequence[str], *, style: str = "") -> str:
    """The page. ``series``: those that its charts compare; ``style``: CSS besides the shared one."""
    shared = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    css = Markup(shared + style + colour_variables(series))
    environment = template_environment(TEMPLATES, escape_html)
    return environment.get_template("page.html.j2").render(page=page, style=css)


def template_environment(folder: Path, finalize: Callable[[Any], Markup]) -> Environment:
    """Jinja's environment for the templates of a folder; ``finalize`` escapes every value."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
    environment.globals.update(signs=SIGNS)
    environment.filters.update(by_key=runs_by_key, blocks=blocks)
    environment.tests.update(chart=lambda part: isinstance(part, Chart), listing=lambda part: isinstance(part, Listing))
    return environment


def escape_html(value: Any) -> Markup:
    """A value as text of a page; autoescape alone would let control characters through."""
    return value if isinstance(value, Markup) else escape(printable(str(value)))


def runs_by_key(run_ids: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Run ids as (key, counts): ``abc-0001, abc-0003`` becomes ``abc: 0001 0003``."""
    by_key: dict[str, list[str]] = {}
    for run_id in run_ids:
        key, _, number = run_id.rpartition("-")
        by_key.setdefault(key, []).append(number)
    return list(by_key.items())


def blocks(parts: Iterable[Part]) -> list[tuple[str, list[Part]]]:
    """What stands side by side: ``charts``, a ``pair`` of a chart and its table; a ``table`` or ``listing`` alone."""
    made: list[tuple[str, list[Part]]] = []
    for part in parts:
        kind, before = made[-1] if made else ("", [])
        if isinstance(part, Chart) and kind == "charts":
            before.append(part)
        elif isinstance(part, Chart):
            made.append(("charts", [part]))
        elif isinstance(part, Table) and part.is_beside and kind == "charts" and len(before) == 1:
            made[-1] = ("pair", [*before, part])
        else:
            made.append(("table" if isinstance(part, Table) else "listing", [part]))
    return made
