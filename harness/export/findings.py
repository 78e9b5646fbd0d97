"""A verdict on one claim about an export, and how faults become one."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from harness.export.statements import STATEMENTS
from harness.perf.claims import Status


class Finding(BaseModel):
    """A verdict on one claim. ``figures`` is plain JSON: what a report shows of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    statement: str
    status: Status
    reason: str
    figures: dict[str, Any] = Field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, for an entry's ``verdict``."""
        return self.model_dump(mode="json")


def stated(name: str, status: Status, reason: str, figures: dict[str, Any] | None = None) -> Finding:
    """A finding on the claim ``name`` of an export."""
    return Finding(name=name, statement=STATEMENTS[name], status=status, reason=reason, figures=figures or {})


def by_faults(faults: list[str], good: str) -> tuple[Status, str]:
    """Status and reason: PASS where there is no fault; ``good`` says then what was looked at."""
    return ("FAIL", "; ".join(faults)) if faults else ("PASS", good)
