"""What Linux says about other processes."""

from __future__ import annotations

import time
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [number for number in numbers if is_running(number, parent=pid)]


def is_running(pid: int, *, parent: int | None = None) -> bool:
    """Whether a process exists, has not ended, and was started by ``parent`` if one is given."""
    try:
        state, parent_pid = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    except OSError:
        return False
    return state != "Z" and parent in (None, int(parent_pid))


def wait_for_end(pids: list[int], *, seconds: float = 10.0) -> None:
    """Wait until none of the processes runs any more; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "a child outlives its parent"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)
