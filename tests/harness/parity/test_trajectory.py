"""Rungs 4 and 5: bands of a baseline's own rounding, and their verdicts on recorded runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from forge.training.backends import load_plan
from forge.training.config.workload import load_workload
from harness.measurement.environment import train_command
from harness.measurement.key import identify
from harness.measurement.results import Store
from harness.parity.claims import LEAST_RUNS, LIMIT_ALPHA
from harness.parity.probes.float32_adapter import ROUNDINGS
from harness.parity.rungs import verdict
from harness.parity.session import Ladder
from harness.parity.simulation import NOISES, Recorded, false_alarms, seen
from harness.parity.trajectory.bands import compare_with_band, draw_band, num_distinct, resolution
from harness.parity.trajectory.judge import noise_specs
from harness.session import Session
from tests.support.recorded_ladder import Runs, make_ladder


def test_the_band_of_real_rounding_holds_every_sound_run_that_it_was_not_drawn_from(recorded: Recorded) -> None:
    assert len(recorded.sound) >= 8
    for left_out in range(len(recorded.sound)):
        bands, sound = recorded.bands_without(left_out, LIMIT_ALPHA)
        assert all(compare_with_band(band, run).is_inside for band, run in zip(bands, sound, strict=True))


@pytest.mark.parametrize("fault", ["learning-rate", "dropout", "frozen-matrix", "bfloat16-adapter"])
def test_every_fault_planted_in_a_real_run_leaves_the_band(recorded: Recorded, fault: str) -> None:
    bands, faulty = recorded.bands(LIMIT_ALPHA), recorded.faulty[fault]
    assert not all(compare_with_band(band, run).is_inside for band, run in zip(bands, faulty, strict=True))


def test_a_tenth_off_the_learning_rate_would_be_seen_at_a_fifth_of_its_strength(recorded: Recorded) -> None:
    effects = recorded.effects()["learning-rate"]
    for left_out in range(len(recorded.sound)):
        bands, sound = recorded.bands_without(left_out, LIMIT_ALPHA)
        assert seen(bands, sound, effects, 0.2)
        assert not seen(bands, sound, effects, 0.0)


@pytest.mark.parametrize("noise", NOISES)
def test_a_sound_candidate_rarely_leaves_the_band_whatever_the_noise(noise: str) -> None:
    # 0.08: a rate of 2% is exceeded so far in 150 trials with a probability of 1e-4
    assert false_alarms(np.random.default_rng(5), 150, NOISES[noise], 1.0) <= 0.08


def test_the_band_does_not_depend_on_unit_or_order() -> None:
    rng = np.random.default_rng(1)
    runs, zero = rng.standard_normal((8, 120)), np.zeros((8, 120))
    band, other = draw_band(runs, zero, 0.005), draw_band(1000 * runs[::-1] + 7, zero, 0.005)
    assert np.allclose(other.half_width, 1000 * band.half_width)
    assert math.isclose(other.drift_limit, 1000 * band.drift_limit)
    assert compare_with_band(band, runs[0]).is_inside


def test_what_a_backend_rounds_when_it_logs_is_no_deviation() -> None:
    norms = np.array([0.796875, 0.59375, 4.5625])  # as a backend with bfloat16 gradients logs them
    assert resolution(norms).tolist() == [2**-8, 2**-8, 2**-5]
    assert resolution(np.array([0.7986465692520142, 0.5982160568237305]))[0] < 1e-6
    rng = np.random.default_rng(2)
    exact = 0.6 + 0.1 * rng.random(120)
    logged = np.round(exact * 2**8) / 2**8
    runs = np.repeat(logged[None], 8, axis=0)  # noise below what is logged: all runs look alike
    band = draw_band(runs, resolution(runs), LIMIT_ALPHA)
    assert compare_with_band(band, exact).drift < band.drift_limit
    assert num_distinct(runs) == 1 < LEAST_RUNS


# --------------------------------------------------------------------------------------------------------------------
# Verdicts


def test_every_run_of_the_noise_is_another_that_legacy_can_do_and_half_of_them_replace_a_kernel(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_LEGACY_PYTHON", sys.executable)
    (tmp_path / "base").mkdir()
    ladder = Ladder(Session(store=Store(tmp_path / "store"), train=corpus), base=str(tmp_path / "base"))
    specs = noise_specs(ladder)
    assert len({identify(spec).key for spec in specs}) == len(specs) >= LEAST_RUNS
    for spec in specs:
        plan = load_plan(load_workload(spec.workload, spec.overrides), spec.backend, spec.plan_overrides)
        assert (plan.padding, plan.gradient_checkpointing) == ("longest", "full")
        assert set(spec.rounding) <= set(ROUNDINGS)
        assert [part for part in train_command(spec, tmp_path)[3:] if part.startswith("--rounding")] == [
            f"--rounding={name}" for name in spec.rounding
        ]
    assert specs[0].rounding == specs[0].plan_overrides == (), "the first has legacy's own plan"
    counts = {name: sum(name in spec.rounding for spec in specs) for name in ROUNDINGS}
    assert counts.pop("float32") == 1, "a second one would be its twin"
    assert all(2 <= count <= 4 for count in counts.values())


def test_equal_runs_are_no_noise(tmp_path: Path, corpus: Path, recorded: Recorded) -> None:
    first = next(iter(recorded.sound.values()))
    ladder = make_ladder(tmp_path, corpus, Runs(Recorded(dict.fromkeys("abcdefghi", first), recorded.faulty)))
    assert verdict(ladder, 4).status == "INCONCLUSIVE"
    assert verdict(ladder, 5).status == "INCOMPLETE"


@pytest.mark.parametrize("fault", ["learning-rate", "dropout", "frozen-matrix"])
def test_a_fault_in_the_candidate_fails_rung_5_and_rung_6_is_not_judged(
    tmp_path: Path, corpus: Path, recorded: Recorded, fault: str
) -> None:
    ladder = make_ladder(tmp_path, corpus, Runs(recorded, candidate=fault))
    assert verdict(ladder, 4).status == "PASS"
    assert verdict(ladder, 5).status == "FAIL", verdict(ladder, 5).reason
    assert verdict(ladder, 6).status == "INCOMPLETE"
    assert "rung 5 (trajectory) is FAIL" in verdict(ladder, 6).reason


def test_noise_that_hides_a_planted_fault_proves_nothing(tmp_path: Path, corpus: Path, recorded: Recorded) -> None:
    rng = np.random.default_rng(0)
    loud = {
        name: (run[0] + 0.2 * rng.standard_normal(100), run[1] + 0.2 * rng.standard_normal(100))
        for name, run in recorded.sound.items()
    }
    ladder = make_ladder(tmp_path, corpus, Runs(Recorded(loud, recorded.faulty)))
    assert verdict(ladder, 5).status == "INCONCLUSIVE", verdict(ladder, 5).reason
    assert "hides" in verdict(ladder, 5).reason
