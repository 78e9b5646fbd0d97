"""The gate's report before it is Markdown or HTML."""

from __future__ import annotations

from dataclasses import dataclass, field

from forge.training.report.page.content import Section


@dataclass(frozen=True)
class Report:
    """``status`` is the worst of the claims'; ``facts`` are the few lines under the headline."""

    status: str
    headline: str
    facts: tuple[str, ...]
    sections: tuple[Section, ...] = field(default=())
