"""What stands in the training records and in the held-out ones: such a text's loss says nothing about new documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forge.training.data.duplicates import DUPLICATE_SIMILARITY, similar_pairs
from forge.training.data.records import Record

_NUM_SHOWN = 5


@dataclass(frozen=True)
class NearPair:
    """Two records by their lines. ``similarity``: Jaccard's, of 5-word shingles, from 0.8 to 1."""

    held_out_line: int
    train_line: int
    similarity: float


@dataclass(frozen=True)
class Overlap:
    """Held-out records whose answer is trained, and those that are nearly the same as a trained one."""

    num_held_out: int
    equal_lines: list[int]
    near: list[NearPair]  # the most similar trained record of each


def find_overlap(train: Sequence[Record], held_out: Sequence[Record]) -> Overlap:
    """Compare the answers; blanks, line ends and, for near ones, letter case do not count."""
    trained = [_answer(record) for record in train]
    others = [_answer(record) for record in held_out]
    known = set(trained)
    equal = [i for i, text in enumerate(others) if text in known]
    left = [i for i, text in enumerate(others) if text not in known]
    most: dict[int, tuple[float, int]] = {}
    for i, j, similarity in similar_pairs(trained, [others[i] for i in left], DUPLICATE_SIMILARITY):
        if similarity > most.get(j, (0.0, 0))[0]:
            most[j] = (similarity, i)
    near = [NearPair(held_out[left[j]].line, train[i].line, s) for j, (s, i) in sorted(most.items())]
    return Overlap(len(held_out), [held_out[i].line for i in equal], near)


def describe_overlap(overlap: Overlap) -> list[str]:
    """One line for equal texts and one for near ones, where there are any."""
    lines = []
    if overlap.equal_lines:
        where = _listed([str(line) for line in overlap.equal_lines])
        lines.append(
            f"{len(overlap.equal_lines)} of {overlap.num_held_out} held-out texts are trained too: lines {where}"
        )
    if overlap.near:
        where = _listed([f"line {n.held_out_line} is {n.similarity:.0%} line {n.train_line}" for n in overlap.near])
        lines.append(f"{len(overlap.near)} of {overlap.num_held_out} held-out texts are nearly trained ones: {where}")
    return lines


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _NUM_SHOWN:,} more" if len(items) > _NUM_SHOWN else ""
    return ", ".join(items[:_NUM_SHOWN]) + more


def _answer(record: Record) -> str:
    return " ".join(record.messages[-1].content.split())
