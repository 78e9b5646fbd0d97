"""What rungs 1 to 3 ask of measured steps, one check each: a figure, its bar, and whether it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from harness.parity.first_step.compare import (
    MeasuredStep,
    check_same_step,
    cosines,
    difference,
    document_errors,
    loop_error,
    noise,
    over_matrices,
    token_error,
)

MOST_ERROR = 1.5  # times the baseline's
LEAST_COSINE = 0.99
# Where measuring the same twice gives two numbers, exchanging a document adds as much again: the largest of some dozen
# such differences is not three times that of others. A leak is a hundred times it; where nothing varies the bar is 0.
MOST_UNSTEADINESS = 3.0


@dataclass(frozen=True)
class Check:
    """``value`` holds if it is at most ``bar``, or at least it for ``least``. ``more``: plain JSON beside it."""

    name: str
    value: float
    bar: float
    least: bool = False
    more: dict[str, Any] | None = None

    @property
    def holds(self) -> bool:
        """Whether it does; never for what is not a number."""
        return bool(self.value >= self.bar if self.least else self.value <= self.bar)

    def sentence(self) -> str:
        """For people."""
        word = "at least" if self.least else "at most"
        return f"{self.name}: {self.value:.3g}, {word} {self.bar:.3g} wanted"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: what is not finite becomes null."""
        value, bar = (float(number) if math.isfinite(number) else None for number in (self.value, self.bar))
        return {"name": self.name, "value": value, "bar": bar, "least": self.least, "holds": self.holds} | (
            self.more or {}
        )

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Check:
        """What :meth:`to_dict` gave; null is not a number, and such a check does not hold."""
        value, bar = (math.nan if content[name] is None else float(content[name]) for name in ("value", "bar"))
        more = {name: it for name, it in content.items() if name not in ("name", "value", "bar", "least", "holds")}
        return cls(str(content["name"]), value, bar, bool(content["least"]), more or None)


_IDENTITIES = (
    *("workload_sha256", "base_sha256", "tokenizer_sha256", "train_examples_sha256"),
    *("labels_sha256", "order_sha256", "adapter_sha256", "weights_sha256"),
)


def differing_inputs(arms: list[dict[str, Any]]) -> list[str]:
    """A line for each input or setting in which an arm differs from the first; ``arms``: what the probe answered."""
    lines = []
    first = arms[0]
    for other in arms[1:]:
        sides = f"{first['backend']} | {other['backend']}"
        for name in _IDENTITIES:
            if first.get(name) != other.get(name) or first.get(name) is None:
                more = _differing_weights(first, other) if name == "weights_sha256" else ""
                lines.append(f"{sides}, {name}: {_short(first.get(name))} | {_short(other.get(name))}{more}")
        settings, others = first["settings"], other["settings"]
        for name in sorted({*settings, *others}):
            if settings.get(name) != others.get(name) or name not in settings:
                lines.append(f"{sides}, {name}: {_short(settings.get(name))} | {_short(others.get(name))}")
    return lines


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _differing_weights(one: dict[str, Any], other: dict[str, Any]) -> str:
    a, b = one.get("weights") or {}, other.get("weights") or {}
    names = sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
    return f" ({len(names)} tensors, first {names[0]})" if names else ""


def first_step_checks(reference: MeasuredStep, baseline: MeasuredStep, candidate: MeasuredStep) -> list[Check]:
    """Rung 2: as near to float32 as the baseline, every matrix in the reference's direction, nothing leaked."""
    check_same_step(reference, baseline, candidate)
    name = candidate.name
    errors, allowed = document_errors(candidate, reference), document_errors(baseline, reference)
    worst = max(errors, key=lambda matrix: errors[matrix] / allowed[matrix] if allowed[matrix] else math.inf)
    overall, bar = (over_matrices(list(found), found.__getitem__) for found in (errors, allowed))
    tokens, tokens_allowed = token_error(candidate, reference), token_error(baseline, reference)
    checks = [
        Check(
            f"{name}, error of a token's loss, nats",
            tokens,
            MOST_ERROR * tokens_allowed,
            more={"baseline": tokens_allowed},
        ),
        Check(
            f"{name}, error of the documents' gradients",
            overall,
            MOST_ERROR * bar,
            more={"baseline": bar, "worst_matrix": worst, "worst": errors[worst], "worst_baseline": allowed[worst]},
        ),
        direction_check(reference, candidate),
    ]
    return [*checks, *leak_checks(candidate)]


def direction_check(reference: MeasuredStep, step: MeasuredStep) -> Check:
    """Every matrix in the reference's direction; of a baseline too, for one that is not is no measure of others."""
    directions = cosines(step, reference)
    crooked = min(directions, key=directions.__getitem__)
    return Check(f"{step.name}, cosine of the gradient of {crooked}", directions[crooked], LEAST_COSINE, least=True)


def leak_checks(step: MeasuredStep) -> list[Check]:
    """Exchanging a document changes no other's loss, but for what measuring the same twice does; and changes its own.

    Nothing where the first micro-batch holds one document: there is nobody to leak to.
    """
    if "replaced_document" not in step.facts:
        return []
    once, twice, after = (step.small[name] for name in ("token_losses", "repeated_losses", "replaced_losses"))
    looked = ~np.isnan(twice)
    own = np.zeros_like(looked)
    own[step.facts["replaced_document"]] = True
    others = looked & ~own
    unsteady = MOST_UNSTEADINESS * float(np.abs(twice - once)[looked].max())
    leaked = float(np.abs(after - twice)[others].max())
    changed = float(np.abs(after - twice)[looked & own].max())
    return [
        Check(f"{step.name}, what other documents' losses gain or lose by an exchanged one, nats", leaked, unsteady),
        Check(f"{step.name}, what its own do, nats", changed, np.nextafter(unsteady, np.inf), least=True),
    ]


def layout_checks(reference: MeasuredStep, baseline: MeasuredStep, layouts: list[MeasuredStep]) -> list[Check]:
    """Rung 3: what the loop accumulated is the reference's gradient, and that of every other layout.

    The bar is rounding (:func:`noise`), of both sides in quadrature where two are compared, with rung 2's factor.
    """
    check_same_step(reference, baseline, *layouts)
    noises = [noise(layout, baseline, reference) for layout in layouts]
    checks = [
        Check(
            f"{layout.name}, the loop's gradient against float32",
            loop_error(layout, reference),
            MOST_ERROR * own,
            more={"noise": own, "divisors": layout.facts["divisors"]},
        )
        for layout, own in zip(layouts, noises, strict=True)
    ]
    for (one, its), (other, others) in combinations(list(zip(layouts, noises, strict=True)), 2):
        bar = MOST_ERROR * math.hypot(its, others)
        checks.append(Check(f"{one.name} against {other.name}", difference(one, other, reference), bar))
    return checks
