"""A child process with a time limit that leaves nothing behind: no descendant, no unbounded output."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from forge.training.system.errors import ForgeError, MachineError
from harness.measurement.redact import log_tail

KEPT_BYTES = 64 << 10
_READ_BYTES = 64 << 10
_UNKILLABLE_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: not between fork and exec


@dataclass(frozen=True)
class Ended:
    """``exit_code``: negative is a signal's number. ``output``: the last 64 KiB of stdout and stderr together."""

    exit_code: int
    timed_out: bool
    wall_seconds: float
    output: bytes

    def failure(self, what: str, time_limit_seconds: float) -> ForgeError:
        """The error of a command that failed: its own exit code, what it was and the end of its log."""
        why = f"did not end within {time_limit_seconds:g} s" if self.timed_out else f"exit code {self.exit_code}"
        code = 1 if self.timed_out else self.exit_code  # the limit's SIGTERM is no interruption
        return ForgeError.of_child(code, f"{what} failed: {why}\n{log_tail(self.output)}")


def run_process(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    time_limit_seconds: float,
    grace_seconds: float = 10.0,
) -> Ended:
    """Run a command in a session of its own and wait for it.

    At the time limit its whole process group gets SIGTERM, ``grace_seconds`` later SIGKILL. What the
    command leaves running is killed when it ends, and the command itself if this process (more
    precisely: the calling thread) dies. An exception here, Ctrl-C above all, kills it too.
    Raises :class:`MachineError` if it cannot be started, or not be killed.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    started = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=directory,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        raise MachineError(f"{command[0]} cannot be started: {error.strerror}", remedy="see FORGE_*_PYTHON") from error
    assert process.stdout is not None
    with process.stdout as pipe:
        tail = _Tail(pipe.fileno())
        timed_out = False
        try:
            process.wait(time_limit_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            wall_seconds = time.monotonic() - started
            try:
                _end_group(process, grace_seconds)
            finally:
                tail.finish()
    return Ended(process.returncode, timed_out, wall_seconds, tail.kept)


def _end_group(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End the process, if it still runs, and whatever else is in its group."""
    try:
        if process.poll() is None:
            _signal_group(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_seconds)
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        try:
            process.wait(_UNKILLABLE_SECONDS)
        except subprocess.TimeoutExpired:
            raise MachineError(
                f"process {process.pid} does not die: it hangs in the kernel, as with a lost GPU",
                remedy="look at dmesg and nvidia-smi; the machine may need a restart",
            ) from None


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # nobody left in it
        os.killpg(group, number)


class _Tail:
    """Reads a pipe in a thread, as fast as it comes, and keeps the end of it."""

    def __init__(self, handle: int) -> None:
        self.kept = b""
        self._handle = handle
        self._finish = threading.Event()
        self._thread = threading.Thread(target=self._read, name="log-tail", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            # not a plain read: a descendant that left the group may hold the pipe open for ever
            ready, _, _ = select.select([self._handle], [], [], 0.1)
            if ready:
                chunk = os.read(self._handle, _READ_BYTES)
                if not chunk:
                    return
                self.kept = (self.kept + chunk)[-KEPT_BYTES:]
            elif self._finish.is_set():
                return

    def finish(self) -> None:
        """Read what is there and stop."""
        self._finish.set()
        self._thread.join(timeout=10)
