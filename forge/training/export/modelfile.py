"""Ollama's Modelfile, written and then read back by a parser of Ollama's own grammar.

Grammar and parameters: Ollama's parser/parser.go and docs/modelfile, as of August 2026.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge.training.system.errors import CheckError, ConfigurationError

CHATML_STOPS = ("<|im_end|>", "<|endoftext|>")

COMMANDS = {
    *("from", "parameter", "template", "system", "adapter", "license", "message", "requires"),
    *("renderer", "parser", "draft"),
}
PARAMETERS: dict[str, type] = {
    **dict.fromkeys(("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"), int),
    **dict.fromkeys(("num_keep", "seed", "num_predict", "top_k", "repeat_last_n"), int),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "temperature", "repeat_penalty"), float),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), float),
    "use_mmap": bool,
    "stop": str,  # the only one that may stand several times
}
_ROLES = {"system", "user", "assistant"}

# ChatML in Go's text/template. It is written out, because `ollama create` otherwise installs a
# built-in template that merely resembles the file's own and drops its default system message.
_CHATML_TEMPLATE = (
    "{{- if not .System }}DEFAULT_SYSTEM{{ end }}{{- range .Messages }}<|im_start|>{{ .Role }}\n"
    "{{ .Content }}<|im_end|>\n"
    "{{ end }}<|im_start|>assistant\nREPLY_OPENING"
)


@dataclass(frozen=True)
class Command:
    """One command of a Modelfile: ``name`` in lower case, a parameter's own name, or ``message ROLE``."""

    name: str
    value: str
    line: int


def chatml_template(default_system: str | None, reply_opening: str = "") -> str:
    """Ollama's TEMPLATE for ChatML; ``default_system`` is what the model's own template puts where none is given.

    ``reply_opening``: what it puts behind the assistant's opening when it asks for a reply.
    """
    opening = f"<|im_start|>system\n{default_system}<|im_end|>\n" if default_system else ""
    return _CHATML_TEMPLATE.replace("REPLY_OPENING", reply_opening).replace("DEFAULT_SYSTEM", opening)


def write_modelfile(
    gguf_name: str,
    system_prompt: str | None = None,
    parameters: Mapping[str, int | float | str | Sequence[str]] | None = None,
    *,
    template: str | None = None,
    stops: Sequence[str] = CHATML_STOPS,
    remarks: Sequence[str] = (),
) -> str:
    """The text of a Modelfile beside ``gguf_name``. ``template`` is Go's; None leaves it to the file's own.

    ``remarks`` become comments. ``stops`` are added to those among ``parameters``. Raises
    :class:`ConfigurationError` for an unknown parameter, a value of the wrong type, or text that a
    Modelfile cannot carry unchanged.
    """
    given = dict(parameters or {})
    _check_parameters(given)
    own_stops = given.pop("stop", [])
    own_stops = [own_stops] if isinstance(own_stops, str) else list(own_stops)  # type: ignore[arg-type]
    lines = [*(f"# {' '.join(remark.split())}" for remark in remarks), f"FROM ./{gguf_name}"]
    wanted = [("model", f"./{gguf_name}")]

    def add(command: str, name: str, value: str, quote: str) -> None:
        lines.append(f"{command} {quote}{value}{quote}")
        wanted.append((name, value))

    if template is not None:
        add("TEMPLATE", "template", template, '"""')
    if system_prompt:
        add("SYSTEM", "system", system_prompt.replace("\r\n", "\n"), '"""')
    for name, value in given.items():
        add(f"PARAMETER {name}", name, str(value).lower() if isinstance(value, bool) else str(value), "")
    for stop in dict.fromkeys([*own_stops, *stops]):
        add("PARAMETER stop", "stop", stop, '"')
    text = "\n".join(lines) + "\n"
    _check_read_back(text, wanted)
    return text


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    for name, value in parameters.items():
        kind = PARAMETERS.get(name)
        if kind is None:
            near = difflib.get_close_matches(name, PARAMETERS, 1)
            raise ConfigurationError(
                f"export.parameters.{name}: Ollama knows no such parameter",
                remedy=f"did you mean {near[0]}?" if near else f"one of {', '.join(PARAMETERS)}",
            )
        if name == "stop":
            fits = isinstance(value, str) or all(isinstance(item, str) and item for item in value)
        elif kind is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        else:
            fits = type(value) is kind
        if not fits:
            raise ConfigurationError(f"export.parameters.{name}: expected {kind.__name__}, given {value!r}")


def _check_read_back(text: str, wanted: list[tuple[str, str]]) -> None:
    try:
        read = [(command.name, command.value) for command in parse_modelfile(text)]
    except CheckError as error:
        read = [("", error.message)]
    for name, value in wanted:
        if (name, value) not in read or '"""' in value:  # inside a line they would pass today
            what = "three quotation marks in a row" if '"""' in value else "a character that Ollama drops"
            raise ConfigurationError(
                f"the Modelfile cannot carry this {name} unchanged (probably {what}): {value[:80]!r}",
                remedy="reword it; only printable characters, blanks, tabs and line ends can stand there",
            )


def parse_modelfile(text: str) -> list[Command]:
    """Parse a Modelfile as Ollama does. Raises :class:`CheckError` naming the line of the first error."""
    commands: list[Command] = []
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    position = 0
    while position < len(lines):
        number, line = position + 1, lines[position].lstrip(" \t")
        position += 1
        if not line or line.startswith("#"):
            continue
        word, rest = _split_word(line)
        command = word.lower()
        if command not in COMMANDS:
            raise _error(number, f"unknown command {word!r}", word, COMMANDS)
        name = "model" if command == "from" else command
        if command in ("parameter", "message"):
            argument, rest = _split_word(rest)
            if command == "message" and argument not in _ROLES:
                raise _error(number, f"unknown role {argument!r}", argument, _ROLES)
            name = argument if command == "parameter" else f"message {argument}"
        while (value := _unquote(_printable(rest).strip())) is None:
            if position == len(lines):
                raise _error(number, "the quotation is not closed")
            rest += "\n" + lines[position]
            position += 1
        if not value and command != "system":
            raise _error(number, f"{word} needs a value")
        if command == "parameter":
            _check_value(number, name, value)
        commands.append(Command(name, value, number))
    if not any(command.name == "model" for command in commands):
        raise CheckError("Modelfile: there is no FROM line")
    return commands


def _split_word(line: str) -> tuple[str, str]:
    line = line.lstrip(" \t")
    end = next((index for index, character in enumerate(line) if character in " \t"), len(line))
    return line[:end], line[end:].lstrip(" \t")


def _printable(text: str) -> str:
    """Ollama drops what Go's unicode.IsPrint refuses, blanks and line ends apart."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def _unquote(text: str) -> str | None:
    """The text without its quotation marks, None if they are not closed yet."""
    for mark in ('"""', '"'):
        if text.startswith(mark):
            closed = len(text) >= 2 * len(mark) and text.endswith(mark)
            return text[len(mark) : -len(mark)] if closed else None
    return text


def _check_value(number: int, name: str, value: str) -> None:
    kind = PARAMETERS.get(name)
    if kind is None:
        raise _error(number, f"unknown parameter {name!r}", name, PARAMETERS)
    try:
        if kind is bool and value.lower() not in ("1", "0", "t", "f", "true", "false"):
            raise ValueError
        if kind in (int, float):
            kind(value)
    except ValueError:
        raise _error(number, f"{name} is {value!r}, not {kind.__name__}") from None


def _error(number: int, message: str, given: str = "", known: Any = ()) -> CheckError:
    near = difflib.get_close_matches(given.lower(), list(known), 1)
    return CheckError(f"Modelfile, line {number}: {message}", remedy=f"did you mean {near[0]}?" if near else None)
