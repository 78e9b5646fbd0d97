"""Records: what a row of a corpus says, in whichever of the usual forms. Every bad row is named, nothing is guessed.

Forms: ``instruction``, ``input``, ``output`` (Alpaca's, and what `forge dataset` writes); ``messages`` of ``role`` and
``content`` (OpenAI's); ``conversations`` of ``from`` and ``value`` (ShareGPT's). Text is kept exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from forge.training.data.rows import FORMATS, BadRow, Row, Rows, Unit, open_rows
from forge.training.system.errors import DataError

_NUM_ERRORS_SHOWN = 10
_DOCUMENT_KEYS = ("instruction", "input", "output")
_TURN_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SPEAKERS = _ROLES | {"human": "user", "gpt": "assistant"}
_ACCEPTED = (
    "a record has instruction and output (and perhaps input), or messages, or conversations; where its columns are"
    " called otherwise, say so: data.columns: "
)
# What others call them, for the example in that remedy.
_QUESTIONS = ("question", "prompt", "query", "problem", "title", "text", "input")
_ANSWERS = ("answer", "completion", "response", "solution", "reply", "target")
_S = TypeVar("_S")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``role``: ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a corpus. ``document``: from instruction/input/output, its answer may be divided.

    ``line``: where it stands, counted in ``unit``: lines of JSONL and CSV, rows of Parquet, records of an array.
    """

    line: int
    messages: tuple[Message, ...]
    document: bool
    unit: Unit = "line"

    @property
    def place(self) -> str:
        """For messages: ``line 3``."""
        return f"{self.unit} {self.line}"


def read_records(path: Path | str, columns: Mapping[Any, str] | None = None) -> list[Record]:
    """Read a file of records: JSONL, a JSON array, CSV, TSV or Parquet.

    ``columns``: what the file calls ``instruction``, ``input``, ``output``, ``messages`` or ``conversations``, where it
    calls them otherwise. A BOM at the start, CRLF and blank lines are accepted; other keys are left unread, but for a
    ``system`` text, which comes first, and a ``history``, which is refused.
    Raises :class:`DataError` naming the first ten bad rows and how many more there are.
    """
    path = Path(path)
    names = {key: key for key in (*_DOCUMENT_KEYS, *_TURN_KEYS)} | dict(columns or {})
    records: list[Record] = []
    errors: list[str] = []
    is_form_unknown = False
    with open_rows(path) as rows:
        _refuse_other_columns(path, rows, names)
        for row in rows.each:
            try:
                records.append(_record(row, names, rows.unit))
            except _NoForm as bad:
                errors.append(f"{row.place}: {bad}")
                is_form_unknown = True
            except BadRow as bad:
                errors.append(f"{row.place}: {bad}")
    if errors:
        remedy = _ACCEPTED + "{instruction: question, output: answer}" if is_form_unknown else None
        raise bad_lines(path, errors, rows.unit, remedy)
    if not records:
        raise DataError(f"{path} has no records", remedy=f"a file of records is {FORMATS}")
    return records


def read_both(
    train: Path, validation: Path | None, columns: Mapping[Any, str] | None = None
) -> tuple[list[Record], list[Record] | None]:
    """The records to train on and those held out. Raises one :class:`DataError` for what is wrong with either."""
    return of_both(partial(read_records, columns=columns), train, validation)


def of_both(question: Callable[[_S], _T], train: _S, validation: _S | None) -> tuple[_T, _T | None]:
    """``question`` of both sides. Raises one :class:`DataError` for what is wrong with either."""
    answers: list[_T] = []
    errors: list[DataError] = []
    for side in (train, validation):
        try:
            if side is not None:
                answers.append(question(side))
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
    unit: Unit = "line",
    remedy: str | None = None,
    *,
    most: int = _NUM_ERRORS_SHOWN,
) -> DataError:
    """The error for rows that cannot be used; each of ``errors`` begins with its place."""
    shown = [f"  {error}" for error in errors[:most]]
    if len(errors) > len(shown):
        shown.append(f"  and {len(errors) - len(shown):,} more")
    return DataError(
        f"{path}: {len(errors):,} {unit}{'s' * (len(errors) > 1)} cannot be used\n" + "\n".join(shown),
        remedy=remedy or "correct or remove them; nothing is skipped silently",
    )


class _NoForm(BadRow):
    """A row in none of the forms."""


def _refuse_other_columns(path: Path, rows: Rows, names: Mapping[str, str]) -> None:
    """A table without the columns of any form is one error, not one per row."""
    if rows.columns is None:
        return
    found = rows.columns
    asked = [name for key, name in names.items() if name != key and name not in found]
    if not asked and (
        any(names[key] in found for key in _TURN_KEYS) or {names["instruction"], names["output"]} <= {*found}
    ):
        return
    question = next((name for name in found if name.lower() in _QUESTIONS), "question")
    answer = next((name for name in found if name.lower() in _ANSWERS), "answer")
    hint = f"{{instruction: {question}, output: {answer}}}"
    if len(found) == 1 and any(mark in found[0] for mark in ";\t|"):
        hint += "; CSV is separated by commas, .tsv by tabs"
    what = f"no column {asked[0]}" if asked else "no columns of a record"
    raise DataError(f"{path} has {what}: it has {_keys(found)}", remedy=_ACCEPTED + hint)


def _record(row: Row, names: Mapping[str, str], unit: Unit) -> Record:
    if row.problem is not None:
        raise BadRow(row.problem)
    fields = row.value
    if isinstance(fields, list):
        raise BadRow("an array, not an object; put each record on a line of its own")
    if not isinstance(fields, dict):
        raise BadRow(f"{_kind(fields)}, not an object")
    talks = [key for key in _TURN_KEYS if names[key] in fields]
    if talks:
        mixed = [names[key] for key in (*talks[1:], *sorted(_DOCUMENT_KEYS)) if names[key] in fields]
        if mixed:
            raise BadRow(f"both {names[talks[0]]} and {', '.join(mixed)}; use one form")
        messages = _conversation(fields[names[talks[0]]], names[talks[0]], _TURN_KEYS[talks[0]])
        return Record(row.number, (*_system(fields, messages), *messages), False, unit)
    missing = [names[key] for key in ("instruction", "output") if names[key] not in fields]
    if missing:
        raise _NoForm(f"{' and '.join(missing)} missing (it has: {_keys(sorted(fields))})")
    question, answer = _text(fields, names["instruction"]), _text(fields, names["output"])
    extra = _text(fields, names["input"], may_be_empty=True) if names["input"] in fields else ""
    if extra.strip():
        question = f"{question}\n\n{extra}"
    if fields.get("history"):
        raise BadRow("history is not read: write its turns as messages")
    return Record(
        row.number, (*_system(fields, ()), Message("user", question), Message("assistant", answer)), True, unit
    )


def _system(fields: dict[str, Any], messages: Sequence[Message]) -> tuple[Message, ...]:
    """The ``system`` text beside a record's own form, where its turns have none."""
    text = fields.get("system")
    if not isinstance(text, str) or not text.strip() or (messages and messages[0].role == "system"):
        return ()
    return (Message("system", _text(fields, "system")),)


def _keys(names: Sequence[str]) -> str:
    shown = ", ".join(key if key.isprintable() else repr(key) for key in names[:8])
    return f"{shown:.200}" if shown else "nothing"


def _text(fields: dict[str, Any], key: str, *, may_be_empty: bool = False, where: str = "") -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise BadRow(f"{where}{key} is {_kind(value)}, not text")
    if not may_be_empty and not value.strip():
        raise BadRow(f"{where}{key} is {'only blanks' if value else 'empty'}")
    if "\0" in value:
        raise BadRow(f"{where}{key} has a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}{key} has half of a surrogate pair at character {error.start + 1}") from error
    return value


def _conversation(value: Any, name: str, keys: tuple[str, str]) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise BadRow(f"{name} is {_kind(value)}, not an array")
    messages: list[Message] = []
    for index, turn in enumerate(value, start=1):
        where = f"message {index}: "
        if not isinstance(turn, dict):
            raise BadRow(f"{where}{_kind(turn)}, not an object")
        speaker, content = next((pair for pair in (keys, *_TURN_KEYS.values()) if pair[0] in turn), keys)
        for key in (speaker, content):
            if key not in turn:
                raise BadRow(f"{where}{key} missing")
        roles = _SPEAKERS if speaker == "from" else _ROLES
        said = turn[speaker]
        if not isinstance(said, str) or said not in roles:
            raise BadRow(f"{where}{speaker} is {said!r:.60}, not one of {', '.join(roles)}")
        role = roles[said]
        _refuse_disorder(where, [m.role for m in messages[-1:]], role)
        messages.append(Message(role, _text(turn, content, where=where)))
    if not messages:
        raise BadRow(f"{name} is empty")
    if messages[-1].role != "assistant":
        raise BadRow("the last message is not the assistant's, so it has nothing to learn")
    return tuple(messages)


def _refuse_disorder(where: str, before: list[str], role: str) -> None:
    if role == "system" and before:
        raise BadRow(f"{where}a system message may only stand first")
    expected = "assistant" if before == ["user"] else "user"
    if role not in ("system", expected):
        raise BadRow(f"{where}{expected} expected, found {role}; user and assistant take turns")


def _kind(value: Any) -> str:
    """What JSON calls a value that was read from it; of Parquet, Python's name of others."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "an array", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
