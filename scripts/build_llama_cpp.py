#!/usr/bin/env python3
"""Build llama-cpp-python once from its source distribution and keep it outside every environment.

Leaves in ``${FORGE_CACHE:-~/.cache/forge}/llama_cpp_python-VERSION/``

- ``wheel/*.whl``   the native library with its Python binding
- ``llama.cpp/``    the converter of the same commit: convert_*.py, conversion/, gguf-py/, LICENSE, Qwen2's vocabulary
- ``build.json``    what both were made from

One source distribution for all of it, because llama.cpp's converter and loader must be one commit. Each part appears
complete or not at all. Needs a C++ compiler; CMake and ninja come as packages. Standard library only.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

# Security floor: llama.cpp b8146. CVE-2026-27940 (and before it CVE-2025-49847, CVE-2025-53630): memory overwritten by
# a GGUF whose numbers overflow. 0.3.36 holds a newer one, whose gguf-py no longer hangs on a header that lies, either.
VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
# No multimodal tools: 127 compile units instead of 178. Not tuned to this machine's CPU: any x86-64 with AVX2 runs it.
CMAKE_ARGS = "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF"
BUILD_TOOLS = ("scikit-build-core==1.1.2", "cmake==4.4.4", "ninja==1.13.2", "packaging==26.3", "pathspec==1.1.1")
TREE_FILES = ("LICENSE", "models/ggml-vocab-qwen2.gguf")
TREE_FOLDERS = ("conversion", "gguf-py")
TREE_NEEDED = (*TREE_FILES, "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/__init__.py")


class BuildError(Exception):
    """What is to be built or set up cannot be; the message says why and what to do."""


def cache_directory() -> Path:
    """Where the parts are kept (as forge.training.system.files.cache_dir, which cannot be imported yet)."""
    root = os.environ.get("FORGE_CACHE")
    base = Path(root).expanduser().absolute() if root else Path.home() / ".cache" / "forge"
    return base / f"llama_cpp_python-{VERSION}"


def made_from() -> dict[str, str]:
    """What a complete cache says of itself; anything else is built again."""
    return {"version": VERSION, "sdist_sha256": SDIST_SHA256, "cmake_args": CMAKE_ARGS}


def find_complete(cache: Path) -> Path | None:
    """The cached wheel if the cache is complete and made from what this script names."""
    try:
        if json.loads((cache / "build.json").read_text(encoding="utf-8")) != made_from():
            return None
    except (OSError, ValueError):
        return None
    wheels = sorted((cache / "wheel").glob("*.whl"))
    complete = len(wheels) == 1 and all((cache / "llama.cpp" / name).is_file() for name in TREE_NEEDED)
    return wheels[0] if complete else None


def belongs(name: str) -> PurePosixPath | None:
    """Where a member of the source distribution goes in the converter's tree; None if it does not belong there."""
    parts = PurePosixPath(name).parts[1:]
    if parts[:2] != ("vendor", "llama.cpp") or len(parts) < 3 or ".." in parts:
        return None
    path = PurePosixPath(*parts[2:])
    top_converter = len(path.parts) == 1 and path.match("convert_*.py")
    return path if top_converter or path.parts[0] in TREE_FOLDERS or str(path) in TREE_FILES else None


def unpack_tree(sdist: Path, target: Path) -> None:
    """Write the converter's regular files below ``target`` (tarfile's own filters are missing before Python 3.11.4)."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = belongs(member.name) if member.isfile() else None
            stream = archive.extractfile(member) if path is not None else None
            if path is None or stream is None:
                continue
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            with stream, open(target / path, "wb") as out:
                shutil.copyfileobj(stream, out)
    missing = [name for name in TREE_NEEDED if not (target / name).is_file()]
    if missing:
        raise BuildError(f"the source distribution of llama-cpp-python {VERSION} lacks {', '.join(missing)}")


def run(command: Sequence[str | Path], doing: str, log: Path, **variables: str) -> None:
    """Run one command, its output in ``log``; on failure the log's end is shown."""
    with open(log, "ab") as out:
        code = subprocess.run(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
        ).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
        raise BuildError(f"could not {doing} (exit code {code}):\n{tail}")


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """One build at a time; the second waits and then finds the first one's result."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with open(cache.with_name(cache.name + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("set-up: waiting for another build of llama.cpp", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever holds the lock is alone, so these are from builds that were killed.
        for abandoned in cache.parent.glob(f"{cache.name}-building-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        yield


def build(cache: Path) -> None:
    """Fetch, check, unpack, compile (5 to 15 minutes on two cores), then move all into place at once."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler: apt-get install g++ (or set CXX)")
    with tempfile.TemporaryDirectory(dir=cache.parent, prefix=cache.name + "-building-") as folder:
        work = Path(folder)
        log, tools, new = work / "log", work / "tools", work / "new"
        started = time.monotonic()
        print(f"set-up: fetching the source distribution of llama-cpp-python {VERSION} (77 MB)", flush=True)
        run([sys.executable, "-m", "venv", tools], "make the build environment", log)
        python = tools / "bin" / "python"
        pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check"]
        run([*pip, "install", *BUILD_TOOLS], "install the build tools", log)
        # Build tools on PATH and no isolated build environment: what compiles is what is pinned above.
        path = f"{tools / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        own = ["--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python"]
        # pip compares the digest before it runs anything of what it fetched.
        (work / "pin").write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
        fetch = [*pip, "download", *own, "--require-hashes", "-r", work / "pin", "-d", work / "sdist"]
        run(fetch, "fetch llama-cpp-python", log, PATH=path)
        (sdist,) = (work / "sdist").glob("*.tar.gz")
        unpack_tree(sdist, new / "llama.cpp")
        print("set-up: compiling llama.cpp, once: 5 to 15 minutes on two cores", flush=True)
        compile_wheel = [*pip, "wheel", *own, "--no-cache-dir", "--no-index", "-w", new / "wheel", sdist]
        run(compile_wheel, "compile llama.cpp", log, PATH=path, CMAKE_ARGS=CMAKE_ARGS)
        (new / "build.json").write_text(json.dumps(made_from(), indent=1) + "\n", encoding="utf-8")
        if find_complete(new) is None:
            raise BuildError("the build ended without a wheel; please report this")
        if cache.exists():
            os.replace(cache, work / "old")
        os.replace(new, cache)
        print(f"set-up: llama.cpp compiled in {time.monotonic() - started:.0f} s, kept in {cache}", flush=True)


def provide_llama_cpp() -> Path:
    """The cached wheel, built first if need be. Raises :class:`BuildError`."""
    cache = cache_directory()
    try:
        if find_complete(cache) is None:
            with locked(cache):
                if find_complete(cache) is None:
                    build(cache)
    except OSError as error:
        reason = error.strerror or error
        raise BuildError(f"the cache {cache} cannot be used: {reason}; FORGE_CACHE moves it") from error
    wheel = find_complete(cache)
    assert wheel is not None
    return wheel


def main() -> int:
    """Build if need be and print the wheel's path."""
    try:
        print(provide_llama_cpp())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
