"""A report as HTML and as Markdown: one content, two templates, every value escaped for the page it stands on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from harness.report.charts.style import colour_variables
from harness.report.page.content import Chart, Report, Table, printable

SIGNS = {"PASS": "✓", "FAIL": "✗", "INCONCLUSIVE": "?", "INCOMPLETE": "…"}
MEANINGS = {
    "PASS": "Every claim holds.",
    "FAIL": "At least one claim does not hold.",
    "INCONCLUSIVE": "Not a pass: at least one interval does not decide.",
    "INCOMPLETE": "Not a pass: not everything was measured.",
}
_TEMPLATES = Path(__file__).parents[1] / "templates"
_MARKDOWN = re.compile(r"([\\`*\[\]<>|~&#]|(?<![^\W_])_|_(?![^\W_]))")  # an underscore inside a word is harmless


def render_html(report: Report) -> str:
    """One page that needs nothing beside it."""
    style = Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8") + colour_variables())
    return _environment("html").get_template("report.html.j2").render(report=report, style=style)


def render_markdown(report: Report) -> str:
    """The same sections and tables without the charts."""
    text = _environment("markdown").get_template("report.md.j2").render(report=report)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@cache
def _environment(kind: str) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=escape_markdown if kind == "markdown" else escape_html,
    )
    environment.globals.update(signs=SIGNS, meanings=MEANINGS)
    environment.filters.update(by_key=runs_by_key, blocks=blocks)
    environment.tests.update(chart=lambda part: isinstance(part, Chart))
    return environment


def escape_html(value: Any) -> Markup:
    """A value as text of a page; autoescape alone would let control characters through."""
    return value if isinstance(value, Markup) else escape(printable(str(value)))


def escape_markdown(value: Any) -> Markup:
    """A value as plain text inside a line of GitHub-flavoured Markdown, also inside a table's cell."""
    if isinstance(value, Markup):
        return value
    return Markup(_MARKDOWN.sub(r"\\\1", " ".join(printable(str(value)).split())))


def runs_by_key(run_ids: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Run ids as (key, counts): ``abc-0001, abc-0003`` becomes ``abc: 0001 0003``."""
    by_key: dict[str, list[str]] = {}
    for run_id in run_ids:
        key, _, number = run_id.rpartition("-")
        by_key.setdefault(key, []).append(number)
    return list(by_key.items())


def blocks(parts: Iterable[Chart | Table]) -> list[tuple[str, list[Chart | Table]]]:
    """What stands side by side: ``charts``, a ``pair`` of a chart and its table, or a ``table`` alone."""
    made: list[tuple[str, list[Chart | Table]]] = []
    for part in parts:
        kind, before = made[-1] if made else ("", [])
        if isinstance(part, Chart) and kind == "charts":
            before.append(part)
        elif isinstance(part, Chart):
            made.append(("charts", [part]))
        elif part.is_beside and kind == "charts" and len(before) == 1:
            made[-1] = ("pair", [*before, part])
        else:
            made.append(("table", [part]))
    return made
