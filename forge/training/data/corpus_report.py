"""CorpusReport: what became of every file of a repository, and its table."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forge.training.data.discovery import Skipped
from forge.training.data.duplicates import Duplicate
from forge.training.system.secrets import Secret

if TYPE_CHECKING:
    from rich.console import Console

_NUM_LINES_SHOWN = 10


@dataclass(frozen=True)
class Folder:
    """Kept documents under a top-level folder, ``.`` for the root itself."""

    name: str
    num_documents: int
    num_characters: int


@dataclass(frozen=True)
class MarkerCount:
    """Literal chat markers such as ``<|im_end|>`` in a kept document; tokenisation makes them plain text."""

    path: str
    num_markers: int


@dataclass(frozen=True)
class Output:
    """A file that was written."""

    path: str
    num_records: int
    sha256: str


@dataclass(frozen=True)
class CorpusReport:
    """``num_files``: kept and skipped ones, not what lies in skipped folders (their names end in ``/``).

    ``num_bytes`` and ``megabytes_per_second`` are of all text read, duplicates included; a megabyte
    is 10^6 bytes. Secrets stand in skipped documents, or in kept ones where ``secrets_allowed``. Fewer
    than ``validation_share`` are held out where large families of related documents stay together.
    """

    root: str
    num_files: int
    num_kept: int
    num_characters: int
    num_bytes: int
    num_train: int
    num_validation: int
    validation_share: float
    folders: list[Folder]
    skipped: list[Skipped]
    duplicates: list[Duplicate]
    control_markers: list[MarkerCount]
    secrets: list[Secret]
    secrets_allowed: bool
    outputs: list[Output]
    seconds: float
    megabytes_per_second: float


def reasons(skipped: list[Skipped]) -> str:
    """The number of skipped paths by reason, most frequent first, on one line."""
    counted = sorted(Counter(s.reason for s in skipped).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in counted)


def print_report(report: CorpusReport, console: Console) -> None:
    """Print files, characters, what was kept, what was skipped and why, and the next command."""
    from rich.table import Table
    from rich.text import Text

    near = [d for d in report.duplicates if not d.exact]
    table = Table(title=Text(f"dataset: {_shown(report.root)}"), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    rows = [
        ("files", f"{report.num_files:,}"),
        ("kept", f"{report.num_kept:,} documents, {report.num_characters:,} characters"),
        ("skipped", f"{len(report.skipped):,}" + (f": {reasons(report.skipped)}" if report.skipped else "")),
        ("duplicates", f"{len(report.duplicates) - len(near):,} exact, {len(near):,} near (dropped)"),
        ("secrets", f"{len(report.secrets):,}" + (" (kept: --allow-secrets)" if report.secrets_allowed else "")),
        ("chat markers as text", f"{sum(m.num_markers for m in report.control_markers):,}"),
        ("speed", f"{report.megabytes_per_second:.1f} MB/s: {report.num_bytes / 1e6:.1f} MB, {report.seconds:.2f} s"),
    ]
    if report.num_validation:
        few = report.num_validation < 0.8 * report.validation_share * report.num_kept
        why = ", fewer than asked: related documents stay on one side" if few else ""
        rows.insert(2, ("split", f"{report.num_train:,} to train, {report.num_validation:,} held out{why}"))
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table)
    folders = Table(title="kept by folder", title_justify="left")
    folders.add_column("folder")
    folders.add_column("documents", justify="right")
    folders.add_column("characters", justify="right")
    for folder in report.folders:
        folders.add_row(Text(_shown(folder.name)), f"{folder.num_documents:,}", f"{folder.num_characters:,}")
    console.print(folders)
    usual = {"ignored by .gitignore", "tool folder", "exact duplicate", "near duplicate", "secret"}
    listed = [s for s in report.skipped if s.reason not in usual]
    _print_lines(console, "skipped", [f"{s.path}: {s.reason}" + (f", {s.detail}" if s.detail else "") for s in listed])
    _print_lines(console, "secrets", [f"{s.path}:{s.line}: {s.rule}" for s in report.secrets])
    _print_lines(console, "near duplicates", [f"{d.path} is {d.similarity:.0%} {d.kept}" for d in near])
    _print_lines(console, "chat markers", [f"{m.path}: {m.num_markers:,}" for m in report.control_markers])
    for output in report.outputs:
        console.print(Text(f"wrote {output.path}: {output.num_records:,} records, sha256 {output.sha256[:16]}"))
    console.print(Text(f"next: forge preview CONFIG {_settings(report.outputs)}"))


def _settings(outputs: list[Output]) -> str:
    names = ("data.train", "data.validation")
    return " ".join(f"--set {shlex.quote(f'{n}={o.path}')}" for n, o in zip(names, outputs, strict=False))


def _print_lines(console: Console, title: str, lines: list[str]) -> None:
    from rich.text import Text

    if lines:
        console.print(f"{title}:")
    for line in lines[:_NUM_LINES_SHOWN]:
        console.print(Text(f"  {_shown(line)}"))
    if len(lines) > _NUM_LINES_SHOWN:
        console.print(f"  and {len(lines) - _NUM_LINES_SHOWN:,} more (--json lists all)")


def _shown(text: str) -> str:
    """File names may hold anything; what is not printable could command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
