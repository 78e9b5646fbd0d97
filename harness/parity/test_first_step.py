"""Rungs 2 and 3 of the parity ladder, recorded and judged; and all three for other architectures."""

from __future__ import annotations

from typing import Any

import pytest

from harness.parity.architectures import ARCHITECTURES, judge_architecture
from harness.parity.entries import hold
from harness.parity.ladder import WORKLOAD, Ladder
from harness.recorder import CLOCK, record_facts

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(0)]


@pytest.mark.benchmark(group="parity", timer=CLOCK)
def test_the_candidates_first_step_is_as_near_to_float32_as_the_baselines(ladder: Ladder, benchmark: Any) -> None:
    hold(ladder, benchmark, 2)


@pytest.mark.benchmark(group="parity", timer=CLOCK)
def test_any_division_of_a_step_into_micro_batches_gives_the_same_gradient(ladder: Ladder, benchmark: Any) -> None:
    hold(ladder, benchmark, 3)


@pytest.mark.benchmark(group="parity", timer=CLOCK)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_other_architectures_pass_the_first_three_rungs(ladder: Ladder, benchmark: Any, model_type: str) -> None:
    found = judge_architecture(ladder, model_type)
    record_facts(
        benchmark,
        metric=f"rungs 1 to 3 as {model_type}",
        record_kind="parity",
        workload=WORKLOAD,
        arm=ladder.candidate,
        backend=ladder.candidate,
        baseline=ladder.baseline,
        verdict=found.to_dict(),
    )
    assert found.status == "PASS", f"{found.status}: {found.reason}"
