"""SIGINT and SIGTERM: the first asks for a stop, the second ends the process at once. Children follow."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from types import FrameType

from forge.training.system.errors import ForgeError, Interrupted

_PARENT = "FORGE_PARENT"  # in a step's environment: the process to follow
_PR_SET_PDEATHSIG = 1
_RETRY_SECONDS = 0.02


class Stopped(KeyboardInterrupt):
    """What the first signal raises.

    A class of its own: where a plain ``KeyboardInterrupt`` leaves code that was executed from text (a named
    tuple's, a dataclass's, in any library's import), CPython remembers it and ends the process by SIGINT in
    place of its exit code, caught or not (``unhandled_keyboard_interrupt`` in pythonrun.c).
    """


class StopRequest:
    """Whether somebody asked this process to stop: ``number`` is the signal's, ``None`` while nobody has.

    While work can simply be dropped, the first signal raises :class:`Stopped` (no library catches it by
    ``except Exception``), though not before an extension module that is being loaded is there. Inside
    :meth:`deferred` it only sets ``number``, and whoever trains finishes the step and seals a checkpoint.
    A second signal ends the process with 128 + number there and then: every file it may be writing is
    complete or absent by construction.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferred = False
        self._raised = False
        self._timer: threading.Timer | None = None
        self._is_again = False

    @contextmanager
    def caught(self) -> Iterator[StopRequest]:
        """Catch both signals inside the block. Does nothing outside the main thread, which alone may."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block a first signal waits for whoever looks at ``number``."""
        self._deferred = True
        try:
            self.raise_if_asked()  # between the last line before the block and this one
            yield
        finally:
            self._deferred = False

    def raise_if_asked(self) -> None:
        """Raise :class:`Stopped` if a stop was asked for: a library may have swallowed the first."""
        if self.number is not None:
            self._raised = True
            raise Stopped

    def caused(self, error: BaseException) -> bool:
        """Whether ``error`` is the stop: as it was raised, or what a library made of it (an ``ImportError``, say)."""
        return isinstance(error, KeyboardInterrupt) or (self._raised and not isinstance(error, ForgeError))

    def interrupted(self, message: str, remedy: str | None = None) -> Interrupted:
        """The error of what was stopped: exit code 130 after SIGINT, 143 after SIGTERM."""
        number = self.number or signal.SIGINT
        return Interrupted(
            f"stopped by {signal.Signals(number).name}{message}",
            signal_number=number,
            remedy=remedy,
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and not self._is_again:
            os._exit(128 + number)
        self.number, self._is_again = number, False
        if self._deferred:
            return
        if _loads_native_code(frame):
            self._timer = threading.Timer(_RETRY_SECONDS, self._again)
            self._timer.daemon = True
            self._timer.start()
            return
        self._raised = True
        raise Stopped

    def _again(self) -> None:
        """The same signal once more, from the timer's thread."""
        self._is_again = True
        signal.pthread_kill(threading.main_thread().ident or 0, self.number or signal.SIGTERM)


def _loads_native_code(frame: FrameType | None) -> bool:
    """Whether ``frame`` was called, at whatever depth, by an extension module that is being loaded.

    C++ that meets an exception there (torch's and scipy's bindings do) aborts the process, or loses what it was.
    """
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def run_following(command: list[str]) -> int:
    """Run a command of Forge that is stopped with this process, and wait for its end. Returns its exit code.

    It is in a process group of its own, so Ctrl-C reaches it through here and once: it finishes its step
    while this process waits. If this process is killed, the kernel sends it SIGTERM.
    """
    process: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, forward) for number in handled}
    try:
        process = subprocess.Popen(command, env={**os.environ, _PARENT: str(os.getpid())}, process_group=0)
        for number in received:  # before the process was there
            process.send_signal(number)
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow_parent() -> None:
    """Be asked to stop when the process that :func:`run_following` ran in ends. Does nothing elsewhere."""
    parent = os.environ.pop(_PARENT, None)
    if parent is not None and parent == str(os.getppid()):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
