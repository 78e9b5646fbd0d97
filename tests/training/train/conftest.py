"""One complete tiny run for all tests of this folder; they leave theirs beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.environment import ROOT
from tests.support.tiny_run import arguments, write_inputs


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base and the documents, and below them a directory per run."""
    folder = tmp_path_factory.mktemp("train")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def reference(folder: Path) -> dict[str, Any]:
    """The record of ``folder/reference``, made through the command line as a user types it, in its own interpreter."""
    typed = [sys.executable, "-m", "forge.training", *arguments(folder, folder / "reference", "--json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(typed, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content
