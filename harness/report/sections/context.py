"""How long a document may be: memory against context, and the longest that fits in a budget."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from forge.training.report.page.content import Row, Section, Table
from forge.training.report.page.numbers import GIB, tied
from harness.report.arms import by_backend
from harness.report.charts.points import Reach, reaches
from harness.report.evidence import Evidence
from harness.report.page.numbers import count

_ON_HOST = "its input embedding on the host"
_Tokens = Annotated[int, Field(ge=0)]


class Context(BaseModel):
    """extra_info of one backend in one budget. ``points``: (tokens, peak bytes) as measured."""

    backend: str
    budget_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tokens_fits: _Tokens | None = None  # a probe of this length ran
    tokens_fails: _Tokens | None = None  # a probe of this length ran out of memory
    predicted_tokens: _Tokens | None = None
    is_embedding_on_host: bool | None = None  # a library moved it there to save GPU memory
    why: str | None = None  # no bracket was found
    points: list[tuple[Annotated[int, Field(gt=0)], Annotated[float, Field(gt=0, allow_inf_nan=False)]]] = []


def contexts(evidence: Evidence) -> list[tuple[Context, tuple[str, ...]]]:
    """With what was measured for each; by backend, then budget."""
    measured = [(entry.parse(Context), evidence.sources_of(entry)) for entry in evidence.of_kind("max_context")]
    return sorted(measured, key=lambda pair: (by_backend(pair[0].backend), pair[0].budget_gib))


def build(evidence: Evidence) -> Section:
    """Without parts where no context was measured."""
    measured = contexts(evidence)
    of_backend: dict[str, list[Context]] = {}
    for context, _ in measured:
        of_backend.setdefault(context.backend, []).append(context)
    series = [
        Reach(
            backend,
            tuple((tokens, peak / GIB) for tokens, peak in budgets[-1].points),  # of the largest budget
            {context.budget_gib: context.tokens_fits for context in budgets if context.tokens_fits},
        )
        for backend, budgets in of_backend.items()
    ]
    has_marks = any(reach.points or reach.longest for reach in series)
    charts = (reaches("context-memory", "Peak memory against context", series),) if has_marks else ()
    columns = ("Backend, budget", "Predicted", "Fits", "Does not fit")
    rows = tuple(
        Row(
            (
                f"{context.backend}, {tied(f'{context.budget_gib:g} GiB')}",
                *map(count, (context.predicted_tokens, context.tokens_fits, context.tokens_fails)),
            ),
            sources,
            note="; ".join(filter(None, (_ON_HOST if context.is_embedding_on_host else None, context.why))) or None,
        )
        for context, sources in measured
    )
    points = tuple(
        Row((context.backend, f"{context.budget_gib:g}", count(tokens), f"{peak / GIB:.2f}"))
        for context, _ in measured
        for tokens, peak in context.points
    )
    longest = Table("The longest context in each budget, tokens, by probes", columns, rows, is_beside=True)
    lengths = Table("Measured lengths", ("Backend", "Budget, GiB", "Tokens", "Peak GiB"), points, is_folded=True)
    return Section(
        "context",
        "Context against memory",
        intro=(
            "How much GPU memory a training step on one document needs, by the document's tokens. The longest that "
            "fits is predicted from two measured lengths, and confirmed by one step just below and one just above. A "
            "budget stands for a card of that size, before the model is loaded: the allocator is capped (less what "
            "the CUDA context takes), and libraries that ask for the size of the memory get that size. In the chart a "
            "broken line is a budget, a ring the longest step that fits, a dot a peak in the largest budget."
        ),
        parts=(*charts, longest, lengths) if measured else (),
    )
