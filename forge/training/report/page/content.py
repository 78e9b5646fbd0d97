"""What a report is made of, before it is Markdown or HTML: sections of prose, charts and tables."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What XML cannot hold (and a terminal should not): control characters, halves of surrogate pairs, non-characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """The text with a replacement character for each that no page can show."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


@dataclass(frozen=True)
class Chart:
    """A drawing as inline SVG. ``description`` says in words what it shows, for who cannot see it."""

    name: str  # unique in the report: prefix of every id inside the SVG
    title: str
    description: str
    svg: str


@dataclass(frozen=True)
class Row:
    """``runs``: ids of the runs that the cells come from. ``status``: a verdict, shown as a badge before the cells.

    ``note`` stands in small print under the first cell.
    """

    cells: tuple[str, ...]
    runs: tuple[str, ...] = ()
    status: str | None = None
    anchor: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Table:
    """``texts``: how many of the first columns hold words; the others hold numbers and are set to the right."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    texts: int = 1
    is_folded: bool = False  # shown on demand: the numbers behind a curve
    is_wide: bool = False  # scrolls sideways on a narrow screen instead of being stacked
    is_beside: bool = False  # stands beside the chart before it where the page is wide enough

    @property
    def has_runs(self) -> bool:
        """Whether runs need a column of their own: not where the cells name them already."""
        return any(set(row.runs) - set(row.cells) for row in self.rows)

    @property
    def has_status(self) -> bool:
        return any(row.status for row in self.rows)


@dataclass(frozen=True)
class Listing:
    """Text to be copied or read as it is: commands. ``is_folded``: shown on demand."""

    caption: str
    text: str
    is_folded: bool = False


Part = Chart | Table | Listing


@dataclass(frozen=True)
class Section:
    """``parts`` in order; charts that are neighbours stand side by side."""

    name: str
    title: str
    intro: str = ""
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
