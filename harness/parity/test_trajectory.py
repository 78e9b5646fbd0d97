"""Rungs 4 and 5 of the parity ladder, recorded and judged. What is measured and how: trajectory.py."""

from __future__ import annotations

from typing import Any

import pytest

from harness.parity.entries import hold
from harness.parity.ladder import Ladder
from harness.recorder import CLOCK

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(0)]  # the first test of a rung waits for its runs


@pytest.mark.benchmark(group="parity", timer=CLOCK)
def test_the_noise_of_the_baselines_own_rounding_is_known(ladder: Ladder, benchmark: Any) -> None:
    hold(ladder, benchmark, 4)


@pytest.mark.benchmark(group="parity", timer=CLOCK)
def test_the_candidates_steps_stay_within_the_baselines_own_rounding(ladder: Ladder, benchmark: Any) -> None:
    hold(ladder, benchmark, 5)
