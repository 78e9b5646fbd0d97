"""Walks a repository: which files are candidates, and why every other one is not.

Follows what git would do with ``.gitignore`` files at every level below the root (those above
it do not count: a directory that the user names is meant), and what safety demands: no link is
followed, nothing but regular files is opened, and nothing that is named like a credential.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

_TOOL_FOLDERS = frozenset(
    {".git", ".hg", ".svn", ".jj", "node_modules", "bower_components", "__pycache__", "site-packages", ".tox", ".nox"}
    | {".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints", ".idea", ".vscode"}
)
_CREDENTIAL_FILES = re.compile(
    r"""\.env(\..*)? | .*\.env | \.envrc | \.netrc | _netrc | \.pgpass | \.htpasswd | \.npmrc | \.pypirc | \.dockercfg
    | \.git-credentials | credentials(\.json)? | id_(rsa|dsa|ecdsa|ed25519)(_sk)? | .*\.tfstate(\.backup)?
    | .*\.(pem|key|pfx|p12|jks|keystore|ppk|kdbx|asc|gpg)""",
    re.VERBOSE | re.IGNORECASE,
)
_MAX_IGNORE_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Skipped:
    """A path, relative to the root, that does not go in. A folder ends in ``/``; ``detail`` may be empty."""

    path: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A regular file. ``path`` is relative to the root, with ``/``."""

    path: str
    location: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Ignore:
    """One ``.gitignore``; ``prefix`` is its folder, relative to the root, ``""`` or ending in ``/``."""

    prefix: str
    spec: GitIgnoreSpec


def discover(root: Path, *, exclude: Callable[[str], bool]) -> Iterator[Candidate | Skipped]:
    """Yield everything under ``root``, which must be resolved, folder by folder in a fixed order.

    ``exclude``: true for an absolute path to be passed over, such as Forge's own output.
    """
    exclusions = _read_ignore(root / ".git" / "info" / "exclude", "")
    pending: list[tuple[str, tuple[_Ignore, ...]]] = [("", (exclusions,) if exclusions else ())]
    while pending:
        prefix, ignores = pending.pop()
        folder = os.path.join(root, prefix)
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield Skipped(prefix, "unreadable", error.strerror or "")
            continue
        tool = _tool_of({entry.name for entry in entries}) if prefix else None
        if tool:
            yield Skipped(prefix, "tool folder", tool)
            continue
        own = _read_ignore(Path(folder, ".gitignore"), prefix)
        if own:
            ignores = (*ignores, own)
        for entry in entries:
            path = prefix + entry.name
            if exclude(entry.path):
                continue
            try:
                skipped = _judge(entry, path, ignores, root)
                if skipped is not None:
                    yield skipped
                elif entry.is_dir(follow_symlinks=False):
                    pending.append((path + "/", ignores))
                else:
                    yield Candidate(path, entry.path, entry.stat(follow_symlinks=False).st_size)
            except OSError as error:
                yield Skipped(path, "unreadable", error.strerror or "")


def _tool_of(names: set[str]) -> str | None:
    """What made a folder, told by the files in it; ``None`` where it is nothing known."""
    if "pyvenv.cfg" in names:
        return "a virtual environment"
    if {"workload.yaml", ".lock"} <= names:  # the tokenizer and records of a run are no documents
        return "a run of Forge"
    return None


def _judge(entry: os.DirEntry[str], path: str, ignores: tuple[_Ignore, ...], root: Path) -> Skipped | None:
    """Why an entry is passed over; ``None`` for a regular file or a folder to enter."""
    is_folder = entry.is_dir(follow_symlinks=False)
    shown = path + "/" if is_folder else path
    if entry.name in _TOOL_FOLDERS:
        return Skipped(shown, "tool folder")
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return Skipped(shown.encode("utf-8", "backslashreplace").decode(), "file name is not UTF-8")
    if _is_ignored(shown, ignores):
        return Skipped(shown, "ignored by .gitignore")
    if entry.is_symlink():
        return Skipped(path, *_describe_link(entry.path, root))
    if not is_folder and not entry.is_file(follow_symlinks=False):
        return Skipped(path, "special file", "a FIFO, socket or device")
    if not is_folder and _CREDENTIAL_FILES.fullmatch(entry.name):
        return Skipped(path, "credentials file")
    return None


def _describe_link(location: str, root: Path) -> tuple[str, str]:
    """No link is followed: what it names is inside and read itself, or outside and not wanted."""
    try:
        target = Path(location).resolve(strict=True)
    except FileNotFoundError:
        return "link", "broken"
    except (OSError, RuntimeError):
        return "link", "a loop, or not readable"
    if not target.is_relative_to(root):
        return "link that leaves the root", ""
    return "link", f"to {target.relative_to(root).as_posix()}, which is read itself"


def _is_ignored(path: str, ignores: tuple[_Ignore, ...]) -> bool:
    """The deepest file that says something decides, and in it the last pattern that matches."""
    for ignore in reversed(ignores):
        verdict: bool | None = ignore.spec.check_file(path[len(ignore.prefix) :]).include
        if verdict is not None:
            return verdict
    return False


def _read_ignore(location: Path, prefix: str) -> _Ignore | None:
    """A ``.gitignore``; lines that are no pattern are passed over, as git does."""
    try:
        status = os.lstat(location)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_IGNORE_FILE_BYTES:
            return None
        lines = location.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError:
        return None
    from pathspec import GitIgnoreSpec

    return _Ignore(prefix, GitIgnoreSpec.from_lines(line for line in lines if _is_pattern(line)))


def _is_pattern(line: str) -> bool:
    from pathspec import GitIgnoreSpec

    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True


def read_text(candidate: Candidate, *, max_bytes: int) -> str | Skipped:
    """A file's text with its BOM taken off and CRLF made LF, or why it is not text.

    Opened without following links or waiting, and looked at again once open, so that a file or a
    folder exchanged since the walk can neither hang the reader nor lead it out of the root.
    """
    if candidate.num_bytes > max_bytes:
        return Skipped(candidate.path, "too large", f"{candidate.num_bytes:,} bytes")
    try:
        handle = os.open(candidate.location, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                return Skipped(candidate.path, "special file")
            if os.readlink(f"/proc/self/fd/{handle}") != candidate.location:  # a folder above it became a link
                return Skipped(candidate.path, "exchanged while it was read")
            raw = stream.read(max_bytes + 1)
    except OSError as error:
        return Skipped(candidate.path, "unreadable", error.strerror or "")
    if len(raw) > max_bytes:
        return Skipped(candidate.path, "too large", f"over {max_bytes:,} bytes")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Skipped(candidate.path, "not UTF-8", "UTF-16")
    if b"\0" in raw:
        return Skipped(candidate.path, "binary")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Skipped(candidate.path, "not UTF-8", f"byte {error.start + 1:,}")
    if not text.strip():
        return Skipped(candidate.path, "empty")
    return text.replace("\r\n", "\n")
