#!/usr/bin/env python3
"""Resolve requirements files again and compare: every version exact, nothing missing, nothing superfluous.

``make check-pins`` runs this with the Python that the files are for. pip's own resolver reads metadata and installs
nothing, but fetches whole packages where an index offers no metadata alone (up to a few GB).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from build_llama_cpp import BuildError
from gpu_bundle import canonical_name, read_pins


def resolve(requirements: Path) -> dict[str, str]:
    """Canonical name -> version of everything that pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--dry-run"]
        options = ["--ignore-installed", "--no-cache-dir", "--report", str(report), "-r", str(requirements)]
        if subprocess.run([*pip, *options], stdin=subprocess.DEVNULL).returncode:
            raise BuildError(f"{requirements.name} does not resolve (pip's message is above)")
        installs = json.loads(report.read_text(encoding="utf-8"))["install"]
    metadata = [entry["metadata"] for entry in installs]
    return {canonical_name(entry["name"]): entry["version"].partition("+")[0] for entry in metadata}


def compare(pins: dict[str, str], resolved: dict[str, str]) -> list[str]:
    """What differs, one line each."""
    lines = []
    for name in sorted(pins.keys() | resolved.keys()):
        pinned, version = pins.get(name), resolved.get(name)
        if pinned is None:
            lines.append(f"{name}: installed as {version}, but not pinned")
        elif version is None:
            lines.append(f"{name}: pinned {pinned}, but nothing needs it")
        elif pinned != version:
            lines.append(f"{name}: pinned {pinned}, resolves to {version}")
    return lines


def main() -> int:
    """Check every file named on the command line; exit code 8 where one does not hold."""
    parser = argparse.ArgumentParser(description="Resolve requirements files again and compare.")
    parser.add_argument("requirements", type=Path, nargs="+")
    failed = False
    for requirements in parser.parse_args().requirements:
        try:
            pins = read_pins(requirements)
            differences = compare(pins, resolve(requirements))
        except BuildError as error:
            differences = [str(error)]
        failed |= bool(differences)
        result = "\n  ".join(["NO", *differences]) if differences else f"ok, {len(pins)} packages"
        print(f"{requirements.name}: {result}")
    return 8 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
