"""A Jupyter notebook as Markdown: its cells and what they printed, without pictures."""

from __future__ import annotations

import json
import re
from typing import Any

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # colours in a traceback
_DATA_URI = re.compile(r"(data:[\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,)[A-Za-z0-9+/=_-]{64,}")
_BACKTICKS = re.compile(r"`{3,}")


def fenced(text: str, language: str = "") -> str:
    """Text in a Markdown fence that is longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, _BACKTICKS.findall(text)), default=0))
    end = "" if text.endswith("\n") else "\n"
    return f"{fence}{language}\n{text}{end}{fence}\n"


def without_pictures(text: str) -> tuple[str, int]:
    """Text whose base64 data URIs are cut off after ``base64,``, and their number."""
    return _DATA_URI.subn(r"\1...", text)


def notebook_as_markdown(content: str) -> tuple[str, int]:
    """A notebook of format 3 or 4 as Markdown, and the number of pictures left out.

    https://nbformat.readthedocs.io/en/latest/format_description.html. Raises :class:`ValueError` for what is none.
    """
    notebook = json.loads(content)
    if not isinstance(notebook, dict):
        raise ValueError("it is not a JSON object")
    cells = notebook.get("cells")
    if cells is None and isinstance(notebook.get("worksheets"), list):  # format 3
        cells = [cell for sheet in notebook["worksheets"] for cell in _list(_mapping(sheet).get("cells"))]
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise ValueError("it has no list of cells")
    metadata = _mapping(notebook.get("metadata"))
    language = _mapping(metadata.get("language_info")).get("name") or _mapping(metadata.get("kernelspec")).get(
        "language"
    )
    parts: list[str] = []
    num_pictures = 0
    for cell in cells:
        source = _text(cell.get("source", cell.get("input")))
        if cell.get("cell_type") != "code":
            level = cell.get("level") if cell.get("cell_type") == "heading" else None
            parts.append(f"{'#' * min(level, 6)} {source}" if isinstance(level, int) else source)
        else:
            parts.append(fenced(source, str(cell.get("language") or language or "python")) if source.strip() else "")
        num_pictures += len(_mapping(cell.get("attachments")))
        for output in _list(cell.get("outputs")):
            text, has_picture = _output(_mapping(output))
            num_pictures += has_picture
            parts.append(fenced(text) if text.strip() else "")
    text, num_inline = without_pictures("\n\n".join(part.strip("\n") for part in parts if part.strip()))
    return (text + "\n" if text else ""), num_pictures + num_inline


def _output(output: dict[str, Any]) -> tuple[str, bool]:
    """What an output says in plain text, and whether it has a picture."""
    bundle = _mapping(output.get("data")) or output  # format 3 has no bundle
    has_picture = any(name.startswith("image/") or name in ("png", "jpeg", "svg") for name in bundle)
    if "traceback" in output:
        return _ESCAPES.sub("", "\n".join(map(str, _list(output["traceback"])))), has_picture
    plain = bundle.get("text/markdown") or bundle.get("text/plain") or bundle.get("text")
    return _ESCAPES.sub("", _text(plain)), has_picture


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    """A multi-line string of the format: one string or a list of lines."""
    if isinstance(value, list):
        return "".join(map(str, value))
    return "" if value is None else str(value)
