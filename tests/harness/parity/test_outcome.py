"""Rung 6: the number of seeds that a pilot fixes, the test, and its verdicts on recorded runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.parity.claims import MARGIN_NATS
from harness.parity.outcome import judge_differences, judge_no_worse, plan_seeds
from harness.parity.rungs import verdict
from harness.parity.simulation import Recorded, outcome_rates
from harness.stats import tost_power
from tests.support.recorded_ladder import Runs, make_ladder


def test_the_pilot_fixes_at_least_five_seeds_with_the_power_that_is_promised() -> None:
    assert plan_seeds([0.001] * 4).num_seeds == 5
    plan = plan_seeds([0.001, -0.002, 0.003, 0.0])
    assert plan.sd < plan.sd_upper
    assert plan.num_seeds is not None
    assert tost_power(plan.sd_upper, MARGIN_NATS, plan.num_seeds) >= 0.9
    assert plan_seeds([0.02, -0.02, 0.01, -0.01]).num_seeds is None
    with pytest.raises(ValueError, match="one seed"):
        plan_seeds([0.001])


def test_the_whole_procedure_passes_a_false_claim_in_at_most_five_percent_and_a_true_one_nearly_always() -> None:
    _, (true, false) = outcome_rates(np.random.default_rng(4), 600, 0.003, (0.0, MARGIN_NATS))
    assert true > 0.95
    assert false < 0.085  # four standard errors above 5%


def test_a_difference_beyond_the_margin_fails_and_one_that_straddles_it_is_inconclusive() -> None:
    assert judge_differences([0.001, -0.001, 0.0, 0.002, 0.0])[0] == "PASS"
    assert judge_differences([0.02, 0.021, 0.019, 0.02, 0.02])[0] == "FAIL"
    assert judge_differences([-0.02, -0.021, -0.019, -0.02, -0.02])[0] == "FAIL"
    assert judge_differences([0.0, 0.02, 0.0, 0.02, 0.01])[0] == "INCONCLUSIVE"


def test_no_worse_than_the_stock_baseline_is_one_sided() -> None:
    assert judge_no_worse([-0.3, -0.2, -0.25, -0.28, -0.22])[0] == "PASS"
    assert judge_no_worse([0.0, 0.02, 0.0, 0.02, 0.01])[0] == "INCONCLUSIVE"
    assert judge_no_worse([0.02, 0.021, 0.019, 0.02, 0.02])[0] == "FAIL"


# --------------------------------------------------------------------------------------------------------------------
# Verdicts


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        ({"held_out": lambda backend, seed: 3.0 + 0.02 * (backend == "unsloth")}, "FAIL", "are worse"),
        ({"held_out": lambda backend, seed: 3.0 + 0.3 * (seed % 2) * (backend == "unsloth")}, "INCONCLUSIVE", "noisy"),
        ({"held_out": lambda backend, seed: 3.995}, "INCONCLUSIVE", "gain over the base"),
        ({"stock": -0.02}, "FAIL", "worse than the stock baseline's"),
        ({"recites": False}, "FAIL", "not recited by 5 of 5 runs of the candidate"),
        ({"unsloth": "out_of_memory"}, "FAIL", "cannot run this"),
        ({"trl": "diverged"}, "INCONCLUSIVE", "the baseline cannot run this"),
    ],
)
def test_what_rung_6_does_not_let_pass(
    tmp_path: Path, corpus: Path, recorded: Recorded, more: dict[str, Any], status: str, says: str
) -> None:
    ladder = make_ladder(tmp_path, corpus, Runs(recorded, **more), below=6)
    assert verdict(ladder, 6).status == status, verdict(ladder, 6).reason
    assert says in verdict(ladder, 6).reason


def test_a_candidate_that_beats_the_stock_baseline_still_has_to_equal_it_in_one_precision(
    tmp_path: Path, corpus: Path, recorded: Recorded
) -> None:
    better = {"held_out": lambda backend, seed: 3.0 - 0.02 * (backend == "unsloth"), "stock": 0.0}
    ladder = make_ladder(tmp_path, corpus, Runs(recorded, **better), below=6)
    assert verdict(ladder, 6).status == "FAIL"
    assert "are better" in verdict(ladder, 6).reason


def test_a_baseline_that_did_not_keep_its_adapter_in_float32_is_no_equal(
    tmp_path: Path, corpus: Path, recorded: Recorded
) -> None:
    ladder = make_ladder(tmp_path, corpus, Runs(recorded, **{"dtype of trl": "bfloat16"}), below=6)
    assert verdict(ladder, 6).status == "FAIL"
    assert "not kept in one precision" in verdict(ladder, 6).reason


def test_the_number_of_seeds_stays_as_the_pilot_fixed_it(tmp_path: Path, corpus: Path, recorded: Recorded) -> None:
    ladder = make_ladder(tmp_path, corpus, Runs(recorded))
    assert verdict(ladder, 6).status == "PASS"
    (path,) = (tmp_path / "store" / "parity").glob("outcome-*.json")
    plan = json.loads(path.read_text())
    path.write_text(json.dumps(plan | {"num_seeds": 7}))
    again = make_ladder(tmp_path, corpus, Runs(recorded))
    assert verdict(again, 6).status == "INCOMPLETE"
    assert "num_seeds changed" in verdict(again, 6).reason
