"""The rows of a file of records, whatever its format: JSONL, a JSON array, CSV, TSV or Parquet.

Strict, because the common readers accept what they should not: ``json`` keeps the last of two equal keys and takes
NaN; pandas, with which ``datasets`` reads CSV, fills rows that are too short, makes "NA" and empty cells nothing and
"42" a number, and stops at the first broken row. What a row means is :mod:`forge.training.data.records`'s to say.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

from forge.training.system.errors import DataError

MAX_LINE_BYTES = 64 << 20  # a novel has one; `dataset` writes at most 4 MiB of a file
MAX_ARRAY_BYTES = 512 << 20  # an array is read as a whole
FORMATS = "JSONL, a JSON array, CSV, TSV or Parquet"
_BOM = b"\xef\xbb\xbf"
_BLANKS = re.compile(r"[ \t\r\n]*")  # of JSON
_OTHER_KINDS = (
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet", f"save it as {FORMATS}"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it first"),
)

Unit = Literal["line", "row", "record"]


class BadRow(Exception):
    """Why a row is no record."""


@dataclass(frozen=True, slots=True)
class Row:
    """``place``: for messages, such as ``line 3``. ``problem``: why there is no ``value``."""

    number: int
    place: str
    value: Any = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """``columns``: of a table, by its header. ``each`` can be gone through once."""

    unit: Unit
    columns: list[str] | None
    each: Iterator[Row]


@contextmanager
def open_rows(path: Path) -> Iterator[Rows]:
    """The rows of a file, its format told by its content, of CSV by its name.

    Raises :class:`DataError` for what is no such file, also while it is read.
    """
    if path.is_dir():
        raise DataError(f"{path} is a directory", remedy="name a file of records; `forge dataset` makes one")
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a regular file")
    try:
        with open(path, "rb") as stream:
            head = stream.read(4096)
            stream.seek(0)
            for magic, kind, remedy in _OTHER_KINDS:
                if head.startswith(magic):
                    raise DataError(f"{path} is {kind}", remedy=remedy)
            suffix = path.suffix.lower()
            if head.startswith(b"PAR1") or suffix == ".parquet":
                yield _parquet(path)
            elif suffix in (".csv", ".tsv"):
                yield _csv(path, stream, "\t" if suffix == ".tsv" else ",")
            elif head.removeprefix(_BOM).lstrip().startswith(b"["):
                yield Rows("record", None, _array(path, stream))
            else:
                yield Rows("line", None, _jsonl(path, stream))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", remedy="`forge dataset ROOT -o FILE` makes a corpus") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, split at \\n only, so that U+2028 is text. Of one that is too long only the beginning."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        yield number, raw.removeprefix(_BOM) if number == 1 else raw
        while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):  # its rest, without keeping it
            raw = stream.readline(MAX_LINE_BYTES + 1)


def _jsonl(path: Path, stream: IO[bytes]) -> Iterator[Row]:
    for number, raw in lines(stream):
        if not raw.strip():
            continue
        if number == 1 and raw.strip() == b"{":
            remedy = "put each record on a line of its own, or all of them in one array"
            raise DataError(f"{path} is one JSON object over several lines", remedy=remedy)
        try:
            yield Row(number, f"line {number}", _parse(raw))
        except BadRow as bad:
            yield Row(number, f"line {number}", problem=str(bad))


def _parse(raw: bytes) -> Any:
    if len(raw) > MAX_LINE_BYTES:
        raise BadRow(f"longer than {MAX_LINE_BYTES:,} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 at byte {error.start + 1}") from error
    if "\0" in text:
        raise BadRow("a NUL character")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"broken JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise BadRow("broken JSON: nested too deeply") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise BadRow(f"broken JSON: {str(error).split(';')[0]}") from error


def _array(path: Path, stream: IO[bytes]) -> Iterator[Row]:
    raw = stream.read(MAX_ARRAY_BYTES + 1)
    if len(raw) > MAX_ARRAY_BYTES:
        remedy = "put each record on a line of its own, without brackets"
        raise DataError(f"{path} is a JSON array of more than {MAX_ARRAY_BYTES:,} bytes", remedy=remedy)
    try:
        text = raw.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line}: not UTF-8", remedy="save it as UTF-8") from error
    del raw
    number, line, counted = 0, 1, 0
    position = _after_blanks(text, 0) + 1
    while True:
        position = _after_blanks(text, position)
        if text[position : position + 1] == "]" and number == 0:
            break
        number += 1
        line += text.count("\n", counted, position)
        counted = position
        place = f"record {number} (line {line})"
        try:
            value, problem = None, None
            try:
                value, position = _DECODER.raw_decode(text, position)
            except BadRow as bad:  # it is JSON all the same
                problem = str(bad)
                position = json.JSONDecoder().raw_decode(text, position)[1]
        except json.JSONDecodeError as error:
            message = f"{path}: {place}: broken JSON in line {error.lineno}, column {error.colno}: {error.msg}"
            raise DataError(message, remedy="correct it; nothing after it was read") from error
        except RecursionError as error:
            raise DataError(f"{path}: {place}: broken JSON: nested too deeply") from error
        except ValueError as error:
            raise DataError(f"{path}: {place}: broken JSON: {str(error).split(';')[0]}") from error
        yield Row(number, place, value, problem)
        position = _after_blanks(text, position)
        following = text[position : position + 1]
        if following == "]":
            break
        if following != ",":
            raise DataError(f"{path}: {place}: a comma or ] expected after it", remedy="correct the array")
        position += 1
    rest = _after_blanks(text, position + 1)
    if rest < len(text):
        line = text.count("\n", 0, rest) + 1
        raise DataError(
            f"{path}: line {line}: more text after the end of the array",
            remedy="a file holds one array, or one JSON object per line, not both",
        )


def _after_blanks(text: str, position: int) -> int:
    match = _BLANKS.match(text, position)
    return match.end() if match else position


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRow(f"key {twice!r:.60} appears twice")
    return result


def _constant(name: str) -> NoReturn:
    raise BadRow(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _csv(path: Path, stream: IO[bytes], delimiter: str) -> Rows:
    reader = csv.reader(_texts(path, stream), delimiter=delimiter, strict=True)
    csv.field_size_limit(MAX_LINE_BYTES)
    try:
        header = next((row for row in reader if row), None)
    except csv.Error as error:
        raise DataError(f"{path}: line 1: broken CSV: {error}") from error
    if header is None:
        raise DataError(f"{path} has no records", remedy="its first line names the columns")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the column {twice[0]!r:.60} appears twice", remedy="rename one of them")
    return Rows("line", header, _csv_rows(path, reader, header))


def _texts(path: Path, stream: IO[bytes]) -> Iterator[str]:
    for number, raw in lines(stream):
        if len(raw) > MAX_LINE_BYTES:
            raise DataError(f"{path}: line {number}: longer than {MAX_LINE_BYTES:,} bytes", remedy="shorten it")
        yield raw.decode("utf-8", "surrogateescape")


def _csv_rows(path: Path, reader: Any, header: list[str]) -> Iterator[Row]:
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            message = f"{path}: line {first}: broken CSV: {error}"
            raise DataError(message, remedy="correct it; nothing after it was read") from error
        if cells is None:
            return
        if not cells:
            continue
        problem = None
        if len(cells) != len(header):
            problem = f"{len(cells)} columns, and the header has {len(header)}"
        bad = [name for name, cell in zip(header, cells, strict=False) if any("\udc80" <= c <= "\udcff" for c in cell)]
        if bad:
            problem = f"{bad[0]}: not UTF-8"
        yield Row(first, f"line {first}", dict(zip(header, cells, strict=False)), problem)


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {str(error).partition(chr(10))[0]:.200}") from error
    return Rows("row", list(file.schema_arrow.names), _parquet_rows(path, file))


def _parquet_rows(path: Path, file: Any) -> Iterator[Row]:
    import pyarrow

    number = 0
    try:
        for batch in file.iter_batches(batch_size=256):
            for value in batch.to_pylist():
                number += 1
                yield Row(number, f"row {number}", value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        message = f"{path}: row {number + 1} or one of the next: {str(error).partition(chr(10))[0]:.200}"
        raise DataError(message, remedy="write the file again") from error
