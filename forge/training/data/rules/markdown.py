"""A document's blocks with the lines they stand in, by markdown-it. All is cut out, unchanged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal

import yaml

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

_NEWLINE = re.compile(r"\r\n?|\n")  # as markdown-it divides lines
_FRONT_MATTER = re.compile(
    r"(---|\+\+\+)[ \t]*(?:\r\n?|\n)(.*?)(?:\r\n?|\n)(?:\1|\.\.\.)[ \t]*(?:\r\n?|\n|\Z)", re.DOTALL
)
_MOST_FRONT_MATTER = 20_000  # characters
_TASK = re.compile(r"\[[ xX]\]\s+")
_IGNORED_TEXT = ("html_inline", "image")


@dataclass(frozen=True, slots=True)
class Inline:
    """``source``: as it is written, without the marks of its block; ``plain``: without markup, on one line."""

    source: str
    plain: str


@dataclass(frozen=True, slots=True)
class Block:
    """``lines``: the first and the one after the last, from 0. ``inlines``: a paragraph or item has one.

    ``rows``: of a table, the first its head, and ``row_lines`` the line of each. ``headings``: plain, outermost first.
    ``opens_section``: a paragraph directly below its
    heading, or a list with at most one block between. ``depth``: lists and quotes around it.
    """

    kind: Literal["heading", "paragraph", "item", "list", "table", "fence"]
    lines: tuple[int, int]
    headings: tuple[str, ...]
    inline: Inline = Inline("", "")
    rows: tuple[tuple[Inline, ...], ...] = ()
    row_lines: tuple[int, ...] = ()
    language: str = ""
    content: str = ""  # of a fence
    level: int = 0  # of a heading
    num_items: int = 0  # of a list
    opens_section: bool = False
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A scalar of the front matter: its key, dotted where it is nested, and its value as it is written."""

    key: str
    value: str
    line: int  # from 0


@dataclass(frozen=True)
class Page:
    """A document. ``title``: its first heading of level 1, plain. ``starts``: of each line, and the end of the text."""

    text: str
    starts: list[int]
    title: str | None
    front_matter: list[Entry] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def source(self, lines: tuple[int, int]) -> str:
        """Whole lines, without the blank ones around them."""
        return self.text[self.starts[lines[0]] : self.starts[lines[1]]].strip("\r\n")

    def sections(self) -> Iterator[tuple[Block, tuple[int, int]]]:
        """Each heading and its section's lines, those of the sections below it included."""
        headings = [block for block in self.blocks if block.kind == "heading"]
        for index, heading in enumerate(headings):
            after = (other.lines[0] for other in headings[index + 1 :] if other.level <= heading.level)
            yield heading, (heading.lines[0], next(after, len(self.starts) - 1))


def read_page(text: str) -> Page:
    """Parse a document as CommonMark with tables; front matter in YAML is read, in TOML passed over."""
    starts = [0, *(match.end() for match in _NEWLINE.finditer(text))]
    if starts[-1] != len(text):
        starts.append(len(text))
    entries, body = _front_matter(text)
    blocks = list(_blocks(_parser().parse(body)))
    title = next((b.inline.plain for b in blocks if b.kind == "heading" and b.level == 1 and b.inline.plain), None)
    return Page(text, starts, title, entries, blocks)


def plain_line(source: str) -> str:
    """A line of a paragraph without its markup."""
    return _plain(_parser().parseInline(source)[0])


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").enable(["table", "strikethrough"])


def _front_matter(text: str) -> tuple[list[Entry], str]:
    """Its entries, and the text with as many empty lines in its place."""
    match = _FRONT_MATTER.match(text, text.startswith("\ufeff"))
    if match is None or len(match[0]) > _MOST_FRONT_MATTER:
        return [], text
    body = "\n" * len(_NEWLINE.findall(match[0])) + text[match.end() :]
    if match[1] != "---":
        return [], body
    try:
        root = yaml.compose(match[2], Loader=yaml.SafeLoader)
        return list(_entries(root, "")), body
    except (yaml.YAMLError, RecursionError):
        return [], text if _is_prose(match[2]) else body


def _is_prose(text: str) -> bool:
    """Whether what stands between two rules is text, and not settings with a mistake in them."""
    return not re.search(r"^[\w-]+:(\s|$)", text, re.MULTILINE)


def _entries(node: yaml.Node | None, prefix: str) -> Iterator[Entry]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if isinstance(value, yaml.ScalarNode) and "\n" not in value.value:
            yield Entry(prefix + key.value, value.value, 1 + value.start_mark.line)
        elif isinstance(value, yaml.MappingNode) and not prefix:
            yield from _entries(value, f"{key.value}.")


def _blocks(tokens: Sequence[Token]) -> Iterator[Block]:
    headings: list[tuple[int, str]] = []
    depth, num_since = 0, 2  # blocks since the last heading
    items: list[bool] = []  # whether each list item that is open has had its own text
    for index, token in enumerate(tokens):
        above = tuple(name for _, name in headings)
        lines = (token.map[0], token.map[1]) if token.map else (0, 0)
        if token.type == "heading_open" and depth == 0:
            inline, level = _inline(tokens[index + 1]), int(token.tag[1])
            while headings and headings[-1][0] >= level:
                headings.pop()
            yield Block("heading", lines, tuple(name for _, name in headings), inline, level=level)
            headings.append((level, inline.plain))
            num_since = 0
            continue
        if token.type in ("bullet_list_open", "ordered_list_open"):
            if depth == 0:
                num = _num_items(tokens, index)
                yield Block("list", lines, above, num_items=num, opens_section=num_since <= 1)
            depth += 1
        elif token.type == "blockquote_open":
            depth += 1
        elif token.type in ("bullet_list_close", "ordered_list_close", "blockquote_close"):
            depth -= 1
        elif token.type == "list_item_open":
            items.append(False)
        elif token.type == "list_item_close":
            items.pop()
        elif token.type == "paragraph_open":
            inline = _inline(tokens[index + 1])
            is_item = bool(items) and not items[-1]
            if is_item:
                items[-1] = True
                inline = Inline(_TASK.sub("", inline.source, count=1), _TASK.sub("", inline.plain, count=1))
            yield Block(
                "item" if is_item else "paragraph",
                lines,
                above,
                inline,
                opens_section=num_since == 0 and depth == 0,
                depth=depth,
            )
        elif token.type == "table_open":
            rows, row_lines = _rows(tokens, index)
            yield Block("table", lines, above, rows=rows, row_lines=row_lines, depth=depth)
        elif token.type == "fence":
            language = (token.info.split() or [""])[0].strip("{}.").lower()
            yield Block("fence", lines, above, language=language, content=token.content, depth=depth)
        if token.level == 0 and token.nesting <= 0 and token.type not in ("heading_close", "html_block"):
            num_since += 1


def _num_items(tokens: Sequence[Token], index: int) -> int:
    num, level = 0, tokens[index].level
    for token in tokens[index + 1 :]:
        if token.level == level:
            return num
        num += token.type == "list_item_open" and token.level == level + 1
    return num


def _rows(tokens: Sequence[Token], index: int) -> tuple[tuple[tuple[Inline, ...], ...], tuple[int, ...]]:
    rows: list[list[Inline]] = []
    lines: list[int] = []
    for token in tokens[index + 1 :]:
        if token.type == "table_close":
            break
        if token.type == "tr_open" and token.map:
            rows.append([])
            lines.append(token.map[0])
        elif token.type == "inline":
            rows[-1].append(_inline(token))
    return tuple(map(tuple, rows)), tuple(lines)


def _inline(token: Token) -> Inline:
    return Inline(token.content.strip(), _plain(token))


def _plain(token: Token) -> str:
    parts = []
    for child in token.children or []:
        if child.type in ("softbreak", "hardbreak"):
            parts.append(" ")
        elif child.type not in _IGNORED_TEXT:
            parts.append(child.content)
    return " ".join("".join(parts).split())
