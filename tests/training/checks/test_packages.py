"""The remedy for a package that is not installed helps: the file that it names holds the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.training.checks import packages
from forge.training.config.workload import Workload
from forge.training.system.environment import ROOT


@pytest.mark.parametrize(
    ("absent", "changes", "has_gpu", "file"),
    [
        (
            "bitsandbytes",
            {"model": {"quantization": "nf4"}},
            False,
            "requirements-gpu.txt on a machine with a CUDA GPU",
        ),
        ("bitsandbytes", {"optimizer": {"name": "adamw_8bit"}}, True, "requirements-gpu.txt"),
        ("peft", {}, False, "requirements-cpu.txt"),
        ("peft", {}, True, "requirements-gpu.txt"),
    ],
)
def test_the_remedy_for_a_missing_package_names_a_file_that_holds_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    absent: str,
    changes: dict[str, Any],
    has_gpu: bool,
    file: str,
) -> None:
    real = packages.package_version
    monkeypatch.setattr(packages, "package_version", lambda name: None if name == absent else real(name))
    asked = Workload.model_validate({"name": "w", "data": {"train": "x"}, **changes})
    found = [f for f in packages.check_packages(asked, "trl", has_gpu=has_gpu) if "not installed" in f.message]
    assert [(f.message, f.remedy) for f in found] == [(f"not installed: {absent}", f"install {file}")]
    assert f"\n{absent}==" in (ROOT / file.split()[0]).read_text()
    monkeypatch.setattr(packages, "ROOT", tmp_path)  # installed without its checkout
    found = [f for f in packages.check_packages(asked, "trl", has_gpu=has_gpu) if "not installed" in f.message]
    assert [f.remedy for f in found] == [f"install {absent}"]
