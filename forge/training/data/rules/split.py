"""Which records are held out, so that no held-out question was trained in other words or from another document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forge.training.data.rules.records import RuleRecord
from forge.training.system.errors import DataError

# Which of (names, texts, groups) to hold out, a share of them: forge.training.data.corpus.hold_out.
HoldOut = Callable[[Sequence[str], Sequence[str], Sequence[int]], set[int]]


@dataclass(frozen=True)
class Parted:
    """``num_left_out``: questions of held-out documents whose fact a trained document says too: on neither side.

    ``num_facts``, ``num_held_out``: groups of facts in all, and those whose questions are all held out.
    """

    train: list[RuleRecord]
    held_out: list[RuleRecord]
    num_left_out: int
    num_facts: int
    num_held_out: int


def part_records(records: Sequence[RuleRecord], held_paths: set[str], hold_out: HoldOut | None) -> Parted:
    """Records of held-out documents are held out; so is a share of the facts of the others, with all their questions.

    A document whose facts are held out is trained all the same: whether the model can answer what it only read is what
    such questions measure. ``hold_out`` of ``None``: nothing of the trained documents.
    """
    paths_of: defaultdict[int, set[str]] = defaultdict(set)
    named: dict[int, str] = {}
    for record in records:
        if record.group:
            paths_of[record.group].add(record.path)
            named.setdefault(record.group, record.key)
    trained = [group for group, paths in paths_of.items() if not paths <= held_paths]
    chosen: set[int] = set()
    if hold_out is not None and len(trained) > 1:
        try:
            keys = [named[group] for group in trained]
            chosen = {trained[index] for index in hold_out(keys, [""] * len(trained), trained)}
        except DataError:  # too few facts to part them
            chosen = set()
    held_groups = chosen | (paths_of.keys() - set(trained))
    sides: tuple[list[RuleRecord], list[RuleRecord]] = ([], [])
    num_left_out = 0
    for record in records:
        is_held = record.path in held_paths
        if record.group and record.group not in held_groups and is_held:
            num_left_out += 1
            continue
        sides[record.group in held_groups if record.group else is_held].append(record)
    return Parted(*sides, num_left_out, len(paths_of), len(held_groups))
