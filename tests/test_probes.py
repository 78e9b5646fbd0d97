"""Probes as processes: what they say without a GPU, how a length is bracketed, that nothing is measured twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forge.training.errors import ForgeError, MachineError
from forge.training.probes.bracket import GRAIN, MOST_TRIES, Points, bracket, predict
from harness import probes
from harness.store import RunSpec, Store
from tests.tiny_model import shared_base

ROOT = Path(__file__).resolve().parents[1]


class Card:
    """Holds documents of up to so many tokens; what a step takes is told to a clock."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.asked: list[int] = []

    def step(self, num_tokens: int) -> tuple[int, float] | None:
        self.asked.append(num_tokens)
        return (num_tokens * 100, 0.0) if num_tokens <= self.most_tokens else None


def bracketed(
    most_tokens: int, predicted: float, seconds: float = 60.0, pace: tuple[int, float] = (32_768, 0.0)
) -> tuple[dict[str, Any], Card]:
    card = Card(most_tokens)
    result: dict[str, Any] = {"tokens_fits": None, "tokens_fails": None, "tries": []}
    bracket(card, predicted, seconds, result, pace=pace)
    return result, card


@pytest.mark.parametrize("error", [-0.06, -0.01, 0.0, 0.01, 0.06])
def test_the_longest_length_is_between_one_that_fits_and_one_a_step_longer(error: float) -> None:
    result, card = bracketed(50_000, 50_000 * (1 + error))
    assert result["tokens_fits"] <= 50_000 < result["tokens_fails"]
    assert result["tokens_fails"] - result["tokens_fits"] <= 0.04 * 50_000 + GRAIN
    assert all(tokens % GRAIN == 0 for tokens in card.asked)
    assert len(card.asked) <= MOST_TRIES


def test_a_length_is_predicted_from_the_two_measured_nearest_to_it() -> None:
    points = [(1_000, 10), (2_000, 20), (10_000, 60), (20_000, 160)]
    assert [predict(points, cap) for cap in (5, 15, 40, 110, 260)] == [500, 1_500, 6_000, 15_000, 30_000]


@pytest.mark.parametrize("predicted", [25_000, 40_000, 65_000, 100_000])
def test_a_prediction_that_is_far_off_is_corrected(predicted: int) -> None:
    result, card = bracketed(50_000, predicted)
    assert result["tokens_fits"] <= 50_000 < result["tokens_fails"]
    assert result["tokens_fails"] - result["tokens_fits"] <= 0.03 * result["tokens_fails"]
    assert len(card.asked) <= MOST_TRIES
    assert "why" not in result


def test_what_could_not_be_bracketed_is_said_and_no_number_is_made_up() -> None:
    result, card = bracketed(50_000, 2_000_000)
    assert result["tokens_fits"] <= 50_000 < result["tokens_fails"]
    assert result["why"] == f"{len(card.asked)} tries did not bracket it"
    assert len(card.asked) == MOST_TRIES
    result, card = bracketed(0, 800)
    assert (result["tokens_fits"], result["tokens_fails"]) == (None, GRAIN)
    assert card.asked == [768, 704, 576, 320, GRAIN]
    assert result["why"] == "5 tries did not bracket it"


@pytest.mark.parametrize("most_tokens", [64, 700, 797, 1_000, 1_500])
def test_a_short_length_is_bracketed_by_one_grain(most_tokens: int) -> None:
    """A few hundred tokens: three hundredths of them are less than a grain."""
    result, card = bracketed(most_tokens, 797)
    assert result["tokens_fits"] <= most_tokens < result["tokens_fails"]
    assert result["tokens_fails"] - result["tokens_fits"] == GRAIN
    assert len(set(card.asked)) == len(card.asked) <= MOST_TRIES


class Slow(Card):
    """A second for 1,024 tokens, in proportion."""

    def step(self, num_tokens: int) -> tuple[int, float] | None:
        got = super().step(num_tokens)
        return (got[0], num_tokens / 1024) if got else None


def measured(card: Card, cap: int, most_seconds: float = 500.0) -> list[int]:
    points = Points([512, 2_048, 8_192, 32_768, 131_072])
    points.measure_beyond(card, cap, most_seconds=most_seconds)
    assert all(peak == 100 * tokens for tokens, peak, _ in points.measured)
    return [tokens for tokens, _, _ in points.measured]


def test_lengths_are_measured_as_far_as_a_budget_needs_them() -> None:
    assert measured(Card(1 << 20), cap=10) == [512, 2_048], "a line takes two"
    assert measured(Card(1 << 20), cap=300_000) == [512, 2_048, 8_192]
    assert measured(Card(1 << 20), cap=1 << 40) == [512, 2_048, 8_192, 32_768, 131_072]
    points, card = Points([512, 2_048, 8_192]), Card(1 << 20)
    for cap in (100_000, 200_000, 300_000, 900_000):
        points.measure_beyond(card, cap, most_seconds=1.0)
    assert card.asked == [512, 2_048, 8_192], "a length was measured twice"


def test_no_length_is_measured_that_does_not_fit_or_may_take_too_long() -> None:
    assert measured(Slow(1 << 20), 1 << 40, most_seconds=513.0)[-1] == 131_072
    slow = Slow(1 << 20)
    assert measured(slow, 1 << 40, most_seconds=511.0)[-1] == 32_768  # 32 s there, 16 times as much at four times
    assert slow.asked[-1] == 32_768
    card = Card(40_000)
    assert (measured(card, 1 << 40)[-1], card.asked[-1]) == (32_768, 131_072)
    with pytest.raises(MachineError, match="2048 tokens do not fit"):
        measured(Card(1_000), 1 << 40)


def test_no_step_is_begun_that_the_time_does_not_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 40))  # every look at the clock is 40 s later
    monkeypatch.setattr("forge.training.probes.bracket.time.perf_counter", lambda: float(next(clock)))
    result, card = bracketed(50_000, 40_000, seconds=150)
    assert len(card.asked) == 1
    assert "may take 55 s and -10 s were left" in result["why"]


def test_a_first_step_that_would_take_all_the_time_is_not_begun() -> None:
    """80 GiB should hold some 400,000 tokens: at 6 s for 32,768, a quarter of an hour a step."""
    result, card = bracketed(400_000, 400_000, seconds=240.0, pace=(32_768, 6.0))
    assert card.asked == []
    assert result["why"].startswith("stopped: a step of 393,984 tokens may take 867 s and 240 s were left")
    result, card = bracketed(100_000, 100_000, seconds=240.0, pace=(32_768, 6.0))
    assert (result["tokens_fits"], result["tokens_fails"]) == (98_496, 101_440)


def on_a_card(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.context_card", str(shared_base(dtype="float32")), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_real_trainer_is_bracketed_within_every_budget() -> None:
    done = on_a_card()
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    two, four, eight = found["budgets"]
    assert (two["budget_gib"], four["budget_gib"], eight["budget_gib"]) == (2, 4, 8)
    assert two["why"] == "weights and CUDA context alone take 2.0 GiB"
    # a GiB is CUDA's and one is taken from the start, so 2 and 6 GiB are left: 204 and 614 tokens of 10 MiB
    assert (four["predicted_tokens"], four["tokens_fits"], four["tokens_fails"]) == (204, 192, 256)
    assert (eight["predicted_tokens"], eight["tokens_fits"], eight["tokens_fails"]) == (614, 576, 640)
    assert [tokens for tokens, _, _ in found["points"]] == [64, 128, 256, 512, 1024]
    taken = " ".join(map(str, found["taken"]))
    assert f" 256 {GRAIN} " in taken, "no whole step after one that failed"
    assert taken.endswith(f" 640 {GRAIN}"), "no whole step after one that failed"


def test_a_model_that_is_given_fewer_tokens_is_no_measurement() -> None:
    done = on_a_card("100")
    assert done.returncode == 1
    assert "of 128 tokens the model was given 100" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["ceiling"], 4, "this machine shows none"),
        (["context", "genome_full", "--backend", "trl", "--lengths", "8"], 2, "two or more rising lengths"),
        (["context", "genome_full", "--backend", "trl", "--budgets", "eight"], 2, "take numbers"),
        (["context", "nothing", "--backend", "trl"], 2, "no workload 'nothing'"),
    ],
)
def test_a_probe_says_what_is_wrong_in_one_line(arguments: list[str], code: int, said: str) -> None:
    command = [sys.executable, "-m", f"forge.training.probes.{arguments[0]}", *arguments[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def interpreter(where: Path, body: str) -> str:
    """A Python for the probes that appends to a file whenever a probe is started and then does ``body``."""
    path = where / "python"
    asked = f'case "$*" in *probes*) echo started >> {where}/started; {body};; *) exec {sys.executable} "$@";; esac'
    path.write_text(f"#!/bin/sh\n{asked}\n")
    path.chmod(0o755)
    return str(path)


def run(store: Store, arguments: tuple[str, ...] = ()) -> dict[str, Any] | None:
    return probes.run_probe("ceiling", "trl", arguments, store, time_limit_seconds=20)


def test_a_probe_is_stored_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """echo warming up; echo '{"tflops": 700.0}'"""
    monkeypatch.setenv("FORGE_GPU_PYTHON", interpreter(tmp_path, body))
    store = Store(tmp_path / "store")
    first, again = run(store), run(store)
    assert first is not None
    assert first["tflops"] == 700.0
    assert again == first
    run(store, ("--other",))
    assert (tmp_path / "started").read_text().count("started") == 2


def test_a_probe_that_trains_is_measured_again_when_its_plan_or_its_documents_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_GPU_PYTHON", interpreter(tmp_path, """echo '{"tflops": 700.0}'"""))
    store, documents = Store(tmp_path / "store"), tmp_path / "train.jsonl"
    works = [
        RunSpec(backend="trl", workload="genome_full", overrides=(f"data.train={documents}",), plan_overrides=plan)
        for plan in ((), ("micro_batch=2",))  # the same arguments, as when NAME.plans.yaml has changed
    ]

    def num_measured(work: RunSpec) -> int:
        probes.run_probe("ceiling", "trl", (), store, time_limit_seconds=20, work=work)
        return (tmp_path / "started").read_text().count("started")

    documents.write_text('{"instruction": "Say it.", "input": "", "output": "It."}\n')
    assert [num_measured(work) for work in (*works, *works)] == [1, 2, 2, 2]
    documents.write_text('{"instruction": "Say it.", "input": "", "output": "That."}\n')
    assert [num_measured(work) for work in works] == [3, 4]


@pytest.mark.parametrize("body", ["echo '{}'; exit 1", "echo no json", "exit 0", "echo out of memory >&2; exit 5"])
def test_a_probe_that_fails_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.setenv("FORGE_GPU_PYTHON", interpreter(tmp_path, body))
    store = Store(tmp_path / "store")
    with pytest.raises(ForgeError, match="the ceiling probe of trl failed"):
        run(store)
    assert not list((tmp_path / "store").rglob("*.json"))
