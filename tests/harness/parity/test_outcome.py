"""Rungs 4 to 6 of the parity ladder: their statistics, their verdicts, and what a run carries for them.

``parity_trajectories.json`` has real runs of 100 steps (trl, the tiny base in bfloat16, effective batch 8, dropout 0):
nine layouts of a sound run, and runs with the faults of planted_training.py. How it was made stands in it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.training.backends import load_plan
from forge.training.config.workload import load_workload
from forge.training.system.environment import ROOT
from forge.training.system.errors import DataError
from harness.documents import write_documents
from harness.measurement.environment import train_command
from harness.measurement.key import identify
from harness.measurement.results import Outcome, RunSpec, Store
from harness.measurement.runner import run_once
from harness.parity.claims import Rung
from harness.parity.outcome.evaluated import read_arm
from harness.parity.outcome.judge import judge_differences, judge_no_worse, plan_seeds
from harness.parity.probes.float32_adapter import ROUNDINGS
from harness.parity.session import Ladder
from harness.parity.simulation import (
    LEAST_SEEDS,
    LIMIT_ALPHA,
    MARGIN_NATS,
    NOISES,
    false_alarms,
    outcome_rates,
    seen,
)
from harness.parity.suite import PILOT_SEEDS
from harness.parity.trajectory.bands import LEAST_RUNS, draw_band, hold_against, num_distinct, resolution
from harness.parity.trajectory.judge import noise_specs
from harness.parity.trajectory.recorded import Recorded, read_recorded
from harness.stats import tost_power
from tests.support.fake_training import fake, make_record

RECORDED = ROOT / "tests" / "data" / "parity_trajectories.json"


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return read_recorded(RECORDED)


# --------------------------------------------------------------------------------------------------------------------
# What a run carries


def test_only_a_spec_that_asks_for_it_says_so_in_its_key() -> None:
    plain = RunSpec(backend="trl", workload="smoke")
    assert set(plain.model_dump()) == {"backend", "workload", "overrides", "plan_overrides"}
    assert not {"evaluation", "float32_adapter"} & set(identify(plain).parts)
    keys = {identify(plain.model_copy(update=more)).key for more in ({}, {"evaluate": True}, {"float32_adapter": True})}
    assert len(keys) == 3
    asked = plain.model_copy(update={"evaluate": True})
    assert RunSpec.model_validate(asked.portable().model_dump(mode="json")) == asked
    other_fact = asked.model_copy(update={"overrides": ("evaluation.num_answers=1",)})
    assert identify(other_fact).parts["evaluation"] != identify(asked).parts["evaluation"]


SPEC = RunSpec(backend="trl", workload="smoke", evaluate=True)


def evaluator(code: str) -> Any:
    """An evaluation that is a line of Python; ``RUN`` is the run's directory."""
    return lambda run_dir: [sys.executable, "-I", "-c", f"import sys, time; RUN = {str(run_dir)!r}\n{code}"]


WRITES = "open(f'{RUN}/evaluation.json', 'w').write('{\"documents\": [], \"base_path\": \"/home/x/base\"}')"


def test_the_adapter_is_evaluated_before_its_directory_is_gone_and_the_answer_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    outcome = run_once(SPEC, store=store, command=fake(), evaluation_command=evaluator(WRITES))
    assert outcome.status == "completed"
    assert outcome.evaluation == {"documents": [], "base_path": "base"}
    assert store.read(outcome.run_id) == outcome
    plain = SPEC.model_copy(update={"evaluate": False})
    assert run_once(plain, store=store, command=fake(), evaluation_command=evaluator("1 / 0")).evaluation is None


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        ("sys.exit('error: a loss is not finite')", "crashed", "its evaluation: exit code 1: a loss is not finite"),
        ("print('error: a loss is not finite'); sys.exit(3)", "crashed", "a loss is not finite"),
        ("print('error: the disk is full'); sys.exit(6)", "refused", "its evaluation: the disk is full"),
        ("sys.exit(5)", "out_of_memory", "its evaluation"),
        ("pass", "no_record", "evaluation.json"),
        ("time.sleep(60)", "timeout", "its evaluation: stopped after 1.5 seconds"),
    ],
)
def test_a_run_whose_evaluation_fails_is_not_complete(tmp_path: Path, code: str, status: str, says: str) -> None:
    limits = {"time_limit_seconds": 1.5 if status == "timeout" else 60, "grace_seconds": 1}
    store = Store(tmp_path / "store")
    outcome = run_once(SPEC, store=store, command=fake(), evaluation_command=evaluator(code), **limits)
    assert (outcome.status, outcome.evaluation) == (status, None)
    assert says in (outcome.message or "")


def test_a_run_that_failed_is_not_evaluated(tmp_path: Path) -> None:
    command = fake(exit_code=5, record={"status": "out_of_memory"})
    outcome = run_once(
        SPEC, store=Store(tmp_path / "s"), command=command, evaluation_command=evaluator("time.sleep(60)")
    )
    assert outcome.status == "out_of_memory"
    assert outcome.wall_seconds < 30


# --------------------------------------------------------------------------------------------------------------------
# Bands


def test_the_band_of_real_rounding_holds_every_sound_run_that_it_was_not_drawn_from(recorded: Recorded) -> None:
    assert recorded.num_runs >= 8
    for left_out in range(recorded.num_runs):
        bands, sound = recorded.bands_without(left_out, LIMIT_ALPHA)
        assert all(hold_against(band, run).is_inside for band, run in zip(bands, sound, strict=True))


@pytest.mark.parametrize("fault", ["learning-rate", "dropout", "frozen-matrix", "bfloat16-adapter"])
def test_every_fault_planted_in_a_real_run_leaves_the_band(recorded: Recorded, fault: str) -> None:
    found = [hold_against(b, run) for b, run in zip(recorded.bands(LIMIT_ALPHA), recorded.faulty[fault], strict=True)]
    assert not all(deviation.is_inside for deviation in found)


def test_a_tenth_off_the_learning_rate_would_be_seen_at_a_fifth_of_its_strength(recorded: Recorded) -> None:
    effects = recorded.effects()["learning-rate"]
    for left_out in range(recorded.num_runs):
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
    assert hold_against(band, runs[0]).is_inside


def test_what_a_stack_rounds_when_it_logs_is_no_deviation() -> None:
    norms = np.array([0.796875, 0.59375, 4.5625])  # as a stack with bfloat16 gradients logs them
    assert resolution(norms).tolist() == [2**-8, 2**-8, 2**-5]
    assert resolution(np.array([0.7986465692520142, 0.5982160568237305]))[0] < 1e-6
    rng = np.random.default_rng(2)
    exact = 0.6 + 0.1 * rng.random(120)
    logged = np.round(exact * 2**8) / 2**8
    runs = np.repeat(logged[None], 8, axis=0)  # noise below what is logged: all runs look alike
    band = draw_band(runs, resolution(runs), LIMIT_ALPHA)
    assert hold_against(band, exact).drift < band.drift_limit
    assert num_distinct(runs) == 1 < LEAST_RUNS


# --------------------------------------------------------------------------------------------------------------------
# The number of seeds and the test


def test_the_pilot_fixes_at_least_five_seeds_with_the_power_that_is_promised() -> None:
    assert plan_seeds([0.001] * 4, MARGIN_NATS, least=5, most=20).num_seeds == 5
    plan = plan_seeds([0.001, -0.002, 0.003, 0.0], MARGIN_NATS, least=5, most=20)
    assert plan.sd < plan.sd_upper
    assert plan.num_seeds is not None
    assert tost_power(plan.sd_upper, MARGIN_NATS, plan.num_seeds) >= 0.9
    assert plan_seeds([0.02, -0.02, 0.01, -0.01], MARGIN_NATS, least=5, most=20).num_seeds is None
    with pytest.raises(ValueError, match="one seed"):
        plan_seeds([0.001], MARGIN_NATS, least=5, most=20)


def test_the_whole_procedure_passes_a_false_claim_in_at_most_five_percent_and_a_true_one_nearly_always() -> None:
    _, (true, false) = outcome_rates(np.random.default_rng(4), 600, 0.003, (0.0, MARGIN_NATS))
    assert true > 0.95
    assert false < 0.085  # four standard errors above 5%


def test_a_difference_beyond_the_margin_fails_and_one_that_straddles_it_is_inconclusive() -> None:
    assert judge_differences([0.001, -0.001, 0.0, 0.002, 0.0], 0.01)[0] == "PASS"
    assert judge_differences([0.02, 0.021, 0.019, 0.02, 0.02], 0.01)[0] == "FAIL"
    assert judge_differences([-0.02, -0.021, -0.019, -0.02, -0.02], 0.01)[0] == "FAIL"
    assert judge_differences([0.0, 0.02, 0.0, 0.02, 0.01], 0.01)[0] == "INCONCLUSIVE"


# --------------------------------------------------------------------------------------------------------------------
# The ladder, on recorded runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"instruction": f"Recite {i}.", "input": "", "output": f"Ship {i} came by night. " * 9} for i in range(230)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows]))  # every document twice
    return path


class Runs:
    """What :func:`run_once` is to a ladder, from recorded trajectories and invented evaluations."""

    def __init__(self, recorded: Recorded, *, candidate: str = "sound", held_out: Any = None, **faults: Any) -> None:
        self.sound = list(recorded.sound.values())
        self.faulty = recorded.faulty
        self.candidate = candidate
        self.held_out = held_out or (lambda backend, seed: 3.0 + 0.0005 * math.sin(seed * 7 + len(backend)))
        self.faults = faults  # by backend: status; "recites": what the candidate answers
        self.num_started = 0

    def __call__(self, spec: RunSpec, *, store: Store, time_limit_seconds: float, is_alone: bool = True) -> Outcome:
        self.num_started += 1
        told = dict(setting.split("=", 1) for setting in spec.overrides)
        seed, is_candidate = int(told["training.seed"]), spec.backend == "unsloth"
        if "optimizer.learning_rate" in told:
            losses, norms = self.faulty["learning-rate"]
        elif is_candidate:
            losses, norms = self.sound[8] if self.candidate == "sound" else self.faulty[self.candidate]
        else:
            layout = LAYOUTS.index(spec.plan_overrides) if spec.plan_overrides in LAYOUTS else 0
            losses, norms = self.sound[layout]
        digests = ["d" * 64] * len(losses)
        steps = [
            {"step": n, "seconds": 1.0, "documents": 8, "tokens": 400, "trained_tokens": 100, "loss": float(loss)}
            | {"grad_norm": float(np.exp(norm)), "learning_rate": self.rate(spec.backend, n)}
            for n, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
        ]
        identity = identify(spec)
        status = self.faults.get(spec.backend, "completed")
        record = make_record(backend=spec.backend, seed=seed, num_steps=len(losses), batch_digests=digests)
        kept = "float32" if is_candidate or spec.float32_adapter else "bfloat16"
        record.trainable.dtype = self.faults.get(f"dtype of {spec.backend}", kept)
        outcome = Outcome(
            run_id=store.new_run_id(identity.key),
            key=identity.key,
            key_parts=identity.parts,
            spec=spec.portable(),
            status=status,
            exit_code=0,
            started_at="2026-11-24T12:00:00+00:00",
            wall_seconds=1.0,
            machine="0" * 16,
            monitor={},  # type: ignore[arg-type]
            log_tail="",
            record=record.model_dump(mode="json"),
            steps=steps,
            evaluation=self.evaluation(spec, seed) if spec.evaluate and status == "completed" else None,
        )
        store.append(outcome)
        return outcome

    def rate(self, backend: str, step: int) -> float:
        return 0.002 / step * self.faults.get(f"rate of {backend}", 1.0)

    def evaluation(self, spec: RunSpec, seed: int) -> dict[str, Any]:
        is_stock = spec.backend != "unsloth" and not spec.float32_adapter
        loss = self.held_out(spec.backend, seed) + is_stock * self.faults.get("stock", 0.02)
        recites = spec.backend != "unsloth" or self.faults.get("recites", True)
        nats = [{"base": 400.0, "adapter": 100 * loss}, {"base": 1600.0, "adapter": 400 * loss}]
        return {
            "subjects": [
                {"subject": name, "nats_per_token": value, "rouge_l": 0.1}
                for name, value in (("base", 4.0), ("adapter", loss))
            ],
            "documents": [
                {"document": f"d{i}", "num_tokens": n, "nats": row}
                for i, (n, row) in enumerate(zip((100, 400), nats, strict=True))
            ],
            "facts": [
                {"subject": "base", "question": "?", "found": False},
                {"subject": "adapter", "question": "?", "found": recites},
            ],
            **{"base_sha256": "b", "validation_examples_sha256": "v", "device": "cuda", "dtype": "bfloat16"},
        }


LAYOUTS: Sequence[tuple[str, ...]] = (
    *((), ("micro_batch=4",), ("micro_batch=2",), ("micro_batch=1",), ("micro_batch=4", "grouping=length")),
    *(("micro_batch=2", "grouping=length"), ("micro_batch=4", "grouping=tokens"), ("micro_batch=2", "grouping=tokens")),
)


def make_ladder(where: Path, corpus: Path, runs: Runs, **more: Any) -> Ladder:
    (where / "base").mkdir(parents=True, exist_ok=True)
    ladder = Ladder(
        store=Store(where / "store"),
        train=corpus,
        base=str(where / "base"),
        baseline="trl",
        layouts=tuple(LAYOUTS),
        run=runs,
        **more,
    )
    ladder._verdicts[3] = Rung(number=3, status="PASS", reason="not of this test")
    return ladder


def test_a_sound_candidate_climbs_the_ladder_and_nothing_is_measured_twice(
    tmp_path: Path, corpus: Path, recorded: Recorded
) -> None:
    runs = Runs(recorded)
    ladder = make_ladder(tmp_path, corpus, runs)
    for number in (6, 5, 4):
        assert ladder.verdict(number).status == "PASS", ladder.verdict(number).reason
    assert runs.num_started == len(LAYOUTS) + 2 + 2 * len(PILOT_SEEDS) + 3 * LEAST_SEEDS
    figures = ladder.verdict(6).figures
    assert len(figures["seeds"]) == LEAST_SEEDS
    assert not {row["seed"] for row in figures["seeds"]} & set(PILOT_SEEDS)
    assert figures["precision"] == {"baseline": ["float32"], "candidate": ["float32"], "stock": ["bfloat16"]}
    assert all(math.isclose(row["difference_to_stock"], row["difference"] - 0.02) for row in figures["seeds"])
    assert len(ladder.verdict(5).figures["curves"]["loss"]["half_width"]) == 100
    assert json.loads(json.dumps(ladder.verdict(6).to_dict(), allow_nan=False))["name"] == "outcome"
    again = make_ladder(tmp_path, corpus, Runs(recorded), measures=False)
    assert again.verdict(6) == ladder.verdict(6)


@pytest.mark.parametrize("fault", ["learning-rate", "dropout", "frozen-matrix"])
def test_a_fault_in_the_candidate_fails_rung_5_and_rung_6_is_not_judged(
    tmp_path: Path, corpus: Path, recorded: Recorded, fault: str
) -> None:
    ladder = make_ladder(tmp_path, corpus, Runs(recorded, candidate=fault))
    assert ladder.verdict(4).status == "PASS"
    assert ladder.verdict(5).status == "FAIL", ladder.verdict(5).reason
    assert ladder.verdict(6).status == "INCOMPLETE"
    assert "rung 5 (trajectory) is FAIL" in ladder.verdict(6).reason


@pytest.mark.parametrize("rung", [5, 6])
def test_a_learning_rate_a_tenth_off_is_named_by_the_step_logs_of_every_run(
    tmp_path: Path, corpus: Path, recorded: Recorded, rung: int
) -> None:
    ladder = make_ladder(tmp_path, corpus, Runs(recorded, **{"rate of unsloth": 1.1}))
    ladder._verdicts[rung - 1] = Rung(number=rung - 1, status="PASS", reason="not of this test")
    assert ladder.verdict(rung).status == "FAIL"
    assert "learning_rate, step 1: 0.002 | 0.0022" in ladder.verdict(rung).reason


def test_noise_that_hides_a_planted_fault_proves_nothing(tmp_path: Path, corpus: Path, recorded: Recorded) -> None:
    rng = np.random.default_rng(0)
    loud = {
        name: (run[0] + 0.2 * rng.standard_normal(100), run[1] + 0.2 * rng.standard_normal(100))
        for name, run in recorded.sound.items()
    }
    ladder = make_ladder(tmp_path, corpus, Runs(Recorded(loud, recorded.faulty)))
    assert ladder.verdict(5).status == "INCONCLUSIVE", ladder.verdict(5).reason
    assert "hides" in ladder.verdict(5).reason


def test_every_run_of_the_noise_is_another_that_the_old_stack_can_do_and_half_of_them_share_no_kernel(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_LEGACY_PYTHON", sys.executable)
    (tmp_path / "base").mkdir()
    ladder = Ladder(store=Store(tmp_path / "store"), train=corpus, base=str(tmp_path / "base"))
    specs = noise_specs(ladder)
    assert len({identify(spec).key for spec in specs}) == len(specs) >= LEAST_RUNS
    for spec in specs:
        plan = load_plan(load_workload(spec.workload, spec.overrides), spec.backend, spec.plan_overrides)
        assert (plan.padding, plan.gradient_checkpointing) == ("longest", "full")
        assert set(spec.rounding) <= set(ROUNDINGS)
        assert [part for part in train_command(spec, tmp_path)[3:] if part.startswith("--rounding")] == [
            f"--rounding={name}" for name in spec.rounding
        ]
    assert specs[0].rounding == specs[0].plan_overrides == (), "the first is its owner's"
    counts = {name: sum(name in spec.rounding for spec in specs) for name in ROUNDINGS}
    assert counts.pop("float32") == 1, "a second one would be its twin"
    assert all(2 <= count <= 4 for count in counts.values())


def test_equal_runs_are_no_noise(tmp_path: Path, corpus: Path, recorded: Recorded) -> None:
    first = next(iter(recorded.sound.values()))
    ladder = make_ladder(tmp_path, corpus, Runs(Recorded(dict.fromkeys("abcdefghi", first), recorded.faulty)))
    assert ladder.verdict(4).status == "INCONCLUSIVE"
    assert ladder.verdict(5).status == "INCOMPLETE"


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
    ladder = make_ladder(tmp_path, corpus, Runs(recorded, **more))
    ladder._verdicts[5] = Rung(number=5, status="PASS", reason="not of this test")
    assert ladder.verdict(6).status == status, ladder.verdict(6).reason
    assert says in ladder.verdict(6).reason


def test_a_candidate_that_beats_the_stock_baseline_still_has_to_equal_it_in_one_precision(
    tmp_path: Path, corpus: Path, recorded: Recorded
) -> None:
    better = {"held_out": lambda backend, seed: 3.0 - 0.02 * (backend == "unsloth"), "stock": 0.0}
    ladder = make_ladder(tmp_path, corpus, Runs(recorded, **better))
    ladder._verdicts[5] = Rung(number=5, status="PASS", reason="not of this test")
    assert ladder.verdict(6).status == "FAIL"
    assert "are better" in ladder.verdict(6).reason


def test_a_baseline_that_did_not_keep_its_adapter_in_float32_is_no_equal(
    tmp_path: Path, corpus: Path, recorded: Recorded
) -> None:
    ladder = make_ladder(tmp_path, corpus, Runs(recorded, **{"dtype of trl": "bfloat16"}))
    ladder._verdicts[5] = Rung(number=5, status="PASS", reason="not of this test")
    assert ladder.verdict(6).status == "FAIL"
    assert "not kept in one precision" in ladder.verdict(6).reason


def test_no_worse_than_the_stock_baseline_is_one_sided() -> None:
    assert judge_no_worse([-0.3, -0.2, -0.25, -0.28, -0.22], 0.01)[0] == "PASS"
    assert judge_no_worse([0.0, 0.02, 0.0, 0.02, 0.01], 0.01)[0] == "INCONCLUSIVE"
    assert judge_no_worse([0.02, 0.021, 0.019, 0.02, 0.02], 0.01)[0] == "FAIL"


def test_the_number_of_seeds_stays_as_the_pilot_fixed_it(tmp_path: Path, corpus: Path, recorded: Recorded) -> None:
    ladder = make_ladder(tmp_path, corpus, Runs(recorded))
    assert ladder.verdict(6).status == "PASS"
    (path,) = (tmp_path / "store" / "parity").glob("outcome-*.json")
    plan = json.loads(path.read_text())
    path.write_text(json.dumps(plan | {"num_seeds": 7}))
    again = make_ladder(tmp_path, corpus, Runs(recorded))
    assert again.verdict(6).status == "INCOMPLETE"
    assert "num_seeds changed" in again.verdict(6).reason


def test_a_session_without_time_is_incomplete_and_goes_on_later(
    tmp_path: Path, corpus: Path, recorded: Recorded
) -> None:
    late = make_ladder(tmp_path, corpus, Runs(recorded), deadline=0.0)
    assert late.verdict(4).status == "INCOMPLETE"
    assert "0 of 8 runs" in late.verdict(4).reason
    assert make_ladder(tmp_path, corpus, Runs(recorded)).verdict(4).status == "PASS"


def test_each_rung_stands_on_the_one_below(tmp_path: Path, corpus: Path, recorded: Recorded) -> None:
    runs = Runs(recorded)
    ladder = make_ladder(tmp_path, corpus, runs)
    ladder._verdicts[3] = Rung(number=3, status="FAIL", reason="a layout has another gradient")
    assert {ladder.verdict(number).status for number in (4, 5, 6)} == {"INCOMPLETE"}
    assert "rung 3 (step equivalence) is FAIL" in ladder.verdict(4).reason
    assert runs.num_started == 0


def test_the_documents_are_the_same_everywhere_and_none_is_on_both_sides(tmp_path: Path, corpus: Path) -> None:
    train, held_out = write_documents(corpus, tmp_path / "a")
    again = write_documents(corpus, tmp_path / "b")
    assert [path.read_text() for path in again] == [train.read_text(), held_out.read_text()]
    lines = [path.read_text().splitlines() for path in (train, held_out)]
    assert [len(side) for side in lines] == [160 + 12 * 16, 48]
    texts = [{json.loads(line)["output"] for line in side} for side in lines]
    assert [len(side) for side in texts] == [160 + 16, 48]
    assert not texts[0] & texts[1]
    assert sum("KESTREL-9263" in text for text in texts[0]) == 16
    assert not any("KESTREL-9263" in text for text in texts[1])


def test_no_held_out_document_is_nearly_one_that_is_trained_on(tmp_path: Path, corpus: Path) -> None:
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    ranks = sorted(hashlib.sha256(row["output"].encode()).hexdigest() for row in rows[:230])
    long = " ".join(f"buoy {number}" for number in range(500))

    def of_rank(lowest: int, highest: int) -> str:
        """A copy of the long text, but for its end, that stands so among the corpus's hashes."""
        texts = (f"{long}, {number}" for number in itertools.count())
        return next(
            text for text in texts if ranks[lowest] < hashlib.sha256(text.encode()).hexdigest() < ranks[highest]
        )

    twins = of_rank(60, 190), of_rank(0, 40)  # as the hashes have it, trained on and held out
    rows += [{"instruction": "Count.", "input": "", "output": text} for text in twins]
    (tmp_path / "twins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = (path.read_text() for path in write_documents(tmp_path / "twins.jsonl", tmp_path / "a"))
    assert twins[0] in train
    assert twins[1] not in train + held_out
    assert len(held_out.splitlines()) == 48


def test_a_document_that_is_all_instruction_is_left_out(tmp_path: Path, corpus: Path) -> None:
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    rows.append({"instruction": "x " * 50_000, "input": "", "output": "short"})
    rows.append({"instruction": "Recite.", "input": "y " * 50_000, "output": "short too"})
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.read_text() for p in write_documents(tmp_path / "more.jsonl", tmp_path / "a")] == [
        p.read_text() for p in write_documents(corpus, tmp_path / "b")
    ]


def test_too_few_documents_are_refused_with_the_number(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n')
    with pytest.raises(DataError, match=r"160 documents and 48 unlike them, .* 0 and 1"):
        write_documents(tmp_path / "few.jsonl", tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# Real runs


def planted(fault: str) -> Any:
    """The real command of a run, with a fault in it."""

    def command(spec: RunSpec, run_dir: Path) -> list[str]:
        python, _, *rest = train_command(spec, run_dir)
        return [python, str(ROOT / "tests" / "support" / "planted_training.py"), fault, *rest]

    return command


@pytest.mark.slow
def test_real_runs_are_evaluated_and_keep_their_adapter_in_float32_where_asked(tmp_path: Path, corpus: Path) -> None:
    small = (
        *("model.quantization=none", "data.max_length=128", "training.max_steps=6"),
        *("evaluation.num_answers=1", "evaluation.max_new_tokens=8"),
    )
    ladder = Ladder(store=Store(tmp_path / "store"), train=corpus, base="tiny", overrides=small)
    outcome = ladder.outcome(ladder.spec("trl", 7, plan=("micro_batch=4",), evaluate=True))
    assert outcome is not None
    assert outcome.status == "completed", outcome.message
    arm = read_arm(outcome)
    assert len(arm.documents) == 48
    assert arm.adapter < arm.base - 0.01, "six steps on documents like these help"
    assert (arm.num_facts, arm.num_facts_found_by_base) == (1, 0)
    assert str(tmp_path) not in (tmp_path / "store" / "runs" / f"{outcome.run_id}.json").read_text()
    dtypes = []
    for float32 in (False, True):
        spec = ladder.spec("trl", 7, plan=("micro_batch=4",), float32_adapter=float32)
        found = run_once(spec, store=ladder.store, command=planted("bfloat16-adapter"))
        assert found.record is not None, found.message
        dtypes.append(found.record["trainable"]["dtype"])
    assert dtypes == ["bfloat16", "float32"]


def test_a_ladder_that_may_not_measure_is_red_and_says_why(tmp_path: Path, corpus: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "harness/parity", "-q", "--no-header"]
    command += ["-p", "no:cacheprovider", "-p", "tests.support.fake_gpu"]
    command += ["--gate-train", str(corpus), "--gate-store", str(tmp_path / "store"), "--gate-only", "matmul_peak"]
    command += ["--benchmark-json", str(tmp_path / "benchmark.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout[-2000:]
    entries = json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]
    assert {entry["extra_info"]["record_kind"] for entry in entries} == {"parity"}
    assert [entry["extra_info"]["metric"] for entry in entries][:6] == [f"rung {number}" for number in range(1, 7)]
    assert len(entries) == 8, "and two other architectures"
    assert {entry["extra_info"]["verdict"]["status"] for entry in entries} == {"INCOMPLETE"}
    assert "INCOMPLETE: rung 4 (noise): rung 1 (inputs) is INCOMPLETE" in done.stdout
