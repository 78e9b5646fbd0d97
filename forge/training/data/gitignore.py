"""Git's ignore patterns, read as git reads them: for folders about which git cannot be asked, and for options.

https://git-scm.com/docs/gitignore describes them. What it leaves open (classes, escapes, odd lines) is what git does:
tests/training/data/test_gitignore.py compares the two on random trees. Names are bytes, as for git: ``?`` is one byte.
A pattern is cut at its slashes and matched segment by segment, so that no pattern takes exponential time.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_BOM = b"\xef\xbb\xbf"
_LITERAL = re.compile(rb"[^*?\[\\]*")
_LETTERS, _DIGITS = string.ascii_letters.encode(), string.digits.encode()
_CLASSES = {
    b"alnum": _LETTERS + _DIGITS,
    b"alpha": _LETTERS,
    b"blank": b" \t",
    b"cntrl": bytes([*range(32), 127]),
    b"digit": _DIGITS,
    b"graph": bytes(range(33, 127)),
    b"lower": string.ascii_lowercase.encode(),
    b"print": bytes(range(32, 127)),
    b"punct": string.punctuation.encode(),
    b"space": b" \t\n\r",
    b"upper": string.ascii_uppercase.encode(),
    b"xdigit": string.hexdigits.encode(),
}

_Segments = tuple[re.Pattern[bytes] | None, ...]  # None: ``**``, any number of folders


@dataclass(frozen=True, slots=True)
class _Pattern:
    """``literal`` is compared, ``segments`` are matched with what follows it. ``by_name``: no slash in it, so it may
    match at any depth."""

    negated: bool
    only_folders: bool
    by_name: bool
    literal: bytes
    segments: _Segments

    def matches(self, path: bytes, is_folder: bool) -> bool:
        """Whether it matches a path relative to the folder of its file."""
        if self.only_folders and not is_folder:
            return False
        if self.by_name:
            path = path.rpartition(b"/")[2]
        if not self.segments:
            return path == self.literal
        return path.startswith(self.literal) and _match(self.segments, path[len(self.literal) :].split(b"/"))


@dataclass(frozen=True, slots=True)
class IgnoreRules:
    """The patterns of one file. ``folder``: where it stands, relative to the top; ``b""`` or ending in ``/``."""

    folder: bytes
    patterns: tuple[_Pattern, ...]

    def verdict(self, path: bytes, is_folder: bool) -> bool | None:
        """True: ignored, False: taken in again, ``None``: nothing said. ``path``: relative to the top."""
        if not path.startswith(self.folder):
            return None
        inside = path[len(self.folder) :]
        for pattern in reversed(self.patterns):
            if pattern.matches(inside, is_folder):
                return not pattern.negated
        return None


def read_rules(content: bytes, folder: bytes = b"") -> IgnoreRules:
    """The patterns of a ``.gitignore``. A line that is no pattern matches nothing, as in git."""
    return IgnoreRules(folder, tuple(_patterns(content)))


def is_ignored(path: bytes, is_folder: bool, rules: Sequence[IgnoreRules]) -> bool:
    """Whether ``path``, whose folders are not ignored, is. The last of ``rules`` that says something decides."""
    for each in reversed(rules):
        verdict = each.verdict(path, is_folder)
        if verdict is not None:
            return verdict
    return False


def is_covered(path: bytes, rules: Sequence[IgnoreRules]) -> bool:
    """Whether a file or one of its folders is ignored: nothing in an ignored folder can be taken in again."""
    end = path.find(b"/")
    while end != -1:
        if is_ignored(path[:end], True, rules):
            return True
        end = path.find(b"/", end + 1)
    return is_ignored(path, False, rules)


def _patterns(content: bytes) -> Iterator[_Pattern]:
    for raw in content.removeprefix(_BOM).split(b"\n"):
        if raw.startswith(b"#"):
            continue
        line = _without_trailing_blanks(raw.removesuffix(b"\r").partition(b"\0")[0])
        negated = line.startswith(b"!")
        glob = line[negated:]
        only_folders = glob.endswith(b"/")
        glob = glob[: len(glob) - only_folders]
        by_name = b"/" not in glob
        glob = glob.removeprefix(b"/")
        found = _LITERAL.match(glob)
        assert found is not None
        # Git compares the literal beginning by itself, so that `**` just after it counts as if it began a segment
        # (up to 2.52 at least). That ignores more than the manual says, never less.
        literal = b"" if by_name and found.end() < len(glob) else found.group()
        segments = _segments(glob[len(literal) :]) if len(literal) < len(glob) else ()
        if segments is not None and glob:
            yield _Pattern(negated, only_folders, by_name, literal, segments)


def _without_trailing_blanks(line: bytes) -> bytes:
    """Blanks at the end do not count, but for one that is escaped."""
    bare = line.rstrip(b" ")
    num_backslashes = len(bare) - len(bare.rstrip(b"\\"))
    return bare + b" " if num_backslashes % 2 and len(bare) < len(line) else bare


def _segments(glob: bytes) -> _Segments | None:
    """What stands between a glob's slashes; ``None`` for one that matches nothing, such as a class without an end."""
    segments: list[re.Pattern[bytes] | None] = []
    pieces = [b""]  # of the segment that is being read: what stands between its stars
    position, begins = 0, True
    while position < len(glob):
        character = glob[position : position + 1]
        position += 1
        if character == b"*":
            after = position + len(glob[position:]) - len(glob[position:].lstrip(b"*"))
            is_whole = begins and (after == len(glob) or glob.startswith((b"/", b"\\/"), after))
            if is_whole and after > position:
                if glob.startswith(b"\\/", after):  # only a plain slash makes it match no folder at all
                    segments.append(_compile([b"", b""]))
                segments.append(None)
                position = after + (2 if glob.startswith(b"\\/", after) else 1)
                if after == len(glob):
                    return tuple(segments)
                continue
            position = after
            pieces.append(b"")
        elif character == b"/" or (character == b"\\" and glob.startswith(b"/", position)):
            position += character == b"\\"
            segments.append(_compile(pieces))
            pieces, begins = [b""], True
            continue
        elif character == b"?":
            pieces[-1] += b"."
        elif character == b"[":
            members, position = _read_class(glob, position)
            if members is None:
                return None
            pieces[-1] += b"[" + b"".join(b"\\x%02x" % member for member in members) + b"]" if members else b"(?!)"
        elif character == b"\\":
            if position == len(glob):
                return None
            pieces[-1] += re.escape(glob[position : position + 1])
            position += 1
        else:
            pieces[-1] += re.escape(character)
        begins = False
    return (*segments, _compile(pieces))


def _compile(pieces: list[bytes]) -> re.Pattern[bytes]:
    """``pieces`` with anything between them. Each is of a fixed length, so its first place will do: no backtracking."""
    first, *inner = pieces
    last = b".*" + inner.pop() if inner else b""
    return re.compile(first + b"".join(b"(?>.*?%s)" % piece for piece in inner) + last, re.DOTALL)


def _read_class(glob: bytes, position: int) -> tuple[list[int] | None, int]:
    """The bytes of the class whose ``[`` ends at ``position``, and where it ends; ``None`` where it is none."""
    negated = glob[position : position + 1] in (b"!", b"^")
    position += negated
    begin = position
    members: set[int] = set()
    previous: int | None = None  # what a range may begin with
    while position < len(glob):
        character = glob[position : position + 1]
        if character == b"]" and position > begin:
            chosen = set(range(256)) - members if negated else members
            return sorted(chosen), position + 1
        if character == b"-" and previous is not None and glob[position + 1 : position + 2] not in (b"", b"]"):
            position += 2 if glob[position + 1 : position + 2] == b"\\" else 1
            if position == len(glob):
                break
            members.update(range(previous, glob[position] + 1))
            previous = None
        elif glob.startswith(b"[:", position):
            end = glob.find(b"]", position + 2)
            if end == -1:
                break
            if end > position + 2 and glob[end - 1 : end] == b":":
                named = _CLASSES.get(glob[position + 2 : end - 1])
                if named is None:
                    break
                members.update(named)
                position, previous = end, None
            else:
                previous = glob[position]
                members.add(previous)
        else:
            position += character == b"\\"
            if position == len(glob):
                break
            previous = glob[position]
            members.add(previous)
        position += 1
    return None, position


def _match(segments: _Segments, names: Sequence[bytes]) -> bool:
    """Whether the segments match the names. A ``**`` at the end stands for at least one name."""
    at, place = 0, 0
    retry: tuple[int, int] | None = None  # after the last ``**``, and where its next attempt begins
    while place < len(names):
        if at < len(segments):
            segment = segments[at]
            if segment is None:
                at += 1
                if at == len(segments):
                    return True
                retry = (at, place + 1)
                continue
            if segment.fullmatch(names[place]):
                at, place = at + 1, place + 1
                continue
        if retry is None:
            return False
        at, place = retry
        retry = (at, place + 1)
    return at == len(segments)
