"""Which files of a repository are documents to read, and why every other one is not.

What git would publish (:mod:`listing`), less what safety demands: no link is followed, nothing but regular files is
opened. And less what only tools put there, unless the user asks for it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from forge.training.data.gitignore import IgnoreRules, is_covered, read_rules
from forge.training.data.listing import Skipped, list_files

__all__ = ["Candidate", "Choice", "Discovered", "Skipped", "discover", "read_text"]

_TOOL_FOLDERS = frozenset(
    {".hg", ".svn", ".jj", "node_modules", "bower_components", "__pycache__", "site-packages", ".tox", ".nox"}
    | {".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints", ".idea", ".vscode"}
)
# Files that exist to hold credentials, in forms that no rule can tell from other words. Keys are told by their content.
_CREDENTIAL_FILES = re.compile(
    r"""\.env(\..*)? | .*\.env | \.envrc | \.netrc | _netrc | \.pgpass | \.htpasswd | \.pypirc | \.dockercfg
    | \.git-credentials | credentials(\.json)? | id_(rsa|dsa|ecdsa|ed25519)(_sk)? | .*\.tfstate(\.backup)?""",
    re.VERBOSE | re.IGNORECASE,
)
_SAMPLE_FILES = re.compile(r"(.*[._-])?(example|sample|template|tmpl|tpl|dist|defaults?)([._-].*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A regular file. ``path`` is relative to the root, with ``/``."""

    path: str
    location: str
    num_bytes: int


@dataclass(frozen=True)
class Choice:
    """What the user takes or leaves beyond the rules. ``include``, ``exclude``: patterns in gitignore syntax, from the
    root; ``allow``: paths from the root."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow: frozenset[str] = frozenset()
    allow_secrets: bool = False

    def includes(self, path: bytes) -> bool:
        """Whether a file is to be taken although its kind is skipped."""
        return bool(self.include) and is_covered(path, self._included)

    def excludes(self, path: bytes) -> bool:
        """Whether a file is to be left out although it is a document."""
        return bool(self.exclude) and is_covered(path, self._excluded)

    def allows(self, path: str) -> bool:
        """Whether a file is to be taken with the credentials in it."""
        return self.allow_secrets or path in self.allow

    @cached_property
    def _included(self) -> list[IgnoreRules]:
        return [read_rules(os.fsencode("\n".join(self.include)))]

    @cached_property
    def _excluded(self) -> list[IgnoreRules]:
        return [read_rules(os.fsencode("\n".join(self.exclude)))]


@dataclass
class Discovered:
    """``candidates`` sorted by path; ``notes``: what the user should know of how they were found."""

    candidates: list[Candidate] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def embedded_documents() -> Path:
    """The folder of Markdown files that ``documents: embedded`` stands for."""
    return Path(__file__).with_name("embedded")


def discover(root: Path, *, exclude: Callable[[str], bool], choice: Choice | None = None) -> Discovered:
    """Judge everything that git would publish of ``root``, which must be resolved.

    ``exclude``: true for an absolute path to be passed over, such as Forge's own output. Raises :class:`DataError`
    where git does not answer.
    """
    choice = choice or Choice()
    tools = _Tools(str(root))
    # Forge's own documents may be installed below a folder that a repository ignores
    listing = list_files(
        root,
        stays_out=lambda folder: not choice.include and tools.of(folder) is not None,
        is_alone=root == embedded_documents().resolve(),
    )
    ignored = [each for each in listing.skipped if not exclude(os.path.join(root, each.path))]
    found = Discovered(skipped=ignored, notes=listing.notes)
    left: dict[str, Skipped] = {}
    for path in listing.files:
        location = os.path.join(root, path)
        if exclude(location):
            continue
        tool = tools.of(path)
        if tool is not None and not choice.includes(os.fsencode(path)):
            left.setdefault(tool.path, tool)
            continue
        try:
            judged = _judge(path, location, root, choice)
        except OSError as error:
            judged = Skipped(path, "unreadable", error.strerror or "")
        if isinstance(judged, Candidate):
            found.candidates.append(judged)
        else:
            found.skipped.append(judged)
    found.skipped += left.values()
    return found


class _Tools:
    """Knows the folders that tools make, by their names or by what is in them."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._known: dict[str, Skipped | None] = {"": None}

    def of(self, path: str) -> Skipped | None:
        """The uppermost tool's folder that a file (or a folder, ending in ``/``) lies in."""
        folder = path[: path.rfind("/") + 1]
        if folder not in self._known:
            self._known[folder] = self.of(folder[:-1]) or self._judge(folder)
        return self._known[folder]

    def _judge(self, folder: str) -> Skipped | None:
        if folder[:-1].rpartition("/")[2] in _TOOL_FOLDERS:
            return Skipped(folder, "tool folder")
        if os.path.lexists(os.path.join(self._root, folder, "pyvenv.cfg")):
            return Skipped(folder, "tool folder", "a virtual environment")
        if all(os.path.lexists(os.path.join(self._root, folder, name)) for name in ("workload.yaml", ".lock")):
            return Skipped(folder, "tool folder", "a run of Forge")  # its tokenizer and records are no documents
        return None


def _judge(path: str, location: str, root: Path, choice: Choice) -> Candidate | Skipped:
    raw = os.fsencode(path)
    try:
        path = raw.decode("utf-8")
    except UnicodeDecodeError:
        return Skipped(raw.decode("utf-8", "backslashreplace"), "file name is not UTF-8")
    if choice.excludes(raw):
        return Skipped(path, "left out by --exclude")
    status = os.lstat(location)
    if stat.S_ISLNK(status.st_mode):
        return Skipped(path, *_describe_link(location, root))
    if not stat.S_ISREG(status.st_mode):
        return Skipped(path, "special file", "a FIFO, socket or device")
    if is_named_for_credentials(path) and not choice.allows(path):
        return Skipped(path, "credentials file", "told by its name")
    return Candidate(path, location, status.st_size)


def is_named_for_credentials(path: str) -> bool:
    """Whether a file's name says that it holds credentials; a sample such as ``.env.example`` is none."""
    name = path.rsplit("/", 1)[-1]
    return bool(_CREDENTIAL_FILES.fullmatch(name)) and not _SAMPLE_FILES.fullmatch(name)


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
    return "link", f"to {target.relative_to(root).as_posix()}, which is judged by itself"


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
