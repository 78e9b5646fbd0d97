"""The verdicts that a whole gate leaves beside those on speed and memory, by the modules that give them."""

from __future__ import annotations

from dataclasses import dataclass

from harness.export import claims as export
from harness.parity.claims import NAMES, STATEMENTS
from harness.parity.suite import ARCHITECTURES
from harness.reliability import claims as survival
from harness.reliability.suite import BACKENDS


@dataclass(frozen=True)
class Expected:
    """``metric``: the entry's. ``name`` and ``number`` (of a rung): the verdict's."""

    metric: str
    name: str
    number: int | None = None
    statement: str | None = None


EXPECTED: dict[str, tuple[Expected, ...]] = {  # by record_kind, in the order shown
    "parity": (
        *(Expected(f"rung {number}", name, number, STATEMENTS[number]) for number, name in NAMES.items()),
        *(Expected(metric, metric) for metric in (f"rungs 1 to 3 as {of}" for of in ARCHITECTURES)),
    ),
    "export": tuple(Expected(claim.name, claim.name, statement=claim.statement) for claim in export.CLAIMS),
    "reliability": tuple(
        Expected(f"{claim.name}_{backend}", f"{claim.name}_{backend}", statement=f"{backend}: {claim.statement}")
        for claim in survival.CLAIMS
        for backend in BACKENDS
    ),
}
