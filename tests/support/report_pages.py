"""Reports made of synthetic gates."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from harness.report.__main__ import main
from tests.support.recorded_gate import Gate, whole_gate
from tests.support.tiny_model import scratch

SECTIONS = (
    *("verdicts", "parity", "training", "pareto", "phases", "context", "losses", "projection"),
    *("ablation", "matmul-peak", "export", "reliability", "environment", "missing", "runs"),
)


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
