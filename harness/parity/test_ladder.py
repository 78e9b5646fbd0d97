"""The parity ladder: its six rungs, recorded and judged. What they measure: first_step, trajectory, outcome.

Each stands on those below: one that is not reached is INCOMPLETE and red.
"""

from __future__ import annotations

from typing import Any

import pytest

from harness.parity.architectures import ARCHITECTURES, judge_architecture
from harness.parity.entries import hold, record
from harness.parity.session import Ladder
from harness.recorder import CLOCK

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(0)]  # the first test of a rung waits for its runs


@pytest.mark.benchmark(group="parity", timer=CLOCK)
def test_both_arms_train_the_same_numbers_with_the_same_settings(ladder: Ladder, benchmark: Any) -> None:
    hold(ladder, benchmark, 1)


@pytest.mark.benchmark(group="parity", timer=CLOCK)
def test_the_candidates_first_step_is_as_near_to_float32_as_the_baselines(ladder: Ladder, benchmark: Any) -> None:
    hold(ladder, benchmark, 2)


@pytest.mark.benchmark(group="parity", timer=CLOCK)
def test_any_division_of_a_step_into_micro_batches_gives_the_same_gradient(ladder: Ladder, benchmark: Any) -> None:
    hold(ladder, benchmark, 3)


@pytest.mark.benchmark(group="parity", timer=CLOCK)
def test_the_noise_of_the_baselines_own_rounding_is_known(ladder: Ladder, benchmark: Any) -> None:
    hold(ladder, benchmark, 4)


@pytest.mark.benchmark(group="parity", timer=CLOCK)
def test_the_candidates_steps_stay_within_the_baselines_own_rounding(ladder: Ladder, benchmark: Any) -> None:
    hold(ladder, benchmark, 5)


@pytest.mark.benchmark(group="parity", timer=CLOCK)
def test_the_candidates_adapters_are_as_good_as_the_baselines(ladder: Ladder, benchmark: Any) -> None:
    hold(ladder, benchmark, 6)


@pytest.mark.benchmark(group="parity", timer=CLOCK)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_other_architectures_pass_the_first_three_rungs(ladder: Ladder, benchmark: Any, model_type: str) -> None:
    found = judge_architecture(ladder, model_type)
    record(ladder, benchmark, f"rungs 1 to 3 as {model_type}", found.to_dict(), [])
    assert found.status == "PASS", f"{found.status}: {found.reason}"
