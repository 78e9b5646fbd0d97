"""A gate of a few entries in a folder of its own: this repository's conftest.py and settings, the real pytest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from forge.training.system.environment import ROOT

# What the tests of a tiny gate begin with.
PREAMBLE = """
import pytest
from harness.recorder import CLOCK, record_facts, record_metric
INFO = {"workload": "tiny", "workload_sha256": "ab" * 32, "backend": "trl", "arm": "trl", "gpu": "NVIDIA H200"}
recorded = pytest.mark.benchmark(timer=CLOCK)
"""


def make_project(folder: Path, tests: str) -> Path:
    """Write the gate's tests below ``folder``; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "test_gate.py").write_text(PREAMBLE + tests, encoding="utf-8")
    return folder


def run_pytest(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``pytest ARGUMENTS test_gate.py`` in the project, in a process of its own; stdout and stderr are together."""
    return _run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, "test_gate.py"], project, environment
    )


def run_compare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``python -m harness.compare ARGUMENTS`` from the repository's root."""
    return _run([sys.executable, "-m", "harness.compare", *map(str, arguments)], ROOT, {})


def run_pytest_benchmark(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The installed command ``pytest-benchmark ARGUMENTS`` from the repository's root."""
    command = Path(sys.executable).with_name("pytest-benchmark")
    return _run([str(command), *map(str, arguments)], ROOT, {})


def read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a benchmark JSON by name; raises on NaN, which JSON does not have."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{path} holds {constant}")

    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return {entry["name"]: entry for entry in content["benchmarks"]}


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        command,
        cwd=folder,
        env={**outer, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
