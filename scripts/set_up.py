#!/usr/bin/env python3
"""Make one virtual environment from one requirements file, completely or not at all. ``make setup`` runs this.

A stamp inside the environment names what it was made from, requirements and interpreter. The same again: nothing to do.
Anything else, or no stamp because the last set-up did not end: made anew. Uses the standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from build_llama_cpp import BuildError, provide_llama_cpp

ROOT = Path(__file__).resolve().parent.parent
STAMP = "forge-set-up"


def check_interpreter(minimum: tuple[int, int]) -> None:
    """Refuse an interpreter that is too old or cannot make virtual environments."""
    wanted = ".".join(map(str, minimum))
    if sys.version_info[:2] < minimum:
        found = ".".join(map(str, sys.version_info[:3]))
        raise BuildError(
            f"{sys.executable} is Python {found}; {wanted} or newer is needed: make PYTHON=python{wanted} ..."
        )
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        raise BuildError("this Python cannot make virtual environments: apt-get install python3-venv")


def fingerprint(requirements: Path, extra: Sequence[str]) -> str:
    """What an environment is made from: the pins, the interpreter and the other arguments, as one hex digest.

    Comments and blank lines do not count: another reason beside a pin is no other environment.
    """
    lines = (line.strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    pins = "\n".join(line for line in lines if line and not line.startswith("#"))
    digest = hashlib.sha256()
    for part in (pins, sys.version, sys.base_prefix, *extra):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def run(command: Sequence[str | Path], doing: str) -> None:
    """Run one command with its output shown; a failure is a :class:`BuildError` that names the step."""
    code = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL).returncode
    if code:
        raise BuildError(
            f"could not {doing} (exit code {code}; the reason is above). Run the same command again to resume."
        )


def set_up(environment: Path, requirements: Path, *, with_llama_cpp: bool, editable: Path | None) -> bool:
    """Bring ``environment`` to the state that ``requirements`` describes. Returns whether anything had to be done.

    ``with_llama_cpp`` adds the native wheel (built once, see build_llama_cpp.py), ``editable`` a project's source tree.
    """
    wheel = provide_llama_cpp() if with_llama_cpp else None
    stamp = environment / STAMP
    wanted = fingerprint(requirements, [str(wheel), str(editable), str(environment.absolute())])
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == wanted:
        return False
    stamp.unlink(missing_ok=True)
    print(f"set-up: {environment.name} from {requirements.name} (a few minutes the first time)", flush=True)
    python = environment / "bin" / "python"
    # Whatever was there was made from something else or not to the end: no package of it may stay.
    run([sys.executable, "-m", "venv", "--clear", environment], "make the environment")
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    run([*pip, "-r", requirements], f"install {requirements.name}")
    if wheel is not None:
        run([*pip, "--no-deps", "--force-reinstall", wheel], f"install {wheel.name}")
    if editable is not None:
        # setuptools is pinned in the requirements, so the build needs no environment of its own and no network.
        run([*pip, "--no-deps", "--no-build-isolation", "-e", editable], "install the project")
    partial = stamp.with_name(STAMP + ".partial")
    partial.write_text(wanted + "\n", encoding="utf-8")
    os.replace(partial, stamp)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see ``--help``. Exit code 4 where the machine lacks something."""
    parser = argparse.ArgumentParser(description="Make one virtual environment from one requirements file.")
    parser.add_argument("environment", type=Path)
    parser.add_argument("requirements", type=Path)
    parser.add_argument("--minimum", default="3.11", help="oldest Python that the requirements admit")
    parser.add_argument("--llama-cpp", action="store_true", help="add llama-cpp-python, built once and kept")
    parser.add_argument("--project", action="store_true", help="add this checkout, editable")
    options = parser.parse_args(arguments)
    major, minor = map(int, options.minimum.split("."))
    try:
        check_interpreter((major, minor))
        set_up(
            options.environment,
            options.requirements,
            with_llama_cpp=options.llama_cpp,
            editable=ROOT if options.project else None,
        )
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("interrupted: the same command makes the environment anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
