"""The strict JSONL reader: every bad line is named, nothing is guessed, text is kept exactly.

Our own because the common readers accept what they should not: ``json`` keeps the last of two
equal keys and takes NaN, ``datasets`` turns a missing answer into the word "None" and hides
which line was broken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from forge.training.system.errors import DataError

MAX_LINE_BYTES = 64 << 20  # a novel has one; `dataset` writes at most 4 MiB of a file
_NUM_ERRORS_SHOWN = 10
_DOCUMENT_KEYS = frozenset({"instruction", "input", "output"})
_ROLES = ("system", "user", "assistant")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``role``: ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a corpus. ``document``: from instruction/input/output, its answer may be divided."""

    line: int
    messages: tuple[Message, ...]
    document: bool


class _BadLine(Exception):
    """Why a line is no record."""


def read_records(path: Path | str) -> list[Record]:
    """Read ``instruction``/``input``/``output`` or ``messages`` records, one JSON object per line.

    A BOM at the start, CRLF and blank lines are accepted; other keys are left unread.
    Raises :class:`DataError` naming the first ten bad lines and how many more there are.
    """
    path = Path(path)
    records: list[Record] = []
    errors: list[str] = []
    try:
        if path.is_dir():
            raise DataError(f"{path} is a directory", remedy="name a JSONL file; `forge dataset` makes one")
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is not a regular file")
        with open(path, "rb") as stream:
            for number, raw in _lines(stream):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                    _refuse_other_formats(path, raw)
                if not raw.strip():
                    continue
                try:
                    records.append(_record(number, raw))
                except _BadLine as bad:
                    errors.append(f"line {number}: {bad}")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", remedy="`forge dataset ROOT -o FILE` makes a corpus") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if errors:
        raise bad_lines(path, errors)
    if not records:
        raise DataError(f"{path} has no records", remedy="it must hold one JSON object per line")
    return records


def read_both(train: Path, validation: Path | None) -> tuple[list[Record], list[Record] | None]:
    """The records to train on and those held out. Raises one :class:`DataError` for what is wrong with either."""
    return of_both(read_records, train, validation)


def of_both(question: Callable[[Path], _T], train: Path, validation: Path | None) -> tuple[_T, _T | None]:
    """``question`` of both files. Raises one :class:`DataError` for what is wrong with either."""
    answers: list[_T] = []
    errors: list[DataError] = []
    for path in (train, validation):
        try:
            if path is not None:
                answers.append(question(path))
        except DataError as error:
            errors.append(error)
    if errors:
        remedies = dict.fromkeys(error.remedy for error in errors if error.remedy)
        raise DataError("\n".join(error.message for error in errors), remedy="; ".join(remedies) or None)
    return answers[0], answers[1] if validation is not None else None


def several(items: Sequence[str], most: int = 5) -> str:
    """The first of some names or lines on one line, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most:,} more" if len(items) > most else "")


def bad_lines(
    path: Path | str,
    errors: list[str],
    *,
    most: int = _NUM_ERRORS_SHOWN,
    remedy: str = "correct or remove them; nothing is skipped silently",
) -> DataError:
    """The error for lines that cannot be used; each of ``errors`` begins with its line."""
    shown = [f"  {error}" for error in errors[:most]]
    if len(errors) > len(shown):
        shown.append(f"  and {len(errors) - len(shown):,} more")
    return DataError(
        f"{path}: {len(errors):,} line{'s' * (len(errors) > 1)} cannot be used\n" + "\n".join(shown),
        remedy=remedy,
    )


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, split at \\n only, so that U+2028 is text. Of one that is too long only the beginning."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        yield number, raw
        while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):  # its rest, without keeping it
            raw = stream.readline(MAX_LINE_BYTES + 1)


def _refuse_other_formats(path: Path, first: bytes) -> None:
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16", remedy="save it as UTF-8")
    if first.strip() == b"[":
        raise DataError(f"{path} is one JSON array", remedy="put each record on a line of its own, no brackets")


def _record(number: int, raw: bytes) -> Record:
    value = _parse(raw)
    if isinstance(value, list):
        raise _BadLine("an array, not an object; put each record on a line of its own")
    if not isinstance(value, dict):
        raise _BadLine(f"{_kind(value)}, not an object")
    if "messages" in value:
        mixed = sorted(_DOCUMENT_KEYS & value.keys())
        if mixed:
            raise _BadLine(f"both messages and {', '.join(mixed)}; use one form")
        return Record(number, _conversation(value["messages"]), False)
    missing = [key for key in ("instruction", "output") if key not in value]
    if missing:
        present = ", ".join(key if key.isprintable() else repr(key) for key in sorted(value)[:8]) or "nothing"
        raise _BadLine(f"{' and '.join(missing)} missing (it has: {present:.200})")
    question, answer = _text(value, "instruction"), _text(value, "output")
    extra = _text(value, "input", may_be_empty=True) if "input" in value else ""
    if extra.strip():
        question = f"{question}\n\n{extra}"
    messages = (Message("user", question), Message("assistant", answer))
    return Record(number, messages, True)


def _parse(raw: bytes) -> Any:
    if len(raw) > MAX_LINE_BYTES:
        raise _BadLine(f"longer than {MAX_LINE_BYTES:,} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadLine(f"not UTF-8 at byte {error.start + 1}") from error
    if "\0" in text:
        raise _BadLine("a NUL character")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _BadLine(f"broken JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise _BadLine("broken JSON: nested too deeply") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise _BadLine(f"broken JSON: {str(error).split(';')[0]}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _BadLine(f"key {twice!r:.60} appears twice")
    return result


def _constant(name: str) -> NoReturn:
    raise _BadLine(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _text(fields: dict[str, Any], key: str, *, may_be_empty: bool = False, where: str = "") -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise _BadLine(f"{where}{key} is {_kind(value)}, not text")
    if not may_be_empty and not value.strip():
        raise _BadLine(f"{where}{key} is {'only blanks' if value else 'empty'}")
    if "\0" in value:
        raise _BadLine(f"{where}{key} has a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadLine(f"{where}{key} has half of a surrogate pair at character {error.start + 1}") from error
    return value


def _conversation(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _BadLine(f"messages is {_kind(value)}, not an array")
    messages: list[Message] = []
    for index, turn in enumerate(value, start=1):
        where = f"message {index}: "
        if not isinstance(turn, dict):
            raise _BadLine(f"{where}{_kind(turn)}, not an object")
        for key in ("role", "content"):
            if key not in turn:
                raise _BadLine(f"{where}{key} missing")
        role = turn["role"]
        if role not in _ROLES:
            raise _BadLine(f"{where}role is {role!r:.60}, not one of {', '.join(_ROLES)}")
        _refuse_disorder(where, [m.role for m in messages[-1:]], role)
        messages.append(Message(role, _text(turn, "content", where=where)))
    if not messages:
        raise _BadLine("messages is empty")
    if messages[-1].role != "assistant":
        raise _BadLine("the last message is not the assistant's, so it has nothing to learn")
    return tuple(messages)


def _refuse_disorder(where: str, before: list[str], role: str) -> None:
    if role == "system" and before:
        raise _BadLine(f"{where}a system message may only stand first")
    expected = "assistant" if before == ["user"] else "user"
    if role not in ("system", expected):
        raise _BadLine(f"{where}{expected} expected, found {role}; user and assistant take turns")


def _kind(value: Any) -> str:
    """What JSON calls a value that was read from it."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "an array", dict: "an object"}
    return names.get(type(value), "null")
