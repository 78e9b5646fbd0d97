"""The report as a file: self-contained, escaped, readable in both schemes, the same bytes every time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from forge.training.backends import BACKENDS
from forge.training.report.charts.style import LOOKS
from tests.support.html_page import Page
from tests.support.recorded_gate import small_gate
from tests.support.report_pages import report_of, whole


def test_the_page_asks_for_nothing_beside_itself() -> None:
    _, page, _ = whole()
    parsed = Page(page)
    assert not {"script", "iframe", "img", "object", "embed", "image"} & {tag for tag, _ in parsed.elements}
    assert all(link.startswith(("#", "data:")) for link in parsed.values("href"))
    assert not parsed.values("src")
    assert "url(http" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_charts_name_themselves_and_share_no_id() -> None:
    _, page, _ = whole()
    parsed = Page(page)
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    charts = [attributes for tag, attributes in parsed.elements if tag == "svg"]
    assert len(charts) > 15
    for chart in charts:
        assert chart["role"] == "img"
        assert set(chart["aria-labelledby"].split()) <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert "#0101" not in page  # stand-ins for colours that a scheme gives
    assert "#0102" not in page


def test_equal_evidence_gives_equal_bytes() -> None:
    gate, page, markdown = whole()
    assert report_of(gate) == (page, markdown)


def test_names_are_text_whatever_they_hold(tmp_path: Path) -> None:
    from markdown_it import MarkdownIt

    hostile = 'a|b <script>alert(1)</script> $x^2$ `c` \x07 "d" [e](http://x) _f_ \ud800'
    gate = small_gate(tmp_path)
    for entry in gate.entries:
        if entry["extra_info"].get("arm") == "unsloth":
            entry["extra_info"]["arm"] = hostile
    gate.entry("not_run/x", "not_run", what=hostile, reason="</table><h1>PASS</h1>")
    page, markdown = report_of(gate)
    parsed = Page(page)
    assert "script" not in {tag for tag, _ in parsed.elements}
    assert [tag for tag, _ in parsed.elements].count("h1") == 1
    assert "<script>alert(1)</script> $x^2$" in parsed.text
    rendered = MarkdownIt("commonmark").enable("table").render(markdown)
    assert "<script>" not in rendered
    assert "http://x" not in Page(rendered).values("href")
    assert "a|b &lt;script&gt;alert(1)&lt;/script&gt; $x^2$ `c`" in rendered


def test_every_row_of_the_markdown_has_as_many_cells_as_its_table() -> None:
    _, _, markdown = whole()
    tables = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert len(tables) > 20
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(colour: str, paper: str) -> float:
    bright, dark = sorted((_luminance(colour), _luminance(paper)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_colours_are_readable_in_light_and_dark_whatever_the_number_of_backends() -> None:
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for the marks of charts."""
    _, page, _ = whole()
    blocks = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", page, re.S)
    ]
    assert [block.keys() for block in blocks[2:]] == [set(BACKENDS)] * 2
    for scheme, text in (("light", blocks[0]), ("dark", blocks[1])):
        for name in ("ink", "muted", "good", "bad", "doubt"):
            assert _contrast(text[name], text["paper"]) >= 4.5, name
        for look in LOOKS:
            assert _contrast(getattr(look, scheme), text["paper"]) >= 3.0, look
    assert len({look.marker for look in LOOKS}) == len({look.light for look in LOOKS}) == len(LOOKS) > len(BACKENDS)


def test_the_report_is_loaded_without_torch_and_without_charts() -> None:
    code = "import sys, harness.report.__main__; print(sorted({'torch', 'matplotlib', 'scipy'} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
