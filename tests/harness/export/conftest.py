"""A run of the demo, exported once for all slow tests of this folder (a minute or two).

More documents are held out than in the demo. While working on the tests, keep the run: with FORGE_FIDELITY=DIR it is
made below DIR and found there again.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from harness.conftest import hold  # noqa: F401 - a fixture, found by its name
from harness.export.exports import Exports
from tests.support.export_answers import SPEC, make_session


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    kept = os.environ.get("FORGE_FIDELITY")
    return Exports(make_session(Path(kept) if kept else tmp_path_factory.mktemp("fidelity"), announce=print), SPEC)


@pytest.fixture(scope="session")
def run_dir(exports: Exports) -> Path:
    """The run; nobody may change it."""
    made = exports.exported(SPEC)
    assert made is not None
    return made


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the run, to plant faults in."""
    return Path(shutil.copytree(run_dir, tmp_path / "run"))
