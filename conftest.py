"""Pytest's set-up: no network, one hypothesis profile, GPU tests that fail rather than skip."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import suppress

import pytest
from hypothesis import settings

from forge.training.system.environment import has_cuda_gpu
from harness.pytest_plugin import (  # noqa: F401 - hooks, found here by their names
    fail_instead_of_skip,
    order_suites,
    prepare_json,
    pytest_benchmark_compare_machine_info,
    pytest_benchmark_generate_machine_info,
    pytest_benchmark_group_stats,
    pytest_benchmark_scale_unit,
    pytest_runtest_teardown,
    pytest_sessionfinish,
    refuse_idle_recorder,
    refuse_unknown_names,
    start_clock,
)

os.environ["HF_HUB_OFFLINE"] = "1"  # inherited by every process the tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A tiny model is slower on two threads than on one when something else is running.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell ignores Ctrl-C for what it runs in the background, and children inherit that: tests that interrupt theirs
# would wait in vain.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("forge", deadline=None, print_blob=True)
settings.load_profile("forge")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The gate's options; docs/gate.md."""
    group = parser.getgroup("gate", "the acceptance gate (-m gpu)")
    group.addoption("--gate-train", metavar="FILE", help="documents to train on: the JSONL that `forge dataset` wrote")
    group.addoption("--gate-store", metavar="DIR", default="runs/gate/store", help="results; the next session resumes")
    group.addoption("--gate-seconds", metavar="N", type=float, help="start nothing that would not end in N seconds")
    group.addoption("--gate-run-seconds", metavar="N", type=float, help="stop a run after N seconds (default 900)")
    group.addoption("--gate-only", metavar="NAMES", help="measure only these, comma-separated, in this order")
    group.addoption("--gate-model", metavar="PATH", help="base model (default: random weights of Qwen2-7B's shape)")


def pytest_configure(config: pytest.Config) -> None:
    """What would lose or skip results is refused before the first test."""
    start_clock(config)
    prepare_json(config)
    if _asks_for_gpu(config):
        refuse_idle_recorder(config)
        refuse_unknown_names(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Parity before speed."""
    order_suites(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """No test of the gate is skipped."""
    report = yield
    fail_instead_of_skip(item, report)
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    """No process that a test starts talks to a network either, loopback included; the gate's runs are left alone."""
    from tests.support.no_network import deny_network

    if session.config.getoption("collectonly"):
        return
    kinds = {item.get_closest_marker("network") is not None for item in session.items}
    if len(kinds) == 2:
        raise pytest.UsageError("tests that need a network run alone, because no other may have one: add -m network")
    if kinds == {False} and not _asks_for_gpu(session.config):
        with suppress(OSError):  # a kernel without such a filter: tests/test_project.py fails and says so
            deny_network()


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
