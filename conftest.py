"""Pytest's set-up: no network, the gate's hooks."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from harness.pytest_plugin import (  # noqa: F401 - hooks, found here by their names
    asks_for_gpu,
    pytest_addoption,
    pytest_benchmark_compare_machine_info,
    pytest_benchmark_generate_machine_info,
    pytest_benchmark_group_stats,
    pytest_benchmark_scale_unit,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_runtest_teardown,
    pytest_sessionfinish,
    pytest_sessionstart,
)

os.environ["HF_HUB_OFFLINE"] = "1"  # inherited by every process the tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A tiny model is slower on two threads than on one when something else is running.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell ignores Ctrl-C for what it runs in the background, and children inherit that: tests that interrupt theirs
# would wait in vain.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """No process that a test starts talks to a network either, loopback included; the gate's runs are left alone."""
    from tests.support.no_network import deny_network

    if session.config.getoption("collectonly"):
        return
    kinds = {item.get_closest_marker("network") is not None for item in session.items}
    if len(kinds) == 2:
        raise pytest.UsageError("tests that need a network run alone, because no other may have one: add -m network")
    if kinds == {False} and not asks_for_gpu(session.config):
        with suppress(OSError):  # a kernel without such a filter: tests/test_project.py fails and says so
            deny_network()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """No test talks to a network; a test that tries fails."""
    from pytest_socket import disable_socket

    disable_socket(allow_unix_socket=True)
