"""Text and data without what belongs to one machine: absolute paths and terminal codes go."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from forge.training.system.environment import ROOT

LOG_TAIL_CHARACTERS = 4000

# ECMA-48: control sequences (CSI), operating system commands (OSC), other two-character escapes.
_TERMINAL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Two components or more, so that " /s" stays; what precedes excludes relative paths and the paths of URLs.
_PATH = re.compile(r"(?<![\w.~/-])(?:/[^\s/\"'`<>|:;,()\[\]{}=]+)+/([^\s/\"'`<>|:;,()\[\]{}=]+)/?")


def without_paths(text: str) -> str:
    """Absolute paths become their last component; those with blanks in them only below known directories."""
    text = text.replace("file://", "")
    for directory, name in _known_directories():
        # first the directory alone, so that a blank in its name cannot end a path early
        text = re.sub(rf"(?<![\w.~/-]){re.escape(directory)}(?![\w.-])", f"/-/{name}", text)
    return _PATH.sub(r"\1", text)


def _known_directories() -> list[tuple[str, str]]:
    """Directories of this machine, longest first, and what stays of them; of the home not the user's name."""
    home, temporary = Path.home(), Path(tempfile.gettempdir())
    names = {home: "~", home.resolve(): "~"}
    names |= {path: path.name for path in (ROOT, ROOT.resolve(), temporary, temporary.resolve())}
    known = {str(path): name for path, name in names.items() if path != Path("/")}
    return sorted(known.items(), key=lambda item: -len(item[0]))


def portable(value: Any) -> Any:
    """JSON-able data with every absolute path in its strings reduced to its last component."""
    if isinstance(value, str):
        if value.startswith("/") and "\n" not in value:
            return Path(value).name
        return without_paths(value)
    if isinstance(value, dict):
        return {portable(key) if isinstance(key, str) else key: portable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [portable(part) for part in value]
    return value


def portable_setting(setting: str) -> str:
    """A ``key=value`` or an argument that may be a path: ``data.train=/a/b.jsonl`` becomes ``data.train=b.jsonl``."""
    key, separator, value = setting.partition("=")
    return f"{key}={portable(value)}" if separator else str(portable(setting))


def log_tail(output: bytes) -> str:
    """The last :data:`LOG_TAIL_CHARACTERS` of a log: valid text, no terminal codes, no paths of this machine.

    Of a line that was overwritten (a progress bar's carriage returns) the last state is kept.
    """
    text = _TERMINAL.sub("", output.decode("utf-8", errors="replace")).replace("\r\n", "\n")
    lines = [_CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]) for line in text.split("\n")]
    return without_paths("\n".join(lines)).strip("\n")[-LOG_TAIL_CHARACTERS:]
