"""A child process that may crash, hang or eat memory without taking the parent along.

The parent sends one JSON request per line on the child's stdin; the child
(:mod:`forge.training.llamacpp.child`) answers with JSON lines on a pipe of its own, so that what
libraries print cannot be mistaken for an answer. stdout and stderr go to a log, whose tail is
part of the error when something goes wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from forge.training.system import errors
from forge.training.system.errors import CheckError, ForgeError
from forge.training.system.files import disk_errors

Progress = Callable[[str], None]

_LOG_TAIL_LINES = 12
_LOG_TAIL_BYTES = 16 << 10
_MAX_ANSWER_BYTES = 64 << 20
_CREDENTIAL = re.compile(r"TOKEN$|_KEY$|KEY_ID$|SECRET|PASSWORD|CREDENTIALS", re.IGNORECASE)


def time_limit_seconds(num_bytes: int) -> float:
    """Seconds after which work on a file of this size counts as hung: 120 s + 1 s per 20 MB."""
    return 120.0 + num_bytes / 20e6


@dataclass(frozen=True)
class Answer:
    """What a request came to; ``peak_rss_bytes`` is the child's, since its start."""

    value: dict[str, Any]
    seconds: float
    peak_rss_bytes: int


class Child:
    """One child process; a context manager that leaves no orphan, whatever happens inside.

    ``memory_limit_bytes`` bounds its address space (RLIMIT_AS), which counts mapped files too.
    """

    def __init__(self, *, memory_limit_bytes: int | None = None) -> None:
        self._memory_limit_bytes = memory_limit_bytes

    def __enter__(self) -> Self:
        with disk_errors(tempfile.gettempdir()):
            self._log = tempfile.TemporaryFile()
        self._answers, write_end = os.pipe()
        os.set_blocking(self._answers, False)
        self._unread = b""
        arguments = [sys.executable, "-P", "-m", "forge.training.llamacpp.child", str(write_end), str(os.getpid())]
        if self._memory_limit_bytes is not None:
            arguments.append(str(self._memory_limit_bytes))
        try:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(write_end,),
                env=_environment(),
                start_new_session=True,  # Ctrl-C reaches the parent only, which then ends the child
            )
        except BaseException:
            os.close(self._answers)
            self._log.close()
            raise
        finally:
            os.close(write_end)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        os.close(self._answers)
        self._log.close()

    def ask(
        self,
        task: str,
        arguments: dict[str, Any],
        *,
        doing: str,
        limit_seconds: float,
        progress: Progress | None = None,
    ) -> Answer:
        """Have the child carry out a task. ``doing`` completes the sentence "cannot ...".

        Raises the :class:`ForgeError` that the child raised, and :class:`CheckError` with the end
        of the log after a crash, a hang or an invalid answer.
        """
        started = time.monotonic()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"task": task, "arguments": arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; reading its answers says how
        while True:
            message = self._read(doing, started + limit_seconds, limit_seconds)
            if "progress" in message:
                if progress is not None:
                    progress(str(message["progress"]))
            elif "error" in message:
                if message["error"].get("kind") == "memory":
                    raise self._failure(doing, str(message["error"]["message"]))
                raise _rebuild_error(message["error"], self._tail())
            elif isinstance(message.get("value"), dict):
                return Answer(message["value"], time.monotonic() - started, int(message.get("peak_rss_bytes", 0)))
            else:
                raise self._failure(doing, f"the child process answered {json.dumps(message)[:80]}")

    def interrupt(self) -> None:
        """Ask the task that is being carried out to stop early; only a reply does, with what it has by then."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def _read(self, doing: str, deadline: float, limit_seconds: float) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise self._failure(doing, f"no answer within {limit_seconds:.0f} s; the process was ended")
                if not selector.select(min(remaining, 60.0)):
                    continue
                chunk = os.read(self._answers, 1 << 16)
                if not chunk:
                    raise self._failure(doing, _cause_of_death(self._process.wait()))
                self._unread += chunk
                if len(self._unread) > _MAX_ANSWER_BYTES:
                    raise self._failure(doing, f"the child process sent more than {_MAX_ANSWER_BYTES >> 20} MiB")
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise self._failure(doing, f"the child process answered {line[:80]!r}")
        return message

    def _failure(self, doing: str, cause: str) -> CheckError:
        tail = self._tail()
        return CheckError(f"cannot {doing}: {cause}" + (f"\n{tail}" if tail else ""))

    def _tail(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), _LOG_TAIL_BYTES, max(0, size - _LOG_TAIL_BYTES))
        lines = text.decode("utf-8", "replace").strip().splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join(f"  | {line[:300]}" for line in lines)


def run_child(
    task: str,
    arguments: dict[str, Any],
    *,
    doing: str,
    limit_seconds: float,
    memory_limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> Answer:
    """One request in a child process of its own; see :meth:`Child.ask`."""
    with Child(memory_limit_bytes=memory_limit_bytes) as child:
        return child.ask(task, arguments, doing=doing, limit_seconds=limit_seconds, progress=progress)


def _environment() -> dict[str, str]:
    """The parent's, without what looks like a credential: no child needs one, and what it parses may be hostile."""
    package_root = str(Path(__file__).resolve().parents[3])
    inherited = os.environ.get("PYTHONPATH")
    return {
        **{name: value for name, value in os.environ.items() if not _CREDENTIAL.search(name)},
        "PYTHONPATH": os.pathsep.join([package_root, inherited] if inherited else [package_root]),
        "PYTHONUNBUFFERED": "1",
        "GGML_NO_BACKTRACE": "1",  # else an abort in llama.cpp starts gdb
        "OPENBLAS_NUM_THREADS": "1",  # numpy's; each thread reserves address space, which is limited
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _cause_of_death(return_code: int) -> str:
    if return_code >= 0:
        return f"the child process exited with {return_code} and no answer"
    number = -return_code
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    return f"the child process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _rebuild_error(description: dict[str, Any], tail: str) -> ForgeError:
    kind = getattr(errors, str(description.get("kind")), None)
    message = str(description.get("message"))
    if kind is not CheckError and isinstance(kind, type) and issubclass(kind, ForgeError):
        return kind(message, remedy=description.get("remedy"))
    return CheckError(message + (f"\n{tail}" if tail else ""), remedy=description.get("remedy"))
