"""Text that is no prose and no code of anyone's: judged by what is in it, by name only where the name says it all."""

from __future__ import annotations

import os
import re

_LFS_POINTER = re.compile(
    r"version https://(?:git-lfs\.github|hawser\.github)\.com/spec/v1\n(?:.*\n)*?oid sha256:[0-9a-f]{64}\n"
)
_MAX_POINTER_CHARACTERS = 1024
_LOCK_FILES = frozenset(
    {"package-lock.json", "npm-shrinkwrap.json", "yarn.lock", "pnpm-lock.yaml", "bun.lock", "deno.lock"}
    | {"poetry.lock", "pipfile.lock", "pdm.lock", "uv.lock", "pixi.lock", "conda-lock.yml", "cargo.lock", "go.sum"}
    | {"gemfile.lock", "composer.lock", "mix.lock", "rebar.lock", "pubspec.lock", "podfile.lock", "package.resolved"}
    | {"cartfile.resolved", "packages.lock.json", "paket.lock", "gradle.lockfile", "flake.lock", "stack.yaml.lock"}
    | {"cabal.project.freeze", ".terraform.lock.hcl", "chart.lock", "module.bazel.lock"}
)
_LOCK_CONTENT = re.compile(r'\s*\{\s*(?:"[^"]*"\s*:\s*(?:"[^"]*"|\d+|true|false)\s*,\s*){0,4}"lockfileVersion"\s*:')
_ARMOUR = re.compile(r"\s*-----BEGIN (?!.*PRIVATE KEY)[A-Z0-9 #]+-----")

# A header comment: the lines before the first that is neither blank nor a comment.
_COMMENT = re.compile(
    r"""\s*(?://|/\*|\*|\#|--|;|%|<!--|<\?|\(\*|\{-|\.\.\ |"{3}|'{3}|@?rem\b|')""", re.IGNORECASE | re.VERBOSE
)
_NUM_HEADER_LINES = 40
_UNTOUCHED = r"\bdo\s+not\s+(?:edit|modify|change|touch)\b"
_MADE = r"(?:\b(?:auto(?:matically)?[- ]?)?generated\b|@generated\b)"
_GENERATED = re.compile(
    rf"(?<![\w`'\"])@generated\b | {_MADE}.{{0,300}}?{_UNTOUCHED} | {_UNTOUCHED}.{{0,300}}?{_MADE}"
    r"| \bthis\ file\ (?:is|was|has\ been)\ (?:auto-?|automatically\ )@?generated\b",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_PROSE = frozenset(
    {".md", ".markdown", ".mdown", ".mkd", ".mdx", ".txt", ".rst", ".adoc", ".asciidoc", ".asc", ".tex", ".org"}
    | {".textile", ".wiki", ".mediawiki", ".pod", ".typ", ".rtf", ".ipynb", ".rmd", ".qmd"}
)
# what begins a comment in code begins a heading in these
_WITH_HEADINGS = _PROSE - {".txt", ".rst", ".tex", ".pod", ".typ"}
_RECORDS = frozenset({".csv", ".tsv", ".jsonl", ".ndjson"})  # a line is a record, however long
_LONG_LINE = 500  # characters
_MIN_MINIFIED = 1000  # characters: shorter, and it does no harm


def machine_kind(path: str, text: str) -> tuple[str, str] | None:
    """Reason and detail for a text that no person wrote to be read, ``None`` for documents and code."""
    name = path.rsplit("/", 1)[-1].lower()
    suffix = os.path.splitext(name)[1]
    if len(text) <= _MAX_POINTER_CHARACTERS and _LFS_POINTER.match(text):
        return "Git LFS pointer", "run git lfs pull"
    if name in _LOCK_FILES or (suffix == ".json" and _LOCK_CONTENT.match(text)):
        return "lock file", ""
    if suffix == ".svg":
        return "picture", "drawn as text"
    if _ARMOUR.match(text):
        return "certificate or signature", ""
    marker = _generated_marker(text, has_headings=suffix in _WITH_HEADINGS)
    if marker:
        return ("lock file" if suffix == ".lock" else "generated"), f"it says so: {marker}"
    if suffix not in _PROSE | _RECORDS and _is_minified(text, is_named_so=".min." in name):
        return "minified", f"a line of {max(map(len, text.splitlines())):,} characters"
    return None


def _generated_marker(text: str, *, has_headings: bool) -> str:
    """The words in a header comment that say a program wrote the file, ``""`` where there are none.

    Where headings look like comments, only an HTML comment, and only as the very first line, counts.
    """
    header = []
    for line in text[:20_000].split("\n")[:_NUM_HEADER_LINES]:
        if line.strip() and not (line.lstrip().startswith("<!--") if has_headings else _COMMENT.match(line)):
            break
        header.append(line)
    if has_headings:
        header = [line for line in header if line.strip()][:1]
    found = _GENERATED.search("\n".join(header))
    return " ".join(found.group().split())[:60] if found else ""


def _is_minified(text: str, *, is_named_so: bool) -> bool:
    """Whether most of a text stands in lines that nobody reads: very long, and no sentences."""
    long_line = 100 if is_named_so else _LONG_LINE
    if len(text) < (long_line if is_named_so else _MIN_MINIFIED):
        return False
    long = [line for line in text.splitlines() if len(line) > long_line]
    return sum(map(len, long)) > len(text) / 2 and not _is_prose("".join(long))


def _is_prose(text: str) -> bool:
    """Sentences are letters and blanks; where the script has blanks at all, a tenth of them."""
    num_blanks = sum(map(str.isspace, text))
    num_letters = sum(map(str.isalpha, text))
    is_wide = sum(character > "\u2e80" for character in text) > len(text) / 2  # Chinese, Japanese, Korean
    return (num_letters + num_blanks) / len(text) > 0.85 and (is_wide or num_blanks / len(text) > 0.08)
