"""Claims about the child process: it does what its table says and nothing else, within limits, and outlives nobody."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time

import pytest

from forge.training.llamacpp.child import TASKS
from forge.training.llamacpp.parent import Child, run_child
from forge.training.system.errors import CheckError, MachineError
from tests.support.processes import wait_for_end
from tests.support.tiny_model import merged_dir


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_a_function(task: str) -> None:
    module, _, name = TASKS[task].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_a_task_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(CheckError, match="files:sha256_file"):
        run_child("system.files:sha256_file", {"path": __file__}, doing="hash a file", limit_seconds=60)


def test_a_child_that_hangs_is_ended() -> None:
    with Child() as child, pytest.raises(CheckError, match="no answer within"):
        child.ask("status", {}, doing="wait", limit_seconds=0.01)
    assert child._process.returncode == -signal.SIGKILL


def test_a_child_that_needs_too_much_memory_is_ended() -> None:
    with pytest.raises((CheckError, MachineError), match=r"cannot load|cannot be loaded|[Mm]emory|status failed"):
        run_child("status", {}, doing="load llama.cpp", limit_seconds=60, memory_limit_bytes=64 << 20)


def test_no_child_outlives_a_killed_parent() -> None:
    """While it works: an idle one ends anyhow, with its input."""
    code = (
        "import sys\n"
        "from forge.training.llamacpp.parent import Child\n"
        "arguments = dict(model_dir=sys.argv[1], target=sys.argv[1] + '/never', outtype='f16', model_name='x')\n"
        "with Child() as child:\n"
        "    child.ask('status', {}, doing='start', limit_seconds=60)\n"
        "    print(child._process.pid, flush=True)\n"
        "    child.ask('convert', arguments, doing='work', limit_seconds=60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(merged_dir())], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    time.sleep(0.3)  # it has begun to import torch, which takes seconds
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for_end([child_pid], seconds=1.0)
