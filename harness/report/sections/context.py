"""How long a document may be: memory against context, and the longest that fits in a budget."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from harness.report.arms import BACKENDS
from harness.report.charts.points import Reach, reaches
from harness.report.evidence import Evidence
from harness.report.page.content import Row, Section, Table
from harness.report.page.numbers import GIB, count, tied

_ON_HOST = "its input embedding on the host"
_Tokens = Annotated[int, Field(ge=0)]


class Context(BaseModel):
    """extra_info of one backend in one budget. ``points``: (tokens, peak bytes) as measured."""

    backend: str
    budget_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tokens_fits: _Tokens | None = None  # a probe of this length ran
    tokens_fails: _Tokens | None = None  # a probe of this length ran out of memory
    predicted_tokens: _Tokens | None = None
    is_embedding_on_host: bool | None = None  # a library moved it there for want of room
    why: str | None = None  # no bracket was found
    points: list[tuple[Annotated[int, Field(gt=0)], Annotated[float, Field(gt=0, allow_inf_nan=False)]]] = []


def contexts(evidence: Evidence) -> list[tuple[Context, tuple[str, ...]]]:
    """With what was measured for each; by backend, then budget."""
    found = [(entry.parse(Context), evidence.sources_of(entry)) for entry in evidence.of_kind("context")]
    place = {backend: number for number, backend in enumerate(BACKENDS)}
    return sorted(found, key=lambda pair: (place.get(pair[0].backend, len(place)), pair[0].budget_gib))


def build(evidence: Evidence) -> Section | None:
    found = contexts(evidence)
    if not found:
        return None
    by_backend: dict[str, list[Context]] = {}
    for context, _ in found:
        by_backend.setdefault(context.backend, []).append(context)
    series = [
        Reach(
            backend,
            tuple((tokens, peak / GIB) for tokens, peak in max(some, key=lambda one: one.budget_gib).points),
            {one.budget_gib: one.tokens_fits for one in some if one.tokens_fits},
        )
        for backend, some in by_backend.items()
    ]
    has_marks = any(reach.points or reach.longest for reach in series)
    charts = (reaches("context-memory", "Peak memory against context", series),) if has_marks else ()
    columns = ("Backend, budget", "Predicted", "Fits", "Does not fit")
    rows = tuple(
        Row(
            (
                f"{one.backend}, {tied(f'{one.budget_gib:g} GiB')}",
                count(one.predicted_tokens),
                count(one.tokens_fits),
                count(one.tokens_fails),
            ),
            sources,
            note="; ".join(filter(None, (_ON_HOST if one.is_embedding_on_host else None, one.why))) or None,
        )
        for one, sources in found
    )
    points = tuple(
        Row((one.backend, f"{one.budget_gib:g}", count(tokens), f"{peak / GIB:.2f}"))
        for one, _ in found
        for tokens, peak in one.points
    )
    return Section(
        "context",
        "Context against memory",
        paragraphs=(
            "Tokens of one document in a training step, and what they need. The longest that fits is predicted from "
            "two measured lengths and confirmed by a step just below and one just above. A budget is a card of that "
            "size from before the model is loaded: the allocator is capped, less what the CUDA context takes, and "
            "libraries that ask how much memory there is are told so. In the chart a broken line is a budget, a ring "
            "the longest step that fits, a dot a peak in the largest budget.",
        ),
        parts=(
            *charts,
            Table("The longest context in each budget, tokens, by probes", columns, rows, is_beside=True),
            Table("Measured lengths", ("Backend", "Budget, GiB", "Tokens", "Peak GiB"), points, is_folded=True),
        ),
    )
