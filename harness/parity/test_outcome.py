"""Rung 6 of the parity ladder, recorded and judged. What is measured and how: outcome.py."""

from __future__ import annotations

from typing import Any

import pytest

from harness.parity.entries import hold
from harness.parity.ladder import Ladder
from harness.recorder import CLOCK

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(0)]  # waits for the runs of every seed


@pytest.mark.benchmark(group="parity", timer=CLOCK)
def test_the_candidates_adapters_are_as_good_as_the_baselines(ladder: Ladder, benchmark: Any) -> None:
    hold(ladder, benchmark, 6)
