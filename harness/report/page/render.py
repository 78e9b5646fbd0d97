"""A report as HTML and as Markdown: one content, two templates, every value escaped for the page it stands on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from forge.training.backends import BACKENDS
from forge.training.report.page.content import printable
from forge.training.report.page.render import Page, render_page, template_environment
from harness.report.page.gate_report import Report

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
    page = Page(
        kicker="Forge, acceptance gate",
        heading=report.status,
        lead=f"{MEANINGS[report.status]} {report.headline}",
        headline=report.headline,
        facts=report.facts,
        sections=report.sections,
        status=report.status,
    )
    return render_page(page, BACKENDS)


def render_markdown(report: Report) -> str:
    """The same sections and tables without the charts."""
    environment = template_environment(_TEMPLATES, escape_markdown)
    text = environment.get_template("report.md.j2").render(report=report, meanings=MEANINGS)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def escape_markdown(value: Any) -> Markup:
    """A value as plain text inside a line of GitHub-flavoured Markdown, also inside a table's cell."""
    if isinstance(value, Markup):
        return value
    return Markup(_MARKDOWN.sub(r"\\\1", " ".join(printable(str(value)).split())))
