"""Running one command: what it was asked for goes to stdout, everything else to stderr, every end has its exit code.

With ``--json`` stdout is one JSON document whatever happens, a failure included, and whatever a
library, a child process or native code prints meanwhile.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.training.system.errors import ForgeError
from forge.training.system.files import as_disk_error
from forge.training.system.signals import StopRequest, follow_parent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# In the environment of a command that is a step of another, which writes the run's page and says what is next itself
STEP_OF_RUN = "FORGE_STEP_OF_RUN"
_BUG = "this is a bug in Forge: please report it with the lines above"


class _Stdout:
    """The process's own stdout, kept aside while file descriptor 1 leads to stderr."""

    kept: int | None = None
    has_result = False


def print_json(value: Any) -> None:
    """One JSON document on stdout. ``value``: a pydantic model, a dataclass or plain data."""
    from dataclasses import asdict, is_dataclass

    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    # half of a surrogate pair, from a file name that is not UTF-8, becomes JSON's own escape of it
    raw = text.encode("utf-8", "backslashreplace")
    sys.stdout.flush()
    handle = 1 if _Stdout.kept is None else _Stdout.kept
    while raw:
        raw = raw[os.write(handle, raw) :]
    _Stdout.has_result = True


def carry_out(app: Callable[..., Any], arguments: list[str]) -> int:
    """Run ``app`` and return its exit code; every error is one message, and with ``--json`` one document too."""
    _show_any_letter()
    as_json = "--json" in arguments
    if as_json:
        sys.stdout.flush()
        _Stdout.kept = os.dup(1)
        os.dup2(2, 1)
    message = remedy = None
    stop = StopRequest()
    try:
        follow_parent()
        with stop.caught():
            code = app(args=arguments, standalone_mode=False) or 0
    except ForgeError as error:
        code, message, remedy = error.exit_code, error.message, error.remedy
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except KeyboardInterrupt:  # where the command line does not look for one
        code = 130
    except Exception as error:
        code, message, remedy = (130, None, None) if stop.caused(error) else _described(error)
    if code and message is None and stop.number is not None:  # the command line's own code is 130 for either signal
        interruption = stop.interrupted("; nothing is left half done")
        code, message = interruption.exit_code, interruption.message
    if code == 130 and message is None:  # typer makes it of a Ctrl-C that no command caught
        message = "interrupted"
    if message is not None:
        said = printable(f"error: {message}" + (f"\n  -> {remedy}" if remedy else ""), kept="\n")
        if sys.stderr.isatty():
            said = wrapped(said, shutil.get_terminal_size().columns)
        sys.stderr.write(said + "\n")
    if as_json and code and not _Stdout.has_result:
        print_json({"error": message or f"exit code {code}", "remedy": remedy, "exit_code": code})
    restore_stdout()
    return int(code)


def _show_any_letter() -> None:
    """A letter that the console's encoding lacks (a name, a dash) is written as its escape and ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def restore_stdout() -> None:
    """Give file descriptor 1 back, before another program takes this process over or it ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _Stdout.kept is not None:
        os.dup2(_Stdout.kept, 1)
        _Stdout.kept = None


def _described(error: Exception) -> tuple[int, str | None, str | None]:
    """Exit code, message and remedy of what is no ForgeError: wrong usage, the disk's end, a bug."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's, which typer carries a copy of
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{error.format_message()}\n")
            return int(error.exit_code), None, None
        context = getattr(error, "ctx", None)
        usage = context.get_usage() if context is not None else ""
        return int(error.exit_code), error.format_message(), usage.strip() or None
    disk = as_disk_error(error, getattr(error, "filename", None) or "a file")
    if disk is not None:
        return disk.exit_code, disk.message, disk.remedy
    traceback.print_exc()
    return 1, f"{type(error).__name__}: {error}", _BUG


def printable(text: str, kept: str = "") -> str:
    """Names and texts from elsewhere may hold anything; what is not printable could command the terminal."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def counted(number: int, noun: str) -> str:
    """``1 record``, ``2,000 records``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def wrapped(text: str, width: int, indent: str = "") -> str:
    """The text in lines of at most ``width``, broken between words only; a longer word, as a path, stays whole.

    ``indent``: before every line but the first.
    """
    lines: list[str] = []
    for given in text.split("\n"):
        margin = given[: len(given) - len(given.lstrip())]
        lines += textwrap.wrap(
            given,
            max(width - len(indent), 20),
            subsequent_indent=margin,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        ) or [""]
    return ("\n" + indent).join(lines)


def say(console: Console, text: str, lead: Text | str = "") -> None:
    """Print text, never markup. On a terminal it is broken between words; elsewhere each of its lines stays one.

    ``lead`` stands before it; the lines that follow begin below its end.
    """
    from rich.text import Text

    head = Text(lead) if isinstance(lead, str) else lead
    indent = " " * head.cell_len
    body = wrapped(text, console.width, indent) if console.is_terminal else text.replace("\n", "\n" + indent)
    console.print(head + Text(body, style="default not bold"), soft_wrap=True, highlight=False)


def say_next(console: Console, command: Sequence[str] | None) -> None:
    """The command to type next, if there is one: quoted, and broken only where a shell goes on reading."""
    if command is None:
        return
    lead = "next: "
    words: list[str] = []
    for word in command:
        if words and words[-1].startswith("--") and " " not in words[-1]:
            words[-1] += f" {shlex.quote(word)}"  # an option and its value stay together
        else:
            words.append(shlex.quote(word))
    lines = [""]
    for word in words:
        if lines[-1] and console.is_terminal and len(f"{lead}{lines[-1]} {word} \\") > console.width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    separator = " \\\n" + " " * len(lead)
    console.print(lead + separator.join(lines), markup=False, soft_wrap=True, highlight=False)


def shown_path(path: Path) -> str:
    """The path as it is typed from here: a relative one as it is, and relative where it is below this directory."""
    folder = Path.cwd()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) and path != folder else str(path)


def make_plain() -> None:
    """No colours, no bar, no carriage returns, here and in the processes that this one starts: rich is told so."""
    os.environ["TTY_COMPATIBLE"] = "0"


def rows_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Names in bold and their values, two columns without a header. Values are text, never markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table
