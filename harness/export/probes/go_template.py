"""The part of Go's text/template that Forge's Modelfiles use, rendered as Ollama does.

It has what is needed to check a template against the tokenizer's: ``if`` and ``if not`` of a field, ``range`` over a
field, fields, ``end``, and the dashes that trim white space (https://pkg.go.dev/text/template). Everything else is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from forge.training.system.errors import CheckError

_ACTION = re.compile(r"\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}", re.DOTALL)
_FIELD = re.compile(r"\.([A-Z][A-Za-z]*)")
_SPACE = " \t\r\n"  # what Go's trim markers take


def render_chat(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """The text of a conversation by a chat template, up to the answer.

    The template's data are Ollama's: ``.Messages`` are all messages, ``.System`` is the system messages' text. Raises
    :class:`CheckError` for an action that is not supported here.
    """
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    listed = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    text, rest = _render(_parse(template), {"System": system, "Messages": listed}, is_open=False)
    assert not rest
    return text


def _parse(template: str) -> list[tuple[str, str]]:
    """("text" | "action", content) in order, with white space trimmed where dashes say so."""
    parts: list[tuple[str, str]] = []
    position, trims_next = 0, False
    for match in _ACTION.finditer(template):
        text = template[position : match.start()]
        text = text.lstrip(_SPACE) if trims_next else text
        parts += [("text", text.rstrip(_SPACE) if match[1] else text), ("action", match[2])]
        position, trims_next = match.end(), bool(match[3])
    last = template[position:]
    return [*parts, ("text", last.lstrip(_SPACE) if trims_next else last)]


def _render(
    parts: list[tuple[str, str]], dot: Mapping[str, Any], *, is_open: bool, skip: bool = False
) -> tuple[str, list[tuple[str, str]]]:
    """The text up to the matching ``end``, and the parts that follow it. ``skip``: parse without evaluating.

    ``dot``: the fields at hand. ``is_open``: whether an ``end`` must come.
    """
    out = ""
    while parts:
        (kind, content), parts = parts[0], parts[1:]
        words = content.split()
        if kind == "text":
            out += content
        elif words == ["end"]:
            if not is_open:
                raise CheckError("the template has an {{ end }} too many")
            return out, parts
        elif words and words[0] == "if" and len(words) in (2, 3) and words[1:-1] in ([], ["not"]):
            holds = bool(_field(words[-1], dot, skip)) != (len(words) == 3)
            text, parts = _render(parts, dot, is_open=True, skip=skip or not holds)
            out += text if holds else ""
        elif words and words[0] == "range" and len(words) == 2:
            items = _field(words[1], dot, skip)
            texts, after = [], _render(parts, {}, is_open=True, skip=True)[1]
            for item in items or []:
                texts.append(_render(parts, item, is_open=True, skip=skip)[0])
            out, parts = out + "".join(texts), after
        elif len(words) == 1:
            out += str(_field(words[0], dot, skip))
        else:
            raise CheckError(f"the template's {{{{ {content} }}}} is more than Forge renders")
    if is_open:
        raise CheckError("the template lacks an {{ end }}")
    return out, parts


def _field(word: str, dot: Mapping[str, Any], skip: bool) -> Any:
    match = _FIELD.fullmatch(word)
    if match is None:
        raise CheckError(f"the template's {{{{ {word} }}}} is more than Forge renders")
    if skip:
        return ""
    if match[1] not in dot:
        raise CheckError(f"the template asks for .{match[1]}, which Ollama does not give it")
    return dot[match[1]]
