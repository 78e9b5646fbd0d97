#!/usr/bin/env python3
"""One archive with what a GPU machine without a network still lacks beside torch, triton, transformers and peft.

``make gpu-bundle`` runs this. The archive unpacks to

- ``site/``       packages of requirements-gpu.txt, for ``PYTHONPATH``
- ``legacy/``     packages of requirements-legacy.txt that shadow the machine's own, for the legacy interpreter only
- ``llama.cpp/``  the converter's source tree, the same commit as ``site/llama_cpp``
- ``activate.sh`` and ``legacy-python``  the environment; the interpreter of the legacy arm
- ``MANIFEST.json``  every package's version, files and bytes, and the sha256 of every file

A real model that speaks, the base `smollm2`, goes beside it in pieces (``smollm2-1/``, ``smollm2-2/``), for machines
that take only so much at a time; ``sh smollm2-1/join.sh`` puts them together where Forge looks for it.

Both sets are read from the requirements files: what they pin less what the machine has. Left out: CUDA variants that
its torch cannot load, programs, tests, byte code. A file that occurs twice is stored once, as a hard link.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from build_llama_cpp import BuildError, cache_directory, find_complete

ROOT = Path(__file__).resolve().parent.parent
LIMIT_BYTES = 60_000_000
PYTHON_VERSION = "3.12"
# pip matches manylinux_2_N exactly, so every N up to the glibc of the oldest system served (2.28) is named.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]

# What such a machine has. Everything else that a requirements file pins is bundled, so that nothing can be forgotten.
# fmt: off
PRESENT = {
    "torch", "torchvision", "triton", "transformers", "peft", "accelerate", "tokenizers", "huggingface-hub", "hf-xet",
    "safetensors", "sentencepiece", "numpy", "scipy", "pandas", "pyarrow", "pillow", "einops", "sympy", "mpmath",
    "networkx", "regex", "protobuf", "pyyaml", "jinja2", "markupsafe", "typer", "click", "shellingham", "annotated-doc",
    "rich", "markdown-it-py", "mdurl", "pygments", "pytest", "iniconfig", "pluggy", "packaging", "setuptools", "wheel",
    "tensorboard", "tensorboard-data-server", "werkzeug", "markdown", "grpcio", "psutil", "tqdm", "filelock", "fsspec",
    "cloudpickle", "python-dateutil", "tzdata", "requests", "urllib3", "certifi", "charset-normalizer", "idna", "httpx",
    "httpcore", "h11", "anyio", "aiohttp", "aiohappyeyeballs", "aiosignal", "attrs", "frozenlist", "multidict",
    "propcache", "yarl", "xxhash", "matplotlib", "contourpy", "cycler", "fonttools", "kiwisolver", "pyparsing",
}
# fmt: on
PRESENT_PREFIXES = ("nvidia-c", "nvidia-n", "cuda-")  # torch's own libraries; nvidia-ml-py is none of them
SOURCE_ONLY = {"rouge-score"}  # published without a wheel; pure Python, so any machine's build of it serves

# Folders at the top of a site directory that no import of Forge needs: programs, a web studio, tests.
TOP_LEFT_OUT = {"bin", "include", "lib", "share", "studio", "test", "tests", "unsloth_cli"}
LEFT_OUT = {"__pycache__", "tests"}
BITSANDBYTES_KEPT = {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"}
# Built for torch 2.10: on the pinned 2.11 both packages see that, say so and work without (8 MB of the archive).
NOT_LOADABLE = ("torchao/_C*.so", "xformers/_C.so")

ACTIVATE = """\
# source this file (bash or zsh): the environment of the bundle beside it
_bundle=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)
export PYTHONPATH="$_bundle/site${PYTHONPATH:+:$PYTHONPATH}"
export FORGE_LLAMA_CPP="$_bundle/llama.cpp"
export FORGE_LEGACY_PYTHON="$_bundle/legacy-python"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export DO_NOT_TRACK=1 HF_HUB_DISABLE_TELEMETRY=1 UNSLOTH_DISABLE_STATISTICS=1
unset _bundle
"""
JOIN = """\
#!/bin/sh
# With all folders smollm2-N side by side: join their pieces where Forge looks for the base smollm2, which checks it.
here=$(cd "$(dirname "$0")/.." && pwd)
target="${{FORGE_CACHE:-$HOME/.cache/forge}}/{folder}"
mkdir -p "$target" && cat {pieces} > "$target/{name}.part" && mv "$target/{name}.part" "$target/{name}"
"""
LEGACY_PYTHON = """\
#!/bin/sh
# The interpreter of the legacy arm: the machine's own, with the pinned packages of legacy before everything else.
bundle=$(cd "$(dirname "$0")" && pwd)
PYTHONPATH="$bundle/legacy" exec python3 "$@"
"""


def canonical_name(name: str) -> str:
    """A distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path: Path) -> dict[str, str]:
    """Canonical name -> version of every ``name==version`` line. Anything looser raises :class:`BuildError`."""
    pins: dict[str, str] = {}
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)", line)
        if match is None:
            raise BuildError(f"{path.name}, line {number}: {line!r} is not an exact pin (name==version)")
        pins[canonical_name(match[1])] = match[2]
    return pins


def choose_packages(pins: dict[str, str], others: dict[str, str]) -> dict[str, str]:
    """The pins that a machine lacks: not there at all, or there in the other version that ``others`` pins."""
    present = {name for name in pins if name in PRESENT or name.startswith(PRESENT_PREFIXES)}
    return {
        name: version for name, version in pins.items() if name not in present or others.get(name, version) != version
    }


def install_packages(packages: dict[str, str], target: Path) -> None:
    """Install exactly these versions for the GPU machine into ``target``, without their dependencies."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-deps", "--no-compile"]
    pip += ["--root-user-action=ignore", "--target", str(target)]
    cross = ["--only-binary=:all:", "--python-version", PYTHON_VERSION, "--implementation", "cp"]
    cross += [word for platform in PLATFORMS for word in ("--platform", platform)]
    wheels = [f"{name}=={version}" for name, version in packages.items() if name not in SOURCE_ONLY]
    sources = [f"{name}=={version}" for name, version in packages.items() if name in SOURCE_ONLY]
    for command in ([*pip, *cross, *wheels], [*pip, *sources] if sources else []):
        if command and subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            raise BuildError(f"pip could not install the packages of {target.name}/ (its message is above)")


def prune(site: Path) -> None:
    """Delete what a GPU machine never loads from a site directory."""
    for folder in [path for path in site.rglob("*") if path.is_dir() and not path.is_symlink()]:
        if folder.name in LEFT_OUT or (folder.parent == site and folder.name in TOP_LEFT_OUT):
            shutil.rmtree(folder, ignore_errors=True)
    for library in site.glob("bitsandbytes/libbitsandbytes_*.so"):
        if library.name not in BITSANDBYTES_KEPT:
            library.unlink()
    for library in [path for pattern in NOT_LOADABLE for path in site.glob(pattern)]:
        library.unlink()
    kept = {path.name for path in site.glob("bitsandbytes/libbitsandbytes_*.so")}
    if kept != BITSANDBYTES_KEPT:
        raise BuildError(f"bitsandbytes in {site.name}/ lacks {', '.join(sorted(BITSANDBYTES_KEPT - kept))}")


def add_llama_cpp(staging: Path, cache: Path) -> None:
    """The converter's tree and the native package, both from set-up's cache, so that both are one commit."""
    built = find_complete(cache)
    if built is None:
        raise BuildError(f"llama.cpp is not in {cache}: run `make setup` first")
    shutil.copytree(
        cache / "llama.cpp", staging / "llama.cpp", ignore=shutil.ignore_patterns("tests", "examples", "__pycache__")
    )
    with zipfile.ZipFile(built) as wheel:
        wanted = [name for name in wheel.namelist() if name.startswith("llama_cpp")]
        wheel.extractall(staging / "site", wanted)


def walk_files(folder: Path) -> Iterator[Path]:
    """Every regular file below ``folder``, in a fixed order."""
    yield from sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def describe_files(staging: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> bytes and sha256."""
    return {
        path.relative_to(staging).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in walk_files(staging)
    }


def write_archive(staging: Path, files: dict[str, dict[str, Any]], archive: Path) -> None:
    """A deterministic .tar.gz (no times, no owners), complete under its name or absent."""
    first: dict[str, str] = {}
    partial = archive.with_name(archive.name + ".partial")
    with (
        open(partial, "wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=9, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in [*files, "MANIFEST.json"]:
            path = staging / name
            info = tarfile.TarInfo(f"forge-gpu-bundle/{name}")
            info.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            digest = files[name]["sha256"] if name in files else name
            if digest in first:
                info.type, info.linkname = tarfile.LNKTYPE, f"forge-gpu-bundle/{first[digest]}"
                tar.addfile(info)
                continue
            first[digest] = name
            info.size = path.stat().st_size
            with open(path, "rb") as stream:
                tar.addfile(info, stream)
    if partial.stat().st_size > LIMIT_BYTES:
        size = partial.stat().st_size
        raise BuildError(f"the archive has {size:,} bytes, more than {LIMIT_BYTES:,}; it is kept as {partial}")
    os.replace(partial, archive)


def build_bundle(archive: Path, cache: Path) -> dict[str, Any]:
    """Make the archive; returns its manifest without the list of files."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".staging-") as folder:
        staging = Path(folder)
        gpu, legacy = read_pins(ROOT / "requirements-gpu.txt"), read_pins(ROOT / "requirements-legacy.txt")
        packages = {"site": choose_packages(gpu, gpu), "legacy": choose_packages(legacy, gpu)}
        for name, chosen in packages.items():
            install_packages(chosen, staging / name)
            prune(staging / name)
        add_llama_cpp(staging, cache)
        (staging / "activate.sh").write_text(ACTIVATE, encoding="utf-8")
        (staging / "legacy-python").write_text(LEGACY_PYTHON, encoding="utf-8")
        (staging / "legacy-python").chmod(0o755)
        files = describe_files(staging)
        summary = {
            "python": PYTHON_VERSION,
            "platform": "linux x86_64, glibc >= 2.34",
            "packages": packages,
            "unpacked_bytes": sum(entry["bytes"] for entry in files.values()),
        }
        manifest = json.dumps({**summary, "files": files}, indent=1, sort_keys=True)
        (staging / "MANIFEST.json").write_text(manifest + "\n", encoding="utf-8")
        write_archive(staging, files, archive)
    return summary


def split_base(wheel: Path, output: Path) -> list[Path]:
    """The package of the base `smollm2` as folders ``output/smollm2-N`` with a piece of it and ``join.sh`` each."""
    num_pieces = -(-wheel.stat().st_size // LIMIT_BYTES)
    size = -(-wheel.stat().st_size // num_pieces)
    folders = [output / f"smollm2-{number}" for number in range(1, num_pieces + 1)]
    pieces = " ".join(f'"$here/{folder.name}/piece"' for folder in folders)
    join = JOIN.format(folder=wheel.parent.name, name=wheel.name, pieces=pieces)
    for old in output.glob("smollm2-*"):
        shutil.rmtree(old)
    with open(wheel, "rb") as stream:
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "piece").write_bytes(stream.read(size))
            (folder / "join.sh").write_text(join, encoding="utf-8")
    return folders


def main() -> int:
    """Parse the command line, build, print where the archive and the base's pieces are and how large."""
    from forge.training.models.smollm2 import provide_wheel
    from forge.training.system.errors import ForgeError

    parser = argparse.ArgumentParser(description="Build the archive for a GPU machine without a network.")
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-bundle" / "forge-gpu-bundle.tar.gz")
    arguments = parser.parse_args()
    try:
        summary = build_bundle(arguments.output, cache_directory())
        folders = split_base(provide_wheel(offline=True), arguments.output.parent)
    except (BuildError, ForgeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    size, unpacked = arguments.output.stat().st_size, summary["unpacked_bytes"]
    print(f"{arguments.output}: {size / 1e6:.1f} MB ({unpacked / 1e6:.0f} MB unpacked)")
    for folder in folders:
        print(
            f"{folder}: {(folder / 'piece').stat().st_size / 1e6:.1f} MB of the base smollm2; sh {folder.name}/join.sh"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
