"""Files that are complete or absent: written beside their final name, flushed, renamed.

Every artefact of Forge is written through this module, so an interruption leaves either the
old file or the new one and never half of one, and a full or read-only disk is one readable
:class:`~forge.training.errors.DiskError`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from forge.training.errors import DataError, DiskError, LockedError

_CHUNK_BYTES = 8 << 20
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


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises :class:`DataError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@contextmanager
def disk_errors(path: Path | str, doing: str = "write") -> Iterator[None]:
    """Turn the operating system's disk errors inside the block into :class:`DiskError`."""
    try:
        yield
    except OSError as error:
        reason = _DISK_ERRNOS.get(error.errno or 0)
        if reason is None:
            raise
        raise DiskError(
            f"cannot {doing} {path}: {reason}",
            remedy="free space or choose another place; what was there before is unchanged",
        ) from error


def refuse_existing(path: Path | str, force: bool) -> None:
    """Raise :class:`DiskError` if an output exists and ``force`` was not given."""
    path = Path(path)
    if not force and (path.is_symlink() or path.exists()):
        raise DiskError(f"{path} exists already", remedy="pass --force to replace it, or name another output")


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
            _fsync_directory(path.parent)
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
def staged_directory(path: Path | str, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``path`` that takes its name when the block ends well.

    An existing ``path`` is refused unless ``force``; it is then replaced only at the end, so a
    failure inside the block keeps it. Raises :class:`DiskError`.
    """
    path = Path(path)
    refuse_existing(path, force)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        try:
            yield staging
            os.chmod(staging, 0o777 & ~_umask())
            for name in sorted(staging.rglob("*")):
                if name.is_file():
                    with open(name, "rb") as stream:
                        os.fsync(stream.fileno())
            old = None
            if path.is_symlink() or path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
                os.replace(path, old / path.name)
            os.replace(staging, path)
            _fsync_directory(path.parent)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def locked(directory: Path | str) -> Iterator[None]:
    """Hold a directory against other processes; the lock dies with its process. Raises :class:`LockedError`."""
    directory = Path(directory)
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        handle = open(directory / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until the end
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            holder = handle.read().strip() or "(unknown)"
            raise LockedError(
                f"{directory} is in use by process {holder}",
                remedy="wait for it, stop it, or name another directory with --out",
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
