"""What several files here use: recorded trajectories, and documents for a ladder."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.parity.simulation import Recorded, read_recorded
from tests.support.recorded_ladder import RECORDED, write_corpus


@pytest.fixture(scope="session")
def recorded() -> Recorded:
    return read_recorded(RECORDED)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")
