"""What is shown of a GGUF file; part of ``export.json``."""

from __future__ import annotations

from dataclasses import dataclass, field

from forge.training.evaluation.divergence import Divergence


@dataclass(frozen=True)
class Reading:
    """What was compared, and by check (``tokens``, ``specials``, ``template``) what was found wrong."""

    num_strings: int
    num_documents: int
    num_conversations: int
    num_known_differences: int
    faults: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class FileProof:
    """What was shown of a file. KL in nats per prediction; ``*_limit`` allow for what the merge's rounding cost.

    ``text``: on what. ``predictions``: ``None`` where the adapter does not fit into memory. ``stops``: whether its
    answer ended by itself, ``None`` where the adapter's does not.
    ``other_way``: of the same type made with an importance matrix where this file is made without, and the other way
    round, where both were tried. ``flags``: what its owner should know.
    """

    reading: Reading
    text: str
    predictions: Divergence | None
    flagged_limit: float
    refused_limit: float
    question: str
    answer: str
    stops: bool | None
    flags: list[str] = field(default_factory=list)
    uses_imatrix: bool = False
    other_way: Divergence | None = None
