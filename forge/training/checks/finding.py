"""Finding: one line of ``check``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from forge.training.system.command import counted, say
from forge.training.system.errors import ForgeError

if TYPE_CHECKING:
    from rich.console import Console

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """``exit_code`` is what a command would end with because of an error; 0 for ok and warning."""

    level: Level
    subject: str
    message: str
    remedy: str | None = None
    exit_code: int = 0


def ok(subject: str, message: str) -> Finding:
    """All is well."""
    return Finding("ok", subject, message)


def warning(subject: str, message: str, remedy: str | None = None) -> Finding:
    """Works, and should be known."""
    return Finding("warning", subject, message, remedy)


def failure(subject: str, error: ForgeError) -> Finding:
    """What a command would raise."""
    return Finding("error", subject, error.message, error.remedy, error.exit_code)


def guarded(subject: str, question: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of one part; an error ends that part and no other."""
    try:
        yield from question()
    except ForgeError as error:
        yield failure(subject, error)


def exit_code(findings: Sequence[Finding]) -> int:
    """The exit code of the first error, 0 if there is none."""
    return next((finding.exit_code for finding in findings if finding.level == "error"), 0)


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print one line per finding and what to do about it, then how many there are."""
    from rich.text import Text

    styles = {"ok": "green", "warning": "yellow", "error": "bold red"}
    width = max((len(finding.subject) for finding in findings), default=0)
    for finding in findings:
        lead = Text(f"{finding.level:<7}", style=styles[finding.level])
        lead.append(f"  {finding.subject:<{width}}  ", style="default not bold")
        say(console, finding.message, lead)
        if finding.remedy:
            say(console, finding.remedy, f"{'':<{width + 9}}  -> ")
    counts = {level: sum(finding.level == level for finding in findings) for level in styles}
    say(console, f"{counts['ok']} ok, {counted(counts['warning'], 'warning')}, {counted(counts['error'], 'error')}")
