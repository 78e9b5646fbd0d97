"""Starts ``python -m MODULE`` in a process of its own, forked from one that has imported the large libraries.

It has its own signals, files, environment and exit code; only the imports are shared, which saves seconds per process.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from forge.training.system.environment import ROOT

_PRELOADED = [
    *("torch", "transformers", "datasets", "peft", "trl.trainer.sft_trainer", "accelerate", "safetensors.torch"),
    *("transformers.models.qwen2.modeling_qwen2", "forge.training.backends.trl", "forge.training.train.run"),
    *("forge.training.train.callbacks", "forge.training.cli"),
    *("matplotlib.backends.backend_svg", "forge.training.report.run_report", "forge.training.report.page.render"),
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


@dataclass(frozen=True)
class Ended:
    """As ``subprocess.CompletedProcess``; a negative ``returncode`` is the signal that ended the process."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Running:
    """A command that was started. ``log``: where stdout and stderr go."""

    process: ForkServerProcess
    log: Path

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self.process.pid is not None
        return self.process.pid

    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if self.process.is_alive():
            os.kill(self.pid, number)

    def wait_for(self, is_so: Callable[[], bool], seconds: float = 120.0) -> bool:
        """Wait until ``is_so()`` or its end; whether it was so."""
        deadline = time.monotonic() + seconds
        while not is_so():
            if not self.is_alive() or time.monotonic() > deadline:
                return is_so()
            time.sleep(0.002)
        return True

    def wait(self, seconds: float = 120.0) -> Ended:
        """Its end. Kills it and fails if it does not come."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"not done after {seconds:g} s:\n{self._text('stderr')[-2000:]}")
        assert self.process.exitcode is not None
        return Ended(self.process.exitcode, self._text("stdout"), self._text("stderr"))

    def _text(self, name: str) -> str:
        return (self.log / name).read_text(encoding="utf-8", errors="replace")


def start(
    arguments: Sequence[str | Path],
    log: Path,
    *,
    module: str = "forge.training",
    folder: Path = ROOT,
    fault: str | None = None,
    environment: dict[str, str] | None = None,
) -> Running:
    """``python -m MODULE ARGUMENTS`` in ``folder``, with ``environment`` besides this process's own.

    ``log``: a folder for what it prints. ``fault``: ``module:function``, called first in the child.
    """
    log.mkdir(parents=True, exist_ok=True)
    for name in ("stdout", "stderr"):
        (log / name).write_bytes(b"")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    settings = {**inherited, "PYTHONPATH": str(ROOT), **(environment or {})}
    process = _context.Process(target=_main, args=(module, list(map(str, arguments)), log, folder, fault, settings))
    process.daemon = True  # a test that fails leaves nothing behind
    before = list(sys.path)
    sys.path.insert(0, str(ROOT))  # a test before may have put llama.cpp's tree there, which has a tests/ of its own
    try:
        process.start()
    finally:
        sys.path[:] = before
    return Running(process, log)


def run(arguments: Sequence[str | Path], log: Path, **options: Any) -> Ended:
    """:func:`start` and wait for the end."""
    return start(arguments, log, **options).wait()


def _main(
    module: str, arguments: list[str], log: Path, folder: Path, fault: str | None, environment: dict[str, str]
) -> None:
    gc.freeze()  # a collection need not look at the imports
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        handle = os.open(log.absolute() / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8")
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = [module, *arguments]
    if fault is not None:
        name, _, function = fault.partition(":")
        getattr(importlib.import_module(name), function)()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def planted_everywhere(folder: Path, fault: str) -> dict[str, str]:
    """An environment in which every ``train`` command has the fault, those that processes become included."""
    site = folder / f"site-{fault}"
    site.mkdir(exist_ok=True)
    code = f"    from tests.support import faults\n    faults.{fault}()\n"
    (site / "sitecustomize.py").write_text(f"import sys\nif 'train' in sys.orig_argv:\n{code}")
    return {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
