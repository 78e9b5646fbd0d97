"""What the report shows beside the claims: every arm, ablation, longest context, FLOPs. What is missing is red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from forge.training.system.errors import ForgeError
from harness.measurement.metrics import Metric, check_same_work, model_flops_per_second, training_steps
from harness.measurement.results import Outcome
from harness.perf import suite
from harness.perf.suite import METRICS, Arm, PerfSuite, describe_runs
from harness.recorder import CLOCK, record_facts, record_metric

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(0)]  # the first test waits for the measuring


def _name(value: Any) -> str:
    return value.name if isinstance(value, Arm) else str(value)


def _not_run(benchmark: Any, what: str, reason: str) -> NoReturn:
    record_facts(benchmark, metric="none", record_kind="not_run", what=what, reason=reason)
    pytest.fail(f"INCOMPLETE: {what}: {reason}")


def _measured(benchmark: Any, perf: PerfSuite, item: str, what: str, ask: Callable[[], Any]) -> Any:
    """What ``ask`` returns; where that is nothing or an error, this test's entry says why and the test is red."""
    try:
        result = ask()
    except ForgeError as error:
        _not_run(benchmark, what, error.message)
    return result or _not_run(benchmark, what, perf.why_missing(item))


def _record_runs(
    benchmark: Any, perf: PerfSuite, outcomes: list[Outcome], workload: str, arm: Arm, metric: Metric, **extra: Any
) -> None:
    """One entry: a metric of an arm's runs, one sample per run; what did not complete is red."""
    failed = [outcome for outcome in outcomes if outcome.status != "completed"]
    if failed:
        _not_run(benchmark, f"{arm.name} on {workload}", f"{failed[0].status}: {failed[0].message}")
    samples = perf.samples(outcomes, metric, workload)
    record_metric(benchmark, samples, metric=metric, unit=METRICS[metric], **describe_runs(outcomes, arm.name), **extra)


def _complete(perf: PerfSuite, workload: str, arm: Arm) -> list[Outcome]:
    """The first run of an arm, if it completed: a missing one is red in the arm's own test."""
    try:
        return [outcome for outcome in perf.runs_of(workload, arm)[:1] if outcome.status == "completed"]
    except ForgeError:
        return []


@pytest.mark.benchmark(group="arms", timer=CLOCK)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("workload", "arm"), suite.ITEM_OF_ARM, ids=_name)
def test_every_arm_is_measured(perf: PerfSuite, benchmark: Any, workload: str, arm: Arm, metric: Metric) -> None:
    what, item = f"{arm.name} on {workload}", suite.ITEM_OF_ARM[workload, arm]
    outcomes = _measured(benchmark, perf, item, what, lambda: perf.runs_of(workload, arm))
    for outcome in outcomes[1:]:
        check_same_work(outcomes[0], outcome)
    _record_runs(benchmark, perf, outcomes, workload, arm, metric)


@pytest.mark.benchmark(group="ablation", timer=CLOCK)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("workload", "arm"), suite.ABLATION, ids=_name)
def test_every_arm_of_the_ablation_is_measured(
    perf: PerfSuite, benchmark: Any, workload: str, arm: Arm, metric: Metric
) -> None:
    what = f"ablation: {arm.name}"
    outcome = _measured(benchmark, perf, "ablation", what, lambda: perf.single(workload, arm, "ablation"))
    if outcome.status != "completed":
        _not_run(benchmark, what, f"{outcome.status}: {outcome.message}")
    _record_runs(benchmark, perf, [outcome], workload, arm, metric, record_kind="ablation")


@pytest.mark.benchmark(group="fp16", timer=CLOCK)
def test_what_fp16_does_in_legacy_is_known(perf: PerfSuite, benchmark: Any) -> None:
    workload, arm = suite.FP16
    what = f"{arm.name} on {workload}"
    outcome = _measured(benchmark, perf, "singles", what, lambda: perf.single(workload, arm))
    ends = outcome.message or "trains; not compared, because the other arms train in bf16"
    facts = {"workload": workload, "backend": arm.backend, "arm": arm.name, "run_ids": [outcome.run_id]}
    record_facts(
        benchmark, metric="none", record_kind="not_run", what=what, reason=f"{outcome.status}: {ends}", **facts
    )


_ANSWERED = ("predicted_tokens", "tokens_fits", "tokens_fails", "loaded_bytes", "is_embedding_on_host", "why")


@pytest.mark.benchmark(group="max_context", timer=CLOCK)
@pytest.mark.parametrize("budget_gib", suite.CONTEXT_BUDGETS_GIB, ids=lambda gib: f"{gib:g}GiB")
@pytest.mark.parametrize("arm", suite.CONTEXT_ARMS, ids=lambda arm: arm.name)
def test_the_longest_context_in_a_budget_is_known(perf: PerfSuite, benchmark: Any, arm: Arm, budget_gib: float) -> None:
    what = f"context of {arm.name} in {budget_gib:g} GiB"
    answer = _measured(benchmark, perf, "max_context", what, lambda: perf.max_context(arm, budget_gib))
    record_facts(
        benchmark,
        metric="tokens",
        record_kind="max_context",
        workload=suite.CONTEXT_WORKLOAD,
        backend=arm.backend,
        arm=arm.name,
        plan=answer["plan"],
        probe=answer["key"],
        budget_gib=budget_gib,
        points=[[tokens, peak] for tokens, peak, _ in answer["points"]],
        **{name: answer.get(name) for name in _ANSWERED},
    )
    fits, fails = answer.get("tokens_fits"), answer.get("tokens_fails")
    assert answer.get("why") or (fits and fails and fits < fails), "neither bracketed nor said why not"


@pytest.mark.benchmark(group="matmul_peak", timer=CLOCK)
@pytest.mark.parametrize("workload", ["genome_full", "legacy_256"])
def test_the_use_of_the_gpus_arithmetic_is_known(perf: PerfSuite, benchmark: Any, workload: str) -> None:
    answer = _measured(benchmark, perf, "matmul_peak", "matrix-product peak", perf.matmul_peak)
    warmup, peak = perf.num_warmup_steps(workload), answer["tflops"] * 1e12
    runs = {arm.name: run for arm in (suite.LEGACY, suite.TRL, suite.UNSLOTH) for run in _complete(perf, workload, arm)}
    speeds = {
        name: model_flops_per_second(run.record, training_steps(run), warmup)
        for name, run in runs.items()
        if run.record
    }
    record_facts(
        benchmark,
        metric="model_flops_per_second",
        record_kind="matmul_peak",
        workload=workload,
        tflops=answer["tflops"],
        probe=answer["key"],
        model_flops_per_second=speeds,
        utilisation={name: speed / peak for name, speed in speeds.items()},
        run_ids=[run.run_id for run in runs.values()],
    )
    assert all(0 < speed < peak for speed in speeds.values()), "faster than the matrix products: miscounted"
    assert len(speeds) == 3, f"INCOMPLETE: measured are {', '.join(speeds) or 'none'}"


@pytest.mark.parametrize("workload", ["genome_full", "legacy_256", "genome_8k"])
def test_all_arms_of_a_workload_did_the_same_work(perf: PerfSuite, workload: str) -> None:
    outcomes = [run for name, arm in suite.ITEM_OF_ARM if name == workload for run in _complete(perf, workload, arm)]
    assert len(outcomes) > 1, f"INCOMPLETE: {len(outcomes)} arms of {workload} measured"
    for outcome in outcomes[1:]:
        check_same_work(outcomes[0], outcome)
