"""The base smollm2 for a machine that takes only so much at a time: every piece fits, joined they are the same file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge.training.system.environment import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import gpu_bundle


def test_the_pieces_of_the_base_fit_and_join_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bundle, "LIMIT_BYTES", 1000)
    wheel = tmp_path / "cache" / "base-1" / "base.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(os.urandom(2500))
    (tmp_path / "out" / "smollm2-9").mkdir(parents=True)  # of an earlier, larger one
    folders = gpu_bundle.split_base(wheel, tmp_path / "out")
    assert folders == sorted((tmp_path / "out").iterdir())
    assert [(folder / "piece").stat().st_size <= 1000 for folder in folders] == [True] * 3
    there = {**os.environ, "FORGE_CACHE": str(tmp_path / "there")}
    subprocess.run(["sh", str(folders[2] / "join.sh")], check=True, env=there)
    joined = tmp_path / "there" / "base-1" / "base.whl"
    assert joined.read_bytes() == wheel.read_bytes()
    (folders[1] / "piece").unlink()
    joined.unlink()
    assert subprocess.run(["sh", str(folders[0] / "join.sh")], env=there, capture_output=True).returncode
    assert not joined.exists()
