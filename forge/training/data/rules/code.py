"""What code says of itself: declarations, docstrings, constants. Python by its own parser, others by line."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_WORDS = "class|struct|enum|trait|interface|protocol|record|type|func|fn|function|fun|def|module|namespace"
_DECLARATION = re.compile(
    r"^[ \t]*(?:(?:pub(?:\([^)\n]*\))?|export|default|async|static|public|private|protected|final|abstract|open|data"
    rf"|unsafe|const|override|suspend)\s+)*(?:{_WORDS})\s+(?:\([^)\n]*\)\s*)?(?P<name>[A-Za-z_]\w+)[^\n]*",
    re.MULTILINE,
)
_LANGUAGES = frozenset(
    {"c", "cpp", "c++", "csharp", "cs", "cuda", "dart", "go", "java", "javascript", "js", "jsx", "julia", "kotlin"}
    | {"lua", "php", "r", "ruby", "rb", "rust", "rs", "scala", "swift", "typescript", "ts", "tsx", "zig", "elixir"}
)
_PYTHON = frozenset({"python", "py", "python3", "pyi"})
_MOST_DECLARATION = 400  # characters
_MOST_VALUE = 120


@dataclass(frozen=True, slots=True)
class Named:
    """Something that code names, and what it says of it, as it is written. ``line``: from 0, in the code."""

    what: Literal["declaration", "docstring", "constant"]
    name: str
    text: str
    line: int


def named_things(language: str, code: str) -> list[Named]:
    """In order. Empty for a language that is not read, such as shell, or data."""
    if language in _PYTHON:
        found = _python(code)
        return found if found is not None else list(_by_line(code))
    return list(_by_line(code)) if language in _LANGUAGES else []


def _python(code: str) -> list[Named] | None:
    """``None`` for code that does not parse: an excerpt, Python 2."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that a later Python will refuse
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    lines = code.split("\n")
    return list(_of_body(tree.body, "", code, lines))


def _of_body(body: list[ast.stmt], prefix: str, code: str, lines: list[str]) -> Iterator[Named]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = prefix + node.name
            inside = node.body[0]
            first, last = node.lineno - 1, max(node.lineno, inside.lineno - 1)
            text = "\n".join(lines[first:last]).strip()
            head = (
                text[: text.rfind(":")] if last < inside.lineno and ":" in text else ""
            )  # a body on the same line: none
            if head and len(head) <= _MOST_DECLARATION and "\n\n" not in head and "#" not in head:
                yield Named("declaration", name, head, first)
            says = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if says:
                yield Named("docstring", name, says, inside.lineno - 1)
            if isinstance(node, ast.ClassDef) and not prefix:
                yield from _of_body(node.body, f"{node.name}.", code, lines)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant | ast.UnaryOp):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            value = ast.get_source_segment(code, node.value)
            if isinstance(target, ast.Name) and target.id.isupper() and value and len(value) <= _MOST_VALUE:
                yield Named("constant", prefix + target.id, value, node.lineno - 1)


def _by_line(code: str) -> Iterator[Named]:
    for match in _DECLARATION.finditer(code):
        text = match[0].strip().removesuffix("{").removesuffix(";").rstrip()
        text = text[: text.index(" {")] if " {" in text else text
        if len(text) <= _MOST_DECLARATION and not text.endswith((",", "(", "=")):
            yield Named(
                "declaration", match["name"], text.removesuffix(":").rstrip(), code.count("\n", 0, match.start())
            )
