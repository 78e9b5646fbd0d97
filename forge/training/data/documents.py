"""A repository's documents as they are trained, and why every other file is not among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from forge.training.data.discovery import Candidate, Choice, Skipped, discover, read_text
from forge.training.data.kinds import machine_kind
from forge.training.data.notebook import notebook_as_markdown, without_pictures
from forge.training.system.errors import ConfigurationError
from forge.training.system.secrets import Secret, find_secrets

MAX_FILE_BYTES = 4 << 20
_MAX_CHOSEN_BYTES = 256 << 20  # of a file that the user asks for, and of a notebook, whose pictures do not count
_LICENCE = re.compile(r"(licen[cs]e|copying|copyright|unlicense)([._-].*)?", re.IGNORECASE)

# How one takes what was skipped for a reason of this module.
_BY_CREDENTIALS = frozenset({"credentials file", "secret"})
_BY_KIND = frozenset(
    {"Git LFS pointer", "lock file", "generated", "minified", "certificate or signature", "tool folder", "too large"}
    | {"broken notebook"}
)


@dataclass(frozen=True, slots=True)
class Document:
    """``text`` as it is trained. ``is_markdown``: made Markdown of something else."""

    path: str
    text: str
    is_markdown: bool = False


@dataclass(frozen=True)
class PictureCount:
    """Pictures as base64 that were left out of a document."""

    path: str
    num_pictures: int


@dataclass
class Documents:
    """``documents`` sorted by path. ``secrets`` stand in skipped documents, or in kept ones that the user allows."""

    documents: list[Document] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    secrets: list[Secret] = field(default_factory=list)
    pictures: list[PictureCount] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_documents(root: Path, *, exclude: Callable[[str], bool], choice: Choice, max_file_bytes: int) -> Documents:
    """Read what :func:`discover` finds below ``root`` and judge it by its content."""
    found = discover(root, exclude=exclude, choice=choice)
    read = Documents(skipped=found.skipped, notes=found.notes)
    for candidate in found.candidates:
        judged = _read(candidate, choice, max_file_bytes, read)
        if isinstance(judged, Skipped):
            read.skipped.append(judged)
        else:
            read.documents.append(judged)
    read.documents.sort(key=lambda document: document.path)
    read.skipped.sort(key=lambda skipped: skipped.path)
    read.secrets.sort(key=lambda secret: (secret.path, secret.line, secret.rule))
    read.notes += _unused(choice, found.candidates, read.skipped, read.secrets)
    return read


def _read(candidate: Candidate, choice: Choice, max_file_bytes: int, read: Documents) -> Document | Skipped:
    """One file as a document. What is found in it besides is added to ``read``."""
    path = candidate.path
    is_chosen = choice.includes(path.encode())
    is_notebook = path.lower().endswith(".ipynb")
    text = read_text(candidate, max_bytes=_MAX_CHOSEN_BYTES if is_chosen or is_notebook else max_file_bytes)
    if isinstance(text, Skipped):
        return text
    num_pictures = 0
    if is_notebook:
        try:
            text, num_pictures = notebook_as_markdown(text)
        except (ValueError, RecursionError) as error:
            is_notebook = False
            if not is_chosen:
                return Skipped(path, "broken notebook", str(error)[:80])
    else:
        text, num_pictures = without_pictures(text)
    if not text.strip():
        return Skipped(path, "empty", "a notebook without text" if is_notebook else "")
    if len(text.encode()) > max_file_bytes and not is_chosen:
        return Skipped(path, "too large", f"{len(text.encode()):,} bytes of text")
    kind = None if is_chosen or is_notebook else machine_kind(path, text)
    if kind is not None:
        return Skipped(path, *kind)
    leaked = find_secrets(path, text)
    read.secrets += leaked
    if leaked and not choice.allows(path):
        return Skipped(path, "secret", f"line {leaked[0].line}: {leaked[0].rule}")
    if num_pictures:
        read.pictures.append(PictureCount(path, num_pictures))
    return Document(path, text, is_markdown=is_notebook)


def choose(
    root: Path,
    include: Iterable[str],
    exclude: Iterable[str],
    allow: Iterable[str],
    *,
    allow_secrets: bool = False,
) -> Choice:
    """What a config and the options of `forge dataset` take of ``root`` and leave.

    ``allow`` names files from the root or from where one is. Raises :class:`ConfigurationError` for no file.
    """
    allowed = set()
    for name in allow:
        places = [root / name, Path(name)]
        file = next((place.resolve() for place in places if place.is_file()), None)
        if file is None or not file.is_relative_to(root.resolve()):
            raise ConfigurationError(
                f"--allow {name} (data.allow in a config): no such file in {root}",
                remedy="name one file as the summary names it",
            )
        allowed.add(file.relative_to(root.resolve()).as_posix())
    return Choice(tuple(include), tuple(exclude), frozenset(allowed), allow_secrets)


def licences(paths: list[str]) -> list[str]:
    """Those of ``paths`` that are named as licences are."""
    return [path for path in paths if _LICENCE.fullmatch(path.rsplit("/", 1)[-1])]


def ways_back(skipped: list[Skipped]) -> list[str]:
    """The options that take what was skipped, where one does."""
    reasons = {each.reason for each in skipped}
    ways = []
    if reasons & _BY_KIND:
        ways.append(f"--include GLOB takes files skipped as: {', '.join(sorted(reasons & _BY_KIND))}")
    if reasons & _BY_CREDENTIALS:
        ways.append("--allow FILE takes a file skipped for credentials, --allow-secrets all of them")
    return ways


def _unused(choice: Choice, candidates: list[Candidate], skipped: list[Skipped], secrets: list[Secret]) -> list[str]:
    """Options that named nothing: a typing error, or a file that another rule leaves out."""
    names = [candidate.path for candidate in candidates] + [each.path.rstrip("/") for each in skipped]
    notes = []
    for option, patterns in (("--include", choice.include), ("--exclude", choice.exclude)):
        for pattern in patterns:
            alone = Choice(include=(pattern.removeprefix("!"),))
            if not any(alone.includes(name.encode("utf-8", "surrogateescape")) for name in names):
                notes.append(f"{option} {pattern}: names no file")
    for each in skipped:
        if each.reason == "ignored by .gitignore" and choice.includes(
            each.path.rstrip("/").encode("utf-8", "surrogateescape")
        ):
            notes.append(f"--include does not take {each.path}: git ignores it")
    leaking = {secret.path for secret in secrets}
    for path in sorted(choice.allow):
        reason = next((each.reason for each in skipped if each.path == path), None)
        if reason is not None:
            notes.append(f"--allow {path}: still left out, {reason}")
        elif path not in leaking:
            notes.append(f"--allow {path}: nothing in it looks like a credential")
    return notes
