"""Text that every machine with a Python has: its documentation and its docstrings."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
_SHORTEST = 80  # characters: a shorter docstring says no more than its name


def documentation() -> list[tuple[str, str]]:
    """The language reference's topics, as (title, text), sorted by title."""
    from pydoc_data.topics import topics

    return [(f"the Python topic `{name}`", topics[name].strip()) for name in sorted(topics)]


def docstrings() -> Iterator[tuple[str, str]]:
    """The standard library's docstrings, as (qualified name, text), in the order of files and lines."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        yield from _docstrings_of(tree, module)


def _docstrings_of(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented):
        text = ast.get_docstring(node)
        if text and len(text) >= _SHORTEST:
            yield f"`{name}`", text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, documented):
            yield from _docstrings_of(child, f"{name}.{child.name}")  # type: ignore[union-attr]
