"""What the report shows beside the claims: every arm, the ladder, the context, the ceiling. What is missing is red."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from harness.measurement.metrics import Metric, check_same_work, training_steps
from harness.measurement.utilisation import model_flops_per_second
from harness.perf.entries import METRICS, record_runs
from harness.perf.session import Gate
from harness.perf.suite import (
    CONTEXT_BUDGETS_GIB,
    CONTEXT_WORKLOAD,
    FP16,
    LADDER,
    LEGACY,
    SINGLES,
    TRIALS,
    TRL,
    UNSLOTH,
    Arm,
)
from harness.recorder import CLOCK, record_facts

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(0)]  # the first test waits for the measuring


def _name(value: Any) -> str:
    return value.name if isinstance(value, Arm) else str(value)


def _arms() -> list[tuple[str, Arm]]:
    found: dict[tuple[str, str], tuple[str, Arm]] = {}
    for name, planned in TRIALS.items():
        if name != "control_aa":
            for arm in (planned.baseline, planned.candidate):
                found.setdefault((planned.workload, arm.name), (planned.workload, arm))
    return [*found.values(), *SINGLES]


def _item(workload: str, arm: Arm) -> str:
    """The item of the gate's order that measures an arm."""
    for name, planned in TRIALS.items():
        if planned.workload == workload and arm in (planned.baseline, planned.candidate):
            return name
    return "singles"


def _not_run(benchmark: Any, what: str, reason: str) -> NoReturn:
    record_facts(benchmark, metric="none", record_kind="not_run", what=what, reason=reason)
    pytest.fail(f"INCOMPLETE: {what}: {reason}")


@pytest.mark.benchmark(group="arms", timer=CLOCK)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("workload", "arm"), _arms(), ids=_name)
def test_every_arm_is_measured(gate: Gate, benchmark: Any, workload: str, arm: Arm, metric: Metric) -> None:
    outcomes = gate.arms.get((workload, arm.name), [])
    if not outcomes:
        _not_run(benchmark, f"{arm.name} on {workload}", gate.why_missing(_item(workload, arm)))
    warmup = gate.num_warmup_steps(workload)
    complete = [outcome for outcome in outcomes if outcome.status == "completed"]
    if not complete:
        _not_run(benchmark, f"{arm.name} on {workload}", f"{outcomes[0].status}: {outcomes[0].message}")
    for outcome in complete[1:]:
        check_same_work(complete[0], outcome)
    record_runs(benchmark, complete, arm.name, metric, warmup)


@pytest.mark.benchmark(group="ladder", timer=CLOCK)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("workload", "rung"), LADDER, ids=_name)
def test_every_rung_of_the_ladder_is_measured(
    gate: Gate, benchmark: Any, workload: str, rung: Arm, metric: Metric
) -> None:
    outcome = gate.single(workload, rung)
    if outcome is None:
        _not_run(benchmark, f"ladder: {rung.name}", gate.why_missing("ladder"))
    if outcome.status != "completed":
        _not_run(benchmark, f"ladder: {rung.name}", f"{outcome.status}: {outcome.message}")
    record_runs(benchmark, [outcome], rung.name, metric, gate.num_warmup_steps(workload), record_kind="ladder")


@pytest.mark.benchmark(group="fp16", timer=CLOCK)
def test_what_fp16_does_in_the_legacy_stack_is_known(gate: Gate, benchmark: Any) -> None:
    workload, arm = FP16
    outcome = gate.single(workload, arm)
    if outcome is None:
        _not_run(benchmark, f"{arm.name} on {workload}", gate.why_missing("singles"))
    ends = outcome.message or "trains; not compared, because the other arms train in bf16"
    facts = {"workload": workload, "backend": arm.backend, "arm": arm.name, "run_ids": [outcome.run_id]}
    what = f"{arm.name} on {workload}"
    record_facts(
        benchmark, metric="none", record_kind="not_run", what=what, reason=f"{outcome.status}: {ends}", **facts
    )


_FOUND = ("predicted_tokens", "tokens_fits", "tokens_fails", "loaded_bytes", "is_embedding_on_host", "why")


@pytest.mark.benchmark(group="context", timer=CLOCK)
@pytest.mark.parametrize("budget_gib", CONTEXT_BUDGETS_GIB, ids=lambda gib: f"{gib:g}GiB")
@pytest.mark.parametrize("arm", [LEGACY, TRL, UNSLOTH], ids=lambda arm: arm.name)
def test_the_longest_context_in_a_budget_is_known(gate: Gate, benchmark: Any, arm: Arm, budget_gib: float) -> None:
    found = gate.context(arm, budget_gib)
    if found is None:
        _not_run(benchmark, f"context of {arm.name} in {budget_gib:g} GiB", gate.why_missing("context"))
    record_facts(
        benchmark,
        metric="tokens",
        record_kind="context",
        workload=CONTEXT_WORKLOAD,
        backend=arm.backend,
        arm=arm.name,
        plan=found["plan"],
        probe=found["key"],
        budget_gib=budget_gib,
        points=[[tokens, peak] for tokens, peak, _ in found["points"]],
        **{key: found.get(key) for key in _FOUND},
    )
    fits, fails = found.get("tokens_fits"), found.get("tokens_fails")
    assert found.get("why") or (fits and fails and fits < fails), "neither bracketed nor said why not"


@pytest.mark.benchmark(group="ceiling", timer=CLOCK)
@pytest.mark.parametrize("workload", ["genome_full", "legacy_256"])
def test_the_use_of_the_gpus_arithmetic_is_known(gate: Gate, benchmark: Any, workload: str) -> None:
    answer = gate.ceiling()
    if answer is None:
        _not_run(benchmark, "matrix-product ceiling", gate.why_missing("ceiling"))
    warmup = gate.num_warmup_steps(workload)
    speeds: dict[str, float] = {}
    outcomes = {arm.name: gate.arms.get((workload, arm.name), [])[:1] for arm in (LEGACY, TRL, UNSLOTH)}
    for name, found in outcomes.items():
        for outcome in found:
            if outcome.status == "completed" and outcome.record:
                speeds[name] = model_flops_per_second(outcome.record, training_steps(outcome), warmup)
    record_facts(
        benchmark,
        metric="model_flops_per_second",
        record_kind="ceiling",
        workload=workload,
        tflops=answer["tflops"],
        probe=answer["key"],
        model_flops_per_second=speeds,
        utilisation={name: speed / (answer["tflops"] * 1e12) for name, speed in speeds.items()},
        run_ids=[outcome.run_id for found in outcomes.values() for outcome in found if outcome.status == "completed"],
    )
    assert all(0 < speed < answer["tflops"] * 1e12 for speed in speeds.values()), "faster than the ceiling: miscounted"
    assert len(speeds) == len(outcomes), f"INCOMPLETE: measured are {', '.join(speeds) or 'none'}"


@pytest.mark.parametrize("workload", ["genome_full", "legacy_256", "genome_8k"])
def test_all_arms_of_a_workload_did_the_same_work(gate: Gate, workload: str) -> None:
    outcomes = [found[0] for (name, _), found in gate.arms.items() if name == workload]
    complete = [outcome for outcome in outcomes if outcome.status == "completed"]
    assert len(complete) > 1, f"INCOMPLETE: {len(complete)} arms of {workload} measured"
    for outcome in complete[1:]:
        check_same_work(complete[0], outcome)
