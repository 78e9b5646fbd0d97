"""An arm's interpreter, environment and command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from forge.training.system.errors import MachineError
from harness.measurement import environment as arms
from harness.measurement.results import RunSpec


def test_the_legacy_arm_has_its_own_interpreter_or_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORGE_LEGACY_PYTHON", raising=False)
    monkeypatch.setattr(arms, "ROOT", tmp_path)
    with pytest.raises(MachineError, match="make legacy-env"):
        arms.interpreter("legacy")
    own = tmp_path / ".venv-legacy" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    assert arms.interpreter("legacy") == str(own)
    monkeypatch.setenv("FORGE_LEGACY_PYTHON", sys.executable)
    assert arms.interpreter("legacy") == sys.executable
    monkeypatch.setenv("FORGE_LEGACY_PYTHON", str(tmp_path / "none"))
    with pytest.raises(MachineError, match=r"FORGE_LEGACY_PYTHON=.* is not a program"):
        arms.interpreter("legacy")
    assert arms.interpreter("unsloth") == arms.interpreter("trl") == sys.executable
    monkeypatch.setenv("FORGE_GPU_PYTHON", str(own))
    assert arms.interpreter("unsloth") == str(own)


def test_all_arms_get_the_same_environment_but_for_the_legacy_arms_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PYTHONPATH": "/a", "PYTORCH_CUDA_ALLOC_CONF": "x", "OMP_NUM_THREADS": "99"}.items():
        monkeypatch.setenv(name, value)
    legacy, trl, unsloth = (arms.environment(backend) for backend in ("legacy", "trl", "unsloth"))  # type: ignore[arg-type]
    assert trl == unsloth == legacy | {"PYTHONPATH": "/a"}
    assert "PYTHONPATH" not in legacy
    assert "PYTORCH_CUDA_ALLOC_CONF" not in legacy
    assert legacy["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert legacy["OMP_NUM_THREADS"] != "99"


def test_the_command_line_is_a_training_run_with_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").touch()
    spec = RunSpec(backend="trl", workload="smoke", overrides=("data.train=train.jsonl", "lora.rank=4"))
    assert arms.train_command(spec, Path("/out"))[1:] == [
        *("-m", "forge.training", "train", "smoke", "--backend", "trl"),
        *("--set", f"data.train={tmp_path / 'train.jsonl'}", "--set", "lora.rank=4"),
        *("-o", "/out", "--force", "--no-check", "--on-oom", "stop"),
    ]
