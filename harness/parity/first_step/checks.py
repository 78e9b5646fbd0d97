"""The checks of rungs 1 to 3 on measured steps. Each is one number, its bar (claims.py), and whether it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from harness.parity.claims import LEAST_COSINE, MOST_ERROR, MOST_UNSTEADINESS
from harness.parity.first_step import compare
from harness.parity.first_step.compare import MeasuredStep, check_same_step


@dataclass(frozen=True)
class Check:
    """Holds if ``value`` is at most ``bar``, or with ``least`` at least ``bar``. ``more``: JSON for the report."""

    name: str
    value: float
    bar: float
    least: bool = False
    more: dict[str, Any] | None = None

    @property
    def holds(self) -> bool:
        """Whether the check holds; never where value or bar is not a number."""
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
        """A check from what :meth:`to_dict` gave; null becomes NaN, and such a check does not hold."""
        value, bar = (math.nan if content[name] is None else float(content[name]) for name in ("value", "bar"))
        more = {name: content[name] for name in content if name not in ("name", "value", "bar", "least", "holds")}
        return cls(str(content["name"]), value, bar, bool(content["least"]), more or None)


_IDENTITIES = (
    *("workload_sha256", "base_sha256", "tokenizer_sha256", "train_examples_sha256"),
    *("labels_sha256", "order_sha256", "adapter_sha256", "weights_sha256"),
)


def differing_inputs(arms: list[dict[str, Any]]) -> list[str]:
    """One line per input or setting in which an arm differs from the first. ``arms``: what the probe answered."""
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


def _differing_weights(first: dict[str, Any], other: dict[str, Any]) -> str:
    a, b = first.get("weights") or {}, other.get("weights") or {}
    names = sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
    return f" ({len(names)} tensors, first {names[0]})" if names else ""


def first_step_checks(reference: MeasuredStep, baseline: MeasuredStep, candidate: MeasuredStep) -> list[Check]:
    """Rung 2: errors against float32 at most :data:`MOST_ERROR` times the baseline's, the direction, no leak."""
    check_same_step(reference, baseline, candidate)
    name = candidate.name
    errors, allowed = compare.document_errors(candidate, reference), compare.document_errors(baseline, reference)
    worst = max(errors, key=lambda matrix: errors[matrix] / allowed[matrix] if allowed[matrix] else math.inf)
    overall, bar = (compare.root_mean_square(by_matrix.values()) for by_matrix in (errors, allowed))
    token, token_bar = compare.token_error(candidate, reference), compare.token_error(baseline, reference)
    checks = [
        Check(f"{name}, error of a token's loss, nats", token, MOST_ERROR * token_bar, more={"baseline": token_bar}),
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
    """Cosine of every gradient matrix with the float32 reference's; the lowest counts.

    Checked for the baseline too: the error of a baseline whose gradients point elsewhere is no bar for others.
    """
    directions = compare.cosines(step, reference)
    crooked = min(directions, key=directions.__getitem__)
    return Check(f"{step.name}, cosine of the gradient of {crooked}", directions[crooked], LEAST_COSINE, least=True)


def leak_checks(step: MeasuredStep) -> list[Check]:
    """Replacing one document must change that document's losses and no other's, up to the noise from run to run.

    No check where the first micro-batch holds one document: there is no other that it could leak to.
    """
    if "replaced_document" not in step.facts:
        return []
    once, twice, after = (step.small[name] for name in ("token_losses", "repeated_losses", "replaced_losses"))
    is_measured = ~np.isnan(twice)
    is_own = np.zeros_like(is_measured)
    is_own[step.facts["replaced_document"]] = True
    unsteady = MOST_UNSTEADINESS * float(np.abs(twice - once)[is_measured].max())
    leaked = float(np.abs(after - twice)[is_measured & ~is_own].max())
    changed = float(np.abs(after - twice)[is_measured & is_own].max())
    return [
        Check(f"{step.name}, change of the other documents' losses when one is replaced, nats", leaked, unsteady),
        Check(f"{step.name}, change of its own, nats", changed, np.nextafter(unsteady, np.inf), least=True),
    ]


def layout_checks(reference: MeasuredStep, baseline: MeasuredStep, layouts: list[MeasuredStep]) -> list[Check]:
    """Rung 3: what the loop accumulated is the reference's gradient, and that of every other layout.

    The bar is rounding (``compare.noise``), of both sides in quadrature where two are compared, with rung 2's factor.
    """
    check_same_step(reference, baseline, *layouts)
    noises = [compare.noise(layout, baseline, reference) for layout in layouts]
    checks = [
        Check(
            f"{layout.name}, the loop's gradient against float32",
            compare.difference(layout, reference, reference),
            MOST_ERROR * own,
            more={"noise": own, "divisors": layout.facts["divisors"]},
        )
        for layout, own in zip(layouts, noises, strict=True)
    ]
    for (first, first_noise), (second, second_noise) in combinations(list(zip(layouts, noises, strict=True)), 2):
        bar = MOST_ERROR * math.hypot(first_noise, second_noise)
        checks.append(Check(f"{first.name} against {second.name}", compare.difference(first, second, reference), bar))
    return checks
