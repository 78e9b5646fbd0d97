"""Pytest's set-up: no network, one hypothesis profile, GPU tests that fail rather than skip."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from forge.training.environment import has_cuda_gpu

os.environ["HF_HUB_OFFLINE"] = "1"  # inherited by every process the tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A tiny model is slower on two threads than on one when something else is running.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("forge", deadline=None, print_blob=True)
settings.load_profile("forge")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """No test talks to a network; a test that tries fails."""
    from pytest_socket import disable_socket

    disable_socket(allow_unix_socket=True)


def pytest_sessionstart(session: pytest.Session) -> None:
    """``pytest -m gpu`` without a CUDA GPU is a failure, not a green run of nothing."""
    if _asks_for_gpu(session.config) and not has_cuda_gpu():
        pytest.exit("pytest -m gpu needs a CUDA GPU and this machine shows none", returncode=4)


def _asks_for_gpu(config: pytest.Config) -> bool:
    marked = str(config.getoption("-m") or "")
    return "gpu" in marked.replace("not gpu", "") and not config.getoption("collectonly")
