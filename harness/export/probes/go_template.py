"""The part of Go's text/template that Forge's Modelfiles use, rendered as Ollama does.

It has what is needed to check a template against the tokenizer's: ``if`` and ``if not`` of a field, ``range`` over a
field, fields, ``end``, and the dashes that trim white space (https://pkg.go.dev/text/template). Everything else is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from forge.training.system.errors import CheckError

_SPACE = "[ \\t\\r\\n]*"  # what a dash trims
_ACTION = re.compile(rf"(?:{_SPACE}\{{\{{-\s|\{{\{{)\s*(.*?)\s*(?:\s-\}}\}}{_SPACE}|\}}\}})", re.DOTALL)
_KNOWN = re.compile(r"(?:(if|if\s+not|range)\s+)?\.([A-Z][A-Za-z]*)")
_Node = str | tuple[str, str, list["_Node"]]  # a text; or command ("" writes the field), field and what is inside


def render_chat(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """The text of a conversation by a chat template, up to the answer.

    The template's data are Ollama's: ``.Messages`` are all messages, ``.System`` is the system messages' text. Raises
    :class:`CheckError` for an action that is not supported here.
    """
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    listed = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    nodes = _parse(iter(_ACTION.split(template)), is_open=False)
    return _render(nodes, {"System": system, "Messages": listed})


def _parse(parts: Iterator[str], *, is_open: bool) -> list[_Node]:
    """The nodes up to the matching ``end``. ``parts``: text and action in turn. ``is_open``: an ``end`` must come."""
    nodes: list[_Node] = [next(parts)]
    for action in parts:
        if action == "end" and is_open:
            return nodes
        if action == "end":
            raise CheckError("the template has an {{ end }} too many")
        known = _KNOWN.fullmatch(action)
        if known is None:
            raise CheckError(f"the template's {{{{ {action} }}}} is more than Forge renders")
        command = " ".join((known[1] or "").split())
        nodes += [(command, known[2], _parse(parts, is_open=True) if command else []), next(parts)]
    if is_open:
        raise CheckError("the template lacks an {{ end }}")
    return nodes


def _render(nodes: list[_Node], dot: Mapping[str, Any]) -> str:
    """``dot``: the fields at hand."""
    out = ""
    for node in nodes:
        if isinstance(node, str):
            out += node
            continue
        command, field, inner = node
        if field not in dot:
            raise CheckError(f"the template asks for .{field}, which Ollama does not give it")
        if command == "range":
            out += "".join(_render(inner, item) for item in dot[field])
        elif command:
            out += _render(inner, dot) if bool(dot[field]) == (command == "if") else ""
        else:
            out += str(dot[field])
    return out
