"""Provenance: complete, JSON-able, light, and nothing in it that names a person or a machine."""

from __future__ import annotations

import getpass
import json
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from forge.training.system.environment import (
    PACKAGES,
    ROOT,
    available_ram_bytes,
    describe_environment,
    describe_gpu,
    ram_bytes,
)


def test_the_versions_are_those_installed_and_absent_packages_are_none() -> None:
    packages = describe_environment(with_torch=False)["packages"]
    assert set(packages) == set(PACKAGES)
    assert packages["torch"] == version("torch")
    assert packages["numpy"] == version("numpy")
    assert packages["xformers"] is None or packages["xformers"] == version("xformers")


def test_it_is_json_and_names_no_path_host_or_user() -> None:
    text = json.dumps(describe_environment(with_torch=True), allow_nan=False)
    for private in (str(Path.home()), str(ROOT), socket.gethostname(), getpass.getuser()):
        if len(private) > 4:  # a short user name such as "root" occurs in ordinary words
            assert private not in text


def test_torch_is_imported_only_when_asked_for() -> None:
    code = (
        "import sys; from forge.training.system.environment import describe_environment as d;"
        "r = d(with_torch=False); assert r['torch'] is None; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    described = describe_environment(with_torch=True)["torch"]
    assert described["version"].startswith(version("torch").split("+")[0])


def test_the_commit_is_the_checkouts() -> None:
    git = describe_environment(with_torch=False)["git"]
    if not (ROOT / ".git").exists():
        assert git is None
        return
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert git["commit"] == head.stdout.strip()
    assert isinstance(git["is_dirty"], bool)


def test_memory_is_plausible() -> None:
    total, available = ram_bytes(), available_ram_bytes()
    assert total is not None
    assert available is not None
    assert 1 << 28 < total < 1 << 46
    assert 0 < available < 1 << 46


def test_a_hidden_gpu_is_none_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in ("", "-1", "GPU-00000000-0000-0000-0000-000000000000"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert describe_gpu() is None


def test_settings_that_change_a_measurement_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert describe_environment(with_torch=False)["settings"]["OMP_NUM_THREADS"] == "1"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "OMP_NUM_THREADS" not in describe_environment(with_torch=False)["settings"]


@pytest.mark.gpu
def test_the_gpu_is_described_with_driver_clocks_and_memory() -> None:
    gpu = describe_gpu()
    assert gpu is not None
    missing = [key for key, value in gpu.items() if value is None]
    assert not missing
    assert gpu["memory_total_bytes"] >= gpu["memory_used_bytes"] > 0
