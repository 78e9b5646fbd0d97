"""An answer on a terminal while it comes: nothing that commands the terminal, lines broken between words."""

from __future__ import annotations

import re
from collections.abc import Callable

from rich.cells import cell_len

_PARTS = re.compile(r"\s+|\S+")


class AnswerText:
    """Writes the pieces of one answer, without the blank lines that many answers end with.

    ``width``: columns of the terminal, ``None`` where lines are left as they are. ``column``: where the answer begins.
    """

    def __init__(self, write: Callable[[str], None], width: int | None = None, column: int = 0) -> None:
        self._write, self._width, self._column = write, width, column
        self._held = ""  # blanks, and on a terminal the word that may go on

    def add(self, piece: str) -> None:
        """Write what is certain of the text so far."""
        parts = _PARTS.findall(self._held + harmless(piece))
        ends = self._width is None or (bool(parts) and parts[-1].isspace())
        certain = parts[: len(parts) if ends else -1]
        if certain and certain[-1].isspace():
            certain = certain[:-1]
        self._held = "".join(parts[len(certain) :])
        self._put(certain)

    def end(self) -> None:
        """Write the last word and end the line."""
        self._put(_PARTS.findall(self._held.rstrip()))
        self._held = ""
        self._write("\n")

    def _put(self, parts: list[str]) -> None:
        text = ""
        for index, part in enumerate(parts):
            if part.isspace():
                following = parts[index + 1] if index + 1 < len(parts) else ""
                is_full = self._width is not None and self._column + cell_len(part + following) > self._width
                part = "\n" if is_full and "\n" not in part else part
            text += part
            self._column = cell_len(part.rpartition("\n")[2]) + (0 if "\n" in part else self._column)
        if text:
            self._write(text)


def harmless(text: str) -> str:
    """An answer without control characters, which could command the terminal."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))
