"""How long the workload's whole training run would take on the measured GPU."""

from __future__ import annotations

from collections.abc import Sequence

from forge.training.report.charts.bars import Bar, bars
from forge.training.report.page.content import Chart, Row, Section, Table
from forge.training.report.page.numbers import NONE
from harness.report.arms import ArmRuns
from harness.report.evidence import Run
from harness.report.page.numbers import Spread, duration, spread
from harness.stats import corpus_seconds

_HOUR = 3600.0


def build(arms: dict[str, list[ArmRuns]]) -> Section:
    """Epochs of the workload times the token-weighted estimate of one pass over the whole corpus."""
    parts: list[Chart | Table] = []
    for workload, of_workload in arms.items():
        projected = {arm: _project(arm) for arm in of_workload}
        items = [
            Bar(arm.name, arm.backend, s.middle / _HOUR, duration(s.middle), low=s.low / _HOUR, high=s.high / _HOUR)
            for arm, (s, _) in projected.items()
            if s
        ]
        if items:
            parts.append(bars(f"projection-{workload}", f"{workload}: projected training time", items))
        rows = tuple(_row(arm, *projection) for arm, projection in projected.items())
        columns = ("Arm", "Projected", "Fastest and slowest run")
        parts.append(Table(f"{workload}: {_work(of_workload)}", columns, rows, is_beside=bool(items)))
    return Section(
        "projection",
        "The whole training run, projected",
        intro=(
            "Not measured: projected. Each run's measured steps are fitted by seconds = a × documents + b × tokens + "
            "c × sum of squared document lengths (no coefficient negative). The fit is evaluated for the whole corpus "
            "and multiplied by the workload's epochs, so that long documents weigh as much as they cost. Loading, "
            "validation, saving and export are not included. It holds for the measured GPU only."
        ),
        parts=tuple(parts),
    )


def _project(arm: ArmRuns) -> tuple[Spread | None, str]:
    """The spread over the arm's runs in seconds, else why there is none."""
    seconds: list[float | None] = []
    for run in arm.runs:
        if run.is_complete:
            try:
                seconds.append(_whole_run_seconds(run))
            except ValueError as error:
                return None, f"not projected: {error}"
    projected = spread(seconds)
    why = "" if projected else f"not projected: {arm.failure or 'the record holds no sums of the whole corpus'}"
    return projected, why


def _whole_run_seconds(run: Run) -> float | None:
    corpus, epochs = _corpus(run), _epochs(run)
    if corpus is None or epochs is None:
        return None
    return epochs * corpus_seconds(run.steps, run.num_warmup_steps, corpus)


def _corpus(run: Run | None) -> dict[str, float] | None:
    if run is None or run.record is None:
        return None
    inputs = run.record.inputs
    sums = (inputs.num_corpus_examples, inputs.num_corpus_tokens, inputs.corpus_tokens_squared)
    if None in sums:
        return None
    return dict(zip(("documents", "tokens", "tokens_squared"), map(float, filter(None, sums)), strict=True))


def _epochs(run: Run | None) -> float | None:
    return (run.record.workload.get("training") or {}).get("epochs") if run and run.record else None


def _work(arms: Sequence[ArmRuns]) -> str:
    """The work that is projected, in words."""
    run = next((arm.example for arm in arms if arm.example), None)
    corpus, epochs = _corpus(run), _epochs(run)
    if corpus is None or epochs is None:
        return "the whole run"
    return f"{epochs:g} epochs of {corpus['documents']:,.0f} documents, {corpus['tokens']:,.0f} tokens each"


def _row(arm: ArmRuns, seconds: Spread | None, why: str) -> Row:
    if seconds is None:
        return Row((arm.name, why, NONE), arm.run_ids)
    ends = f"{duration(seconds.low)} to {duration(seconds.high)}" if seconds.num > 1 else NONE
    return Row((arm.name, duration(seconds.middle), ends), arm.run_ids)
