"""Rung 1 of the parity ladder, recorded and judged. What is compared: step_checks.differing_inputs."""

from __future__ import annotations

from typing import Any

import pytest

from harness.parity.entries import hold
from harness.parity.ladder import Ladder
from harness.recorder import CLOCK

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(0)]


@pytest.mark.benchmark(group="parity", timer=CLOCK)
def test_both_arms_train_the_same_numbers_with_the_same_settings(ladder: Ladder, benchmark: Any) -> None:
    hold(ladder, benchmark, 1)
