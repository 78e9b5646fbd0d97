"""Files that are complete or absent: written beside their final name, flushed, renamed.

Every artefact of Forge is written through this module, so an interruption leaves either the
old file or the new one and never half of one, and a full or read-only disk is one readable
:class:`~forge.training.system.errors.DiskError`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from forge.training.system.errors import DataError, DiskError, LockedError

_CHUNK_BYTES = 8 << 20
_MAX_JSON_BYTES = 64 << 20
_DISK_ERRNOS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the size limit",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.ENOTDIR: "a parent of the path is a file",
    errno.EISDIR: "the path is a directory",
    errno.EEXIST: "a file is in the way",
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITE = re.compile(r"inline_container\.cc.* unexpected pos|PytorchStreamWriter failed writing", re.DOTALL)


def cache_dir() -> Path:
    """Where Forge keeps what can be made again: ``$FORGE_CACHE``, else ``~/.cache/forge``."""
    root = os.environ.get("FORGE_CACHE")
    return Path(root).expanduser().absolute() if root else Path.home() / ".cache" / "forge"


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks of 8 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON (sorted keys, no blanks, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def is_there(path: Path) -> bool:
    """Whether a path exists; one that cannot be a path, too long or with a NUL in it, does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_json_object(path: Path, *, finite: bool = False) -> dict[str, Any]:
    """A JSON file of at most 64 MiB that holds an object; ``finite`` refuses NaN and infinity.

    Raises :class:`DataError`, also for a pipe, which could keep its reader waiting for ever.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise DataError(f"{path} is not a regular file")
            raw = stream.read(_MAX_JSON_BYTES + 1)
        if len(raw) > _MAX_JSON_BYTES:
            raise DataError(f"{path} is larger than {_MAX_JSON_BYTES:,} bytes")
        value = json.loads(raw, parse_constant=_refuse_constant if finite else None)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


@contextmanager
def disk_errors(path: Path | str, doing: str = "write") -> Iterator[None]:
    """Turn disk errors inside the block, those that libraries wrap included, into :class:`DiskError`."""
    try:
        yield
    except Exception as error:
        disk_error = as_disk_error(error, path, doing)
        if disk_error is None:
            raise
        raise disk_error from error


def as_disk_error(error: BaseException, path: Path | str, doing: str = "write") -> DiskError | None:
    """``error`` as a :class:`DiskError` if the disk is its cause, else ``None``.

    safetensors says it as text with the system's number, ``torch.save`` by the position at which its
    archive stands and at which it should: the bytes between did not fit.
    """
    text = str(error)
    if isinstance(error, OSError):
        reason = _DISK_ERRNOS.get(error.errno or 0)
    elif number := _OS_ERROR.search(text):
        reason = _DISK_ERRNOS.get(int(number[1]))
    else:
        reason = "it could not be written whole (is the disk full?)" if _TORCH_WRITE.search(text) else None
    if reason is None:
        return None
    remedy = "free space or choose another place; what was there before is unchanged"
    return DiskError(f"cannot {doing} {path}: {reason}", remedy=remedy)


def beside(path: Path, ending: str) -> Path:
    """The path with ``ending`` after its name; that of ``.`` and ``..`` is the name of the folder that they are."""
    named = Path(os.path.realpath(path)) if path.name in ("", "..") else path
    return named.with_name(named.name + ending)


def existing_folder(path: Path) -> Path:
    """``path`` if it is a directory, else the nearest one above it."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def require_free_bytes(directory: Path, needed_bytes: int, what: str, remedy: str) -> None:
    """Raise :class:`DiskError` with both numbers if ``directory``'s file system has not so much free."""
    free_bytes = shutil.disk_usage(existing_folder(directory)).free
    if free_bytes < needed_bytes:
        raise DiskError(
            f"{what} needs {_readable(needed_bytes)} in {directory}, {_readable(free_bytes)} are free", remedy=remedy
        )


def _readable(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def refuse_existing(path: Path | str, force: bool) -> None:
    """Raise :class:`DiskError` if an output exists and ``force`` was not given."""
    path = Path(path)
    if not force and (path.is_symlink() or path.exists()):
        raise DiskError(f"{path} exists already", remedy="pass --force to replace it, or name another output")


def remove(path: Path) -> None:
    """Delete a file, a link or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk hold a file, or a directory's names, before anything that relies on it is written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(directory: Path) -> None:
    """:func:`flush` everything in a directory, and the directory."""
    for path in sorted(directory.rglob("*")):
        if not path.is_symlink():
            flush(path)
    flush(directory)


@contextmanager
def atomic_file(path: Path | str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing that appears under its name only when the block ends well.

    ``mode`` is ``"w"`` (UTF-8 text, ``\\n`` line ends) or ``"wb"``. Raises :class:`DiskError`.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        partial = Path(name)
        try:
            text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
            with os.fdopen(handle, mode, **text) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, path)
            flush(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as stream:
        stream.write(text)


def write_json(path: Path | str, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused (``ValueError``)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def staged_directory(
    path: Path | str, *, force: bool = False, move_in: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Yield an empty directory beside ``path`` that takes its name when the block ends well.

    An existing ``path`` is refused unless ``force``; it is then replaced only at the end, so a
    failure inside the block keeps it. With ``move_in`` an existing directory stays: it is given the
    new one at the end and moves its files. Raises :class:`DiskError`.
    """
    path = Path(path)
    if move_in is None:
        refuse_existing(path, force)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        lock, old = _lock(staging), None  # while this process lives: clear_leftovers looks at it
        try:
            yield staging
            os.chmod(staging, 0o777 & ~_umask())
            flush_tree(staging)
            if move_in is not None and path.is_dir():
                move_in(staging)
                flush(path)
                return
            if path.is_symlink() or path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
                os.replace(path, old / path.name)
            os.replace(staging, path)
            flush(path.parent)
        finally:
            if old is not None:
                _give_back(path, old)
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)


def clear_leftovers(path: Path) -> None:
    """Remove what killed processes left of :func:`staged_directory`; what they were replacing gets its name back.

    Raises :class:`LockedError` if another process is writing ``path`` now.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.(part|old)")
    leftovers = [e for e in path.parent.glob(f".{path.name}.*") if name.fullmatch(e.name) and e.is_dir()]
    for partial in (entry for entry in leftovers if entry.suffix == ".part"):
        try:
            os.close(_lock(partial))
        except BlockingIOError:
            raise LockedError(f"another process is writing {path}", remedy="wait for it, or stop it") from None
        shutil.rmtree(partial, ignore_errors=True)
    for old in (entry for entry in leftovers if entry.suffix == ".old"):
        _give_back(path, old)


def _lock(directory: Path) -> int:
    """An open handle that locks a directory. Raises ``BlockingIOError`` if another process has done so."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a file system without locks
        return handle
    return handle


def _give_back(path: Path, old: Path) -> None:
    if not (path.is_symlink() or path.exists()) and os.path.lexists(old / path.name):
        os.replace(old / path.name, path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(directory: Path | str) -> Iterator[None]:
    """Lock a directory against other processes; the lock ends with its process. Raises :class:`LockedError`."""
    directory = Path(directory)
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        handle = open(directory / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until the end
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LockedError(
                f"{directory} is in use by process {_holder(directory)}",
                remedy="wait for it, stop it, or name another directory with --out",
            ) from None
        handle.truncate(0)
        handle.write(f"{os.getpid()} on {platform.node()}")
        handle.flush()
        yield


def lock_holder(directory: Path | str) -> str | None:
    """The process that has locked a directory, ``None`` if none has."""
    try:
        with open(Path(directory) / ".lock", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except OSError:
        return _holder(Path(directory))
    return None


def _holder(directory: Path) -> str:
    try:
        return (directory / ".lock").read_text(encoding="utf-8").strip() or "(unknown)"
    except OSError:
        return "(unknown)"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
