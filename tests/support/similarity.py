"""Jaccard similarity by Python's sets: what the index of near duplicates is compared with."""

from __future__ import annotations


def jaccard(one: str, other: str) -> float:
    """Shared share of two texts' sets of 5-word shingles, from 0 to 1."""
    a, b = _shingles(one), _shingles(other)
    return len(a & b) / len(a | b)


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    width = min(5, len(words))
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}
