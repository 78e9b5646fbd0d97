"""Dividing a long document: at headings where possible, and never losing a character."""

from __future__ import annotations

import re

import numpy as np

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
_HEADING = re.compile(r"^ {0,3}#{1,6}(\s|$)")


def borders(text: str) -> tuple[list[int], list[int], list[int]]:
    """Character positions at which headings, paragraphs and lines begin, each ascending.

    Headings and blank lines inside fenced code do not count; its lines do.
    """
    headings, paragraphs, lines = [], [], []
    position, fence, after_blank = 0, "", False
    for line in text.splitlines(keepends=True):
        if position:
            lines.append(position)
        opened = _FENCE.match(line)
        if not fence and position:
            if _HEADING.match(line):
                headings.append(position)
            if after_blank and line.strip():
                paragraphs.append(position)
        if opened:
            mark = opened.group(1)
            if not fence:
                fence = mark
            elif mark[0] == fence[0] and len(mark) >= len(fence) and not line.strip().strip(mark[0]):
                fence = ""
        after_blank = not line.strip()
        position += len(line)
    return headings, paragraphs, lines


def divide(text: str, token_starts: np.ndarray, max_tokens: int) -> list[str]:
    """Divide ``text`` into consecutive parts of at most ``max_tokens`` of its tokens.

    ``token_starts``: each token's first character, ascending, int64 of shape (tokens,). A part
    ends at the last heading in its second half; where there is none, at the last paragraph, then
    line, in its last three quarters; else at a token. Joining the parts gives ``text``.
    """
    marks = [np.asarray(kind, dtype=np.int64) for kind in borders(text)]
    shares = (0.5, 0.25, 0.25)
    parts, begin = [], 0
    while True:
        first = int(np.searchsorted(token_starts, begin, side="left"))
        if len(token_starts) - first <= max_tokens:
            parts.append(text[begin:])
            return parts
        limit = int(token_starts[first + max_tokens])
        end = 0
        for kind, share in zip(marks, shares, strict=True):
            earliest = int(token_starts[first + int(max_tokens * share)])
            index = int(np.searchsorted(kind, limit, side="right")) - 1
            if index >= 0 and kind[index] >= max(earliest, begin + 1):
                end = int(kind[index])
                break
        if not end:
            end = limit
            if end <= begin:  # one character of more tokens than fit: take it whole
                end = begin + 1
        parts.append(text[begin:end])
        begin = end
