"""Reports made of synthetic gates, and a page taken apart."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from typing import Any

from harness.report.__main__ import main
from tests.support.recorded_gate import Gate, whole_gate
from tests.support.tiny_model import scratch

SECTIONS = (
    *("verdicts", "parity", "training", "pareto", "phases", "context", "losses", "projection"),
    *("ablation", "matmul-peak", "export", "reliability", "environment", "missing", "runs"),
)


class Page(HTMLParser):
    """What the tests look at: elements with their attributes, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


def report_of(gate: Gate, **top: Any) -> tuple[str, str]:
    """The HTML and the Markdown that the command writes, with plain spaces."""
    out = gate.directory / "out"
    assert main([str(gate.write(**top)), "-o", str(out)]) == 0
    page, markdown = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    return page.replace("\u00a0", " "), markdown


@cache
def whole() -> tuple[Gate, str, str]:
    directory = scratch() / "gate"
    directory.mkdir()
    gate = whole_gate(directory)
    return gate, *report_of(gate)


def status_of(page: str) -> str:
    """The headline's class, which gives it its colour."""
    return re.findall(r'<h1 class="(\w+)">', page)[0]
