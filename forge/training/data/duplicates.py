"""Exact and near duplicates by Jaccard similarity of 5-word shingles, without comparing all pairs.

Exact duplicates are equal but for line ends. For near ones blanks do not count, except that a line's
depth of indentation belongs to its first word: in code and YAML it is meaning, its width is not.

Similarity is exact, not estimated. Pairs are found by prefix filtering (Chaudhuri et al. 2006;
Bayardo et al. 2007; positions as in PPJoin, Xiao et al. 2008): let every document's shingles be
sorted by how many documents have them, rarest first. If J(x, y) >= t, then x and y share at
least t/(1+t) * (|x|+|y|) shingles, so with documents taken from the longest to the shortest
(|x| <= |y|) they share one among x's first |x| - ceil(2t/(1+t)|x|) + 1 and y's first
|y| - ceil(t|y|) + 1. Only those are looked up and stored. What all documents have in common, a
licence or a template, stands last in that order and is reached only in documents that are
mostly made of it, which for equal lengths are true matches. So no posting list has to be cut
off, which would lose pairs, and boilerplate does not make the work quadratic.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_WORDS = 5
DUPLICATE_SIMILARITY = 0.8  # at or above: the shorter is dropped
RELATED_SIMILARITY = 0.5  # at or above: never on both sides of a split

_INDENTED = re.compile(r"^[ \t]+\S", re.MULTILINE)
_Shingles = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Duplicate:
    """``path`` was dropped for ``kept``. ``similarity``: Jaccard's; ``exact``: equal but for line ends."""

    path: str
    kept: str
    similarity: float
    exact: bool


@dataclass(frozen=True)
class Deduplicated:
    """``kept``: indices of the documents that stay, ascending. ``groups``: a number for each of them;
    documents of different groups have a similarity below :data:`RELATED_SIMILARITY`."""

    kept: list[int]
    groups: list[int]
    duplicates: list[Duplicate]


def deduplicate(paths: Sequence[str], texts: Sequence[str]) -> Deduplicated:
    """Drop documents that repeat others: of equal ones the first stays, of near ones the longest.

    Line ends do not count for either; for near ones neither do letter case and blanks, but for depths of
    indentation. Texts without blanks between words (Chinese, Japanese) have few shingles, so only
    near-identical ones match. For ``groups`` indentation does not count either.
    """
    first: dict[bytes, int] = {}
    duplicates, unique = [], []
    for index, text in enumerate(texts):
        original = first.setdefault(_digest(text), index)
        if original == index:
            unique.append(index)
        else:
            duplicates.append(Duplicate(paths[index], paths[original], 1.0, True))
    shingles, num_single = _ranked_shingles(_words_with_depths(texts[index]) for index in unique)
    longest_first = sorted(range(len(unique)), key=lambda i: -len(shingles[i]))  # stable: then by path
    near = _Index(shingles, num_single, DUPLICATE_SIMILARITY)
    kept = []
    for i in longest_first:
        match = next(near.matches(i), None)
        if match is None:
            near.add(i)
            kept.append(i)
        else:
            other, similarity = match
            duplicates.append(Duplicate(paths[unique[i]], paths[unique[other]], round(similarity, 4), False))
    shingles, num_single = _ranked_shingles(_words(texts[index]) for index in unique)
    related = _Index(shingles, num_single, RELATED_SIMILARITY)
    for i in sorted(kept, key=lambda i: -len(shingles[i])):
        related.join_matches(i)
        related.add(i)
    kept.sort()
    return Deduplicated(
        kept=[unique[i] for i in kept],
        groups=[related.group_of(i) for i in kept],
        duplicates=sorted(duplicates, key=lambda d: d.path),
    )


def similar_pairs(texts: Sequence[str], others: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """``(text, other, similarity)`` of every pair across the two at least ``threshold`` similar, ascending."""
    shingles, num_single = _ranked_shingles(map(_words, (*texts, *others)))
    sides = [_Index(shingles, num_single, threshold) for _ in range(2)]
    pairs = []
    for i in sorted(range(len(shingles)), key=lambda i: -len(shingles[i])):
        is_other = i >= len(texts)
        for match, similarity in sides[not is_other].matches(i):
            text, other = (match, i) if is_other else (i, match)
            pairs.append((text, other - len(texts), round(similarity, 4)))
        sides[is_other].add(i)
    return sorted(pairs)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8")).digest()


def _words(text: str) -> list[str]:
    return text.lower().split()


def _words_with_depths(text: str) -> list[str]:
    """The words, the first of each indented line with its depth: the number of lines that it stands under."""
    if _INDENTED.search(text) is None:
        return _words(text)
    marked: list[str] = []
    widths: list[int] = []  # of the lines that the present one stands under
    for line in text.lower().expandtabs(8).split("\n"):
        first, *others = line.split() or [""]
        if not first:
            continue
        width = len(line) - len(line.lstrip())
        while widths and widths[-1] >= width:
            widths.pop()
        marked += [f"{len(widths)} {first}" if widths else first, *others]
        widths.append(width)
    return marked


def _ranked_shingles(texts: Iterable[Sequence[str]]) -> tuple[list[_Shingles], int]:
    """Each text's distinct shingles, of its words, as ranks, ascending; rank 0 is the shingle of the fewest documents.

    Also the number of ranks that only one document has: they come first and match nothing. A
    shingle is a 64-bit mixture of five word numbers; two of ten million distinct ones are equal by
    accident with a probability of 3e-6.
    """
    numbers: defaultdict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__
    hashed = []
    for text in texts:
        row = np.array(list(map(numbers.__getitem__, text)), dtype=np.uint64)
        width = min(NUM_WORDS, len(row))
        mixed = np.zeros(len(row) - width + 1, dtype=np.uint64)
        for offset in range(width):
            mixed = _mix(mixed + row[offset : len(row) - width + 1 + offset])
        hashed.append(np.unique(mixed))
    if not hashed:
        return [], 0
    _, inverse, counts = np.unique(np.concatenate(hashed), return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.uint32)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts), dtype=np.uint32)
    borders = np.cumsum([len(row) for row in hashed])[:-1]
    return [np.sort(row) for row in np.split(rank[inverse], borders)], int((counts == 1).sum())


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64 bits that spreads every bit."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _similarity(a: _Shingles, b: _Shingles) -> float:
    shared = len(a) + len(b) - len(np.union1d(a, b))
    return shared / (len(a) + len(b) - shared)


@dataclass(slots=True)
class _Run:
    """Neighbouring entries of a posting list whose documents are in one group, longest document first."""

    group: int
    entries: list[tuple[int, int, int]]  # number of shingles, document, position in it


class _Index:
    """Finds the documents at least ``threshold`` similar to one, among those added before it.

    Documents must come longest first, so a posting list is sorted by length. It is read from its
    short end, only as far as lengths can match, and a run of the asker's own group is passed over
    in one step: a family of documents from one template costs each of them one comparison.
    """

    def __init__(self, shingles: Sequence[_Shingles], num_single: int, threshold: float) -> None:
        self._shingles = shingles
        self._num_single = num_single
        self._threshold = threshold
        self._postings: dict[int, list[_Run]] = {}
        self._parent = list(range(len(shingles)))

    def group_of(self, index: int) -> int:
        parent = self._parent
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def add(self, index: int) -> None:
        size, group = len(self._shingles[index]), self.group_of(index)
        for position, rank in self._prefix(index, size - _ceil(self._threshold * size) + 1):
            runs = self._postings.setdefault(rank, [])
            if not runs or self.group_of(runs[-1].group) != group:
                runs.append(_Run(group, []))
            runs[-1].entries.append((size, index, position))

    def join_matches(self, index: int) -> None:
        """Put a document and all that are similar to it into one group."""
        for other, _ in self.matches(index):
            lower, higher = sorted((self.group_of(index), self.group_of(other)))
            self._parent[higher] = lower

    def _prefix(self, index: int, length: int) -> Iterator[tuple[int, int]]:
        """Positions and ranks of a document's rarest shingles, those without a second document left out."""
        row = self._shingles[index]
        start = int(np.searchsorted(row, self._num_single))
        return enumerate(row[start:length].tolist(), start)

    def matches(self, index: int) -> Iterator[tuple[int, float]]:
        """Similar documents and their similarity, in an order that is the same on every run."""
        mine, t = self._shingles[index], self._threshold
        size, needed = len(mine), t / (1 + t)  # needed: share of |x| + |y| that must be common
        seen = set()
        for position, rank in self._prefix(index, size - _ceil(2 * needed * size) + 1):
            longest = (size - position) / needed - size + 1e-6  # of y; more, and what is left of x cannot suffice
            for run in _joined(self._postings.get(rank, []), self.group_of):
                if run.entries[-1][0] > longest:
                    break
                for other_size, other, other_position in reversed(run.entries):
                    if other_size > longest or self.group_of(run.group) == self.group_of(index):
                        break
                    if other in seen or other_size - other_position < _ceil(needed * (size + other_size)):
                        continue
                    seen.add(other)
                    similarity = _similarity(mine, self._shingles[other])
                    if similarity >= t:
                        yield other, similarity


def _joined(runs: list[_Run], group_of: Callable[[int], int]) -> Iterator[_Run]:
    """The runs from the short end; neighbours whose groups have become one since are made one."""
    position = len(runs) - 1
    while position >= 0:
        while position > 0 and group_of(runs[position - 1].group) == group_of(runs[position].group):
            runs[position - 1].entries.extend(runs.pop(position).entries)
            position -= 1
        yield runs[position]
        position -= 1


def _ceil(value: float) -> int:
    """Rounded up, but not because of the last bits of a product."""
    return math.ceil(value - 1e-9)
