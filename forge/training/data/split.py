"""Which documents are held out: whole documents, chosen by hash, related ones never apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from forge.training.system.errors import DataError

_SALT = b"forge held-out documents 1\0"


def hold_out(paths: Sequence[str], texts: Sequence[str], groups: Sequence[int], share: float) -> set[int]:
    """Indices of the documents to hold out: about ``share`` of them, at least one, never all.

    ``groups``: documents with equal numbers stay on one side. Depends on paths and contents only,
    not on a random state: the same documents give the same split on every machine, and one more
    document moves few others. Groups larger than what is wanted are trained on. Raises
    :class:`DataError` where nothing can be held out.
    """
    if len(paths) < 2:
        raise DataError(
            f"{len(paths)} document{'s' * (len(paths) != 1)} cannot be split into training and validation",
            remedy="add documents, or leave --split out",
        )
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    if len(members) < 2:
        raise DataError(
            f"all {len(paths)} documents are near copies of one another, so none can be held out",
            remedy="add other documents, or leave --split out",
        )
    wanted = min(max(1, round(share * len(paths))), len(paths) - 1)
    held: set[int] = set()
    for related in sorted(members.values(), key=lambda related: _key(paths[related[0]], texts[related[0]])):
        if len(held) + len(related) <= wanted:
            held.update(related)
    smallest = min(members.values(), key=len)
    return held or set(smallest)


def _key(path: str, text: str) -> bytes:
    return hashlib.sha256(_SALT + path.encode("utf-8") + b"\0" + text.encode("utf-8")).digest()
