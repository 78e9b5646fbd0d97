"""A child process: its end by itself, by its limit and by its parent's; nothing of it stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from forge.training.system.environment import ROOT
from harness.measurement.process import run_process
from tests.support.processes import is_gone


def test_a_process_dies_with_the_one_that_started_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"""
import os, sys
from pathlib import Path
from harness.measurement.process import run_process
run_process([sys.executable, "-c", {code!r}], environment=os.environ, directory=Path("."), time_limit_seconds=600)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert is_gone(int(note.read_text()))


def test_the_end_of_what_a_process_says_is_kept(tmp_path: Path) -> None:
    ended = run_process(
        [sys.executable, "-c", "import sys; print('out'); sys.stdout.flush(); sys.exit('err')"],
        environment=os.environ,
        directory=tmp_path,
        time_limit_seconds=30,
    )
    assert (ended.exit_code, ended.timed_out, ended.output) == (1, False, b"out\nerr\n")
