"""The files of a folder that git would publish: tracked ones, and untracked ones that no ignore file hides.

In a git work tree git itself is asked. Elsewhere, and where git cannot be asked, the ignore files are read here.
Names are as :mod:`os` gives them: bytes that are no text in the file system's encoding are surrogates.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from forge.training.data.gitignore import IgnoreRules, is_ignored, read_rules
from forge.training.system.errors import DataError

_LIST = ("ls-files", "--cached", "--others", "--exclude-standard", "-z")
_LIST_IGNORED = ("ls-files", "--others", "--ignored", "--exclude-standard", "--directory", "-z")
_OF_ANOTHER_REPOSITORY = (  # a hook's environment names its own repository
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX", "GIT_NAMESPACE"),
    *("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_SHALLOW_FILE"),
)
_SECONDS = 300
_MAX_IGNORE_FILE_BYTES = 100 << 20  # as in git


@dataclass(frozen=True, slots=True)
class Skipped:
    """A path, relative to the root, that does not go in. A folder ends in ``/``; ``detail`` may be empty."""

    path: str
    reason: str
    detail: str = ""


@dataclass
class Listing:
    """``files``: paths relative to the root, not only of regular files; a folder that was not entered ends in ``/``.

    ``notes``: what the user should know of how they were found.
    """

    files: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def list_files(root: Path, *, stays_out: Callable[[str], bool], is_alone: bool = False) -> Listing:
    """List what git would publish of ``root``, which must be resolved, sorted by path.

    ``stays_out``: true for a folder, relative to the root and ending in ``/``, that need not be entered.
    ``is_alone``: nothing above the root counts. Raises :class:`DataError` where git does not answer.
    """
    listing = Listing()
    _list_repository(str(root), "", listing, stays_out, is_alone)
    listing.files = sorted(set(listing.files))
    return listing


def _list_repository(
    root: str, prefix: str, listing: Listing, stays_out: Callable[[str], bool], is_alone: bool
) -> None:
    """Add what is in ``root/prefix``, the folder to begin with or a repository inside it."""
    folder = os.path.join(root, prefix)
    top = None if is_alone else _repository_of(folder)
    try:
        answer = None if is_alone else _ask_git(folder, *_LIST)
        why = "" if answer is None else os.fsdecode(answer.stderr).strip().partition("\n")[0].removeprefix("fatal: ")
    except FileNotFoundError:
        answer, why = None, "git is not installed"
    except OSError as error:
        answer, why = None, f"git cannot be run: {error.strerror}"
    if answer is not None and answer.returncode == 0:
        for name in sorted(set(_names(answer.stdout))):
            _add_listed(root, prefix, name, listing, stays_out)
        ignored = [name for name in _names(_ask_git(folder, *_LIST_IGNORED).stdout) if name != "./"]
        if not answer.stdout and _ask_git(folder, "check-ignore", "--quiet", ".").returncode == 0:
            ignored = [""]  # the folder itself, or one that it is in
        listing.skipped += [Skipped(prefix + name, "ignored by .gitignore") for name in ignored]
        return
    if top is not None:
        listing.notes.append(
            f"{folder.rstrip('/')}: git could not be asked ({why}). Its ignore files were read instead; "
            "what is committed although they name it is left out."
        )
    _Walk(root, listing, stays_out).begin(prefix, top)


def _ask_git(folder: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Ask git about the work tree of ``folder``. No program that the repository's own config names is run."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_REPOSITORY}
    environment |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", folder, "-c", "core.fsmonitor=false", *arguments]
    try:
        return subprocess.run(command, capture_output=True, env=environment, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"git has not listed the files of {folder} after {_SECONDS} s",
            remedy=f"see what holds it up: git -C {folder} status",
        ) from error


def _names(output: bytes) -> list[str]:
    return [os.fsdecode(name) for name in output.split(b"\0") if name]


def _add_listed(root: str, prefix: str, name: str, listing: Listing, stays_out: Callable[[str], bool]) -> None:
    """Add one name that git listed: a file, or a repository inside this one."""
    path = prefix + name
    location = os.path.join(root, path)
    if name.endswith("/"):  # untracked
        listing.skipped.append(
            Skipped(
                path, "another git repository", "no submodule of this one: `forge dataset` takes it by its own name"
            )
        )
    elif not os.path.lexists(location):  # deleted, or left out by a sparse checkout
        return
    elif os.path.islink(location) or not os.path.isdir(location):
        listing.files.append(path)
    elif not os.path.lexists(os.path.join(location, ".git")):
        listing.skipped.append(Skipped(path + "/", "submodule not checked out", "run git submodule update --init"))
    elif stays_out(path + "/"):
        listing.files.append(path + "/")
    else:
        _list_repository(root, path + "/", listing, stays_out, is_alone=False)


def _repository_of(folder: str) -> str | None:
    """The nearest folder from ``folder`` upward that is a repository's work tree."""
    return next((str(each) for each in (Path(folder), *Path(folder).parents) if _is_repository(str(each))), None)


def _is_repository(folder: str) -> bool:
    git = os.path.join(folder, ".git")
    return os.path.isfile(git) or os.path.isfile(os.path.join(git, "HEAD"))


class _Walk:
    """Reads folders and their ignore files."""

    def __init__(self, root: str, listing: Listing, stays_out: Callable[[str], bool]) -> None:
        self._root = root
        self._listing = listing
        self._stays_out = stays_out

    def begin(self, prefix: str, top: str | None) -> None:
        """Read ``root/prefix``, which lies in the work tree ``top`` or in none."""
        start = os.path.join(self._root, prefix).rstrip("/")
        top = top or start
        # everything is named from the top, as in git: a pattern of a file above may have slashes
        above = os.path.relpath(start, top)
        parts = [] if above == "." else above.split("/")
        rules = [*_rules_at(os.path.join(top, ".git", "info", "exclude"), b"")]
        for depth in range(len(parts)):
            folder = b"".join(os.fsencode(part) + b"/" for part in parts[:depth])
            rules += _rules_at(os.path.join(top, *parts[:depth], ".gitignore"), folder)
            if is_ignored(folder + os.fsencode(parts[depth]), True, rules):
                self._listing.skipped.append(Skipped(prefix, "ignored by .gitignore"))
                return
        inside = b"".join(os.fsencode(part) + b"/" for part in parts)
        modules = _submodules(top) if _is_repository(top) else None
        pending = [(prefix, tuple(rules))]
        while pending:
            folder_path, outer = pending.pop()
            for name, known in self._read(folder_path, outer, inside, prefix, modules):
                pending.append((name, known))

    def _read(
        self,
        folder: str,
        rules: tuple[IgnoreRules, ...],
        inside: bytes,
        prefix: str,
        modules: frozenset[bytes] | None,
    ) -> Iterator[tuple[str, tuple[IgnoreRules, ...]]]:
        """Add the files of one folder and yield the folders in it to read."""
        try:
            with os.scandir(os.path.join(self._root, folder)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self._listing.skipped.append(Skipped(folder, "unreadable", error.strerror or ""))
            return
        named = inside + os.fsencode(folder[len(prefix) :])  # from the top
        rules = (*rules, *_rules_at(os.path.join(self._root, folder, ".gitignore"), named))
        for entry in entries:
            if entry.name == ".git":
                continue
            path = folder + entry.name
            try:
                is_folder = entry.is_dir(follow_symlinks=False)
            except OSError as error:
                self._listing.skipped.append(Skipped(path, "unreadable", error.strerror or ""))
                continue
            shown = path + "/" * is_folder
            if is_ignored(named + os.fsencode(entry.name), is_folder, rules):
                self._listing.skipped.append(Skipped(shown, "ignored by .gitignore"))
            elif not is_folder or self._stays_out(shown):
                self._listing.files.append(shown)
            elif not _is_repository(entry.path):
                yield shown, rules
            elif modules is None or named + os.fsencode(entry.name) in modules:
                _list_repository(self._root, shown, self._listing, self._stays_out, is_alone=False)
            else:
                _add_listed(self._root, "", shown, self._listing, self._stays_out)


def _rules_at(location: str, folder: bytes) -> list[IgnoreRules]:
    """The rules of an ignore file, none where there is none that git would read: a link, a pipe, a huge file."""
    try:
        status = os.lstat(location)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_IGNORE_FILE_BYTES:
            return []
        return [read_rules(Path(location).read_bytes(), folder)]
    except OSError:
        return []


def _submodules(top: str) -> frozenset[bytes]:
    """The paths that ``.gitmodules`` names."""
    try:
        content = Path(top, ".gitmodules").read_bytes()
    except OSError:
        return frozenset()
    return frozenset(re.findall(rb'^\s*path\s*=\s*"?([^"\n]+?)"?\s*$', content, re.MULTILINE))
