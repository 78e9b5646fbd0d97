"""A command on a terminal of a given width, and what stands on it afterwards."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

from forge.training.system.environment import ROOT


def on_terminal(arguments: Sequence[str | Path], *, columns: int, folder: Path = ROOT) -> tuple[int, str]:
    """Exit code and output of ``python ARGUMENTS`` with a pseudo-terminal as stdout and stderr."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    ignored = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"}
    environment = {name: value for name, value in os.environ.items() if name not in ignored}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, cwd=folder, env=environment
    )
    os.close(theirs)
    output = bytearray()
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not piece:
            break
        output += piece
    os.close(ours)
    return process.wait(timeout=60), output.decode("utf-8", errors="replace").replace("\r\n", "\n")
