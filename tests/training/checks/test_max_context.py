"""The longest document in a budget: how a length is bracketed, and the real trainer on a card of a given size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.training.checks.max_context import GRAIN, MOST_TRIES, bracket, measure, predict
from tests.support import run_command
from tests.support.run_command import Ended
from tests.support.tiny_model import shared_base


class Card:
    """Holds documents of up to so many tokens; what a step takes is told to a clock."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.asked: list[int] = []

    def step(self, num_tokens: int) -> tuple[int, float] | None:
        self.asked.append(num_tokens)
        return (num_tokens * 100, 0.0) if num_tokens <= self.most_tokens else None


def bracketed(
    most_tokens: int,
    predicted: float,
    seconds: float = 60.0,
    pace: tuple[int, float] = (32_768, 0.0),
    known: tuple[int | None, int | None] = (None, None),
) -> tuple[dict[str, Any], Card]:
    card = Card(most_tokens)
    result: dict[str, Any] = {"tokens_fits": known[0], "tokens_fails": known[1], "tries": []}
    bracket(card.step, predicted, seconds, result, pace=pace)
    return result, card


@pytest.mark.parametrize("error", [-0.06, -0.01, 0.0, 0.01, 0.06])
def test_the_longest_length_is_between_one_that_fits_and_one_a_step_longer(error: float) -> None:
    result, card = bracketed(50_000, 50_000 * (1 + error))
    assert result["tokens_fits"] <= 50_000 < result["tokens_fails"]
    assert result["tokens_fails"] - result["tokens_fits"] <= 0.04 * 50_000 + GRAIN
    assert all(tokens % GRAIN == 0 for tokens in card.asked)
    assert len(card.asked) <= MOST_TRIES


def test_a_length_is_predicted_from_the_last_two_that_fit() -> None:
    points = [(1_000, 10, 0.0), (2_000, 20, 0.0), (10_000, 60, 0.0)]
    assert predict(points[:2], 35) == 3_500
    assert predict(points, 65) == 11_000


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
    assert card.asked == [768, 704, 576, 320, 128, GRAIN]
    assert result["why"] == "6 tries did not bracket it"


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


def measured(card: Card, seconds: float = 500.0) -> tuple[list[int], int | None]:
    points, fails = measure(card.step, [512, 2_048, 8_192, 32_768, 131_072], seconds)
    assert all(peak == 100 * tokens for tokens, peak, _ in points)
    return [tokens for tokens, _, _ in points], fails


def test_lengths_are_measured_as_far_as_they_fit_and_time_allows() -> None:
    assert measured(Card(1 << 20)) == ([512, 2_048, 8_192, 32_768, 131_072], None)
    assert measured(Card(40_000)) == ([512, 2_048, 8_192, 32_768], 131_072)
    assert measured(Card(1_000)) == ([512], 2_048)
    assert measured(Card(100)) == ([], 512)
    assert measured(Slow(1 << 20), seconds=513.0)[0][-1] == 131_072
    slow = Slow(1 << 20)
    assert measured(slow, seconds=511.0) == ([512, 2_048, 8_192, 32_768], None)  # 32 s, 16 times as much at four times
    assert slow.asked[-1] == 32_768


@pytest.mark.parametrize("predicted", [20_000, 32_900, 50_000, 100_000, 131_072, 400_000])
def test_what_was_measured_before_bounds_the_search(predicted: float) -> None:
    result, card = bracketed(50_000, predicted, known=(32_768, 131_072))
    assert result["tokens_fits"] <= 50_000 < result["tokens_fails"]
    assert result["tokens_fails"] - result["tokens_fits"] <= 0.03 * result["tokens_fails"]
    assert all(32_768 < tokens < 131_072 for tokens in card.asked)
    assert len(card.asked) <= MOST_TRIES
    assert "why" not in result


def test_nothing_is_tried_where_the_measured_lengths_bracket_it() -> None:
    result, card = bracketed(500, 520, known=(448, 512))
    assert card.asked == []
    assert (result["tokens_fits"], result["tokens_fails"]) == (448, 512)
    assert "why" not in result


def test_no_step_is_begun_that_the_time_does_not_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 40))  # every look at the clock is 40 s later
    monkeypatch.setattr("forge.training.checks.max_context.time.perf_counter", lambda: float(next(clock)))
    result, card = bracketed(50_000, 40_000, seconds=150)
    assert len(card.asked) == 1
    assert "may take 55 s and -10 s were left" in result["why"]


class Clocked(Card):
    """Six seconds for 32,768 tokens and the square of it beyond, on the clock that the search looks at."""

    def __init__(self, most_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(most_tokens)
        self.now = 0.0
        monkeypatch.setattr("forge.training.checks.max_context.time.perf_counter", lambda: self.now)

    def step(self, num_tokens: int) -> tuple[int, float] | None:
        self.now += 6.0 * (num_tokens / 32_768) ** 2
        return super().step(num_tokens)


def test_where_the_predicted_step_would_take_too_long_the_longest_that_may_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """80 GiB should hold some 400,000 tokens: a quarter of an hour a step."""
    card = Clocked(1 << 20, monkeypatch)
    result: dict[str, Any] = {"tokens_fits": 32_768, "tokens_fails": None, "tries": []}
    bracket(card.step, 400_000, 240.0, result, pace=(32_768, 6.0))
    assert card.asked == [207_232]  # 240 s
    assert (result["tokens_fits"], result["tokens_fails"]) == (207_232, None)
    assert result["why"].startswith("stopped: a step of ")
    assert card.now <= 240.0
    card = Clocked(200_000, monkeypatch)
    result = {"tokens_fits": 196_608, "tokens_fails": None, "tries": []}
    bracket(card.step, 400_000, 240.0, result, pace=(196_608, 216.0))
    assert card.asked == []  # what the time allows is hardly longer than what fits
    assert result["tokens_fits"] == 196_608
    assert result["why"].startswith("stopped: a step of 393,984 tokens may take 867 s and 240 s were left")


OnACard = Callable[..., Ended]


@pytest.fixture
def on_a_card(tmp_path: Path) -> OnACard:
    """Run the real trainer on a made-up GPU of these arguments of fake_card."""

    def run(*arguments: str) -> Ended:
        base = str(shared_base(dtype="float32"))
        return run_command.run([base, *arguments], tmp_path / "log", module="tests.support.fake_card")

    return run


@pytest.mark.parametrize(("budget", "fits", "fails"), [("5", 256, 320), ("6", 320, 384), ("8", 512, 576)])
def test_the_real_trainer_is_bracketed_on_a_card_of_that_size(
    on_a_card: OnACard, budget: str, fits: int, fails: int
) -> None:
    done = on_a_card(budget)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    gib = 1 << 30
    # a GiB is CUDA's when the model is loaded and one and a half after the first step; one is taken from the start
    assert found["told"] == [int(budget) * gib - 2 * gib, int(budget) * gib, 1.0], "what the backend could ask"
    assert found["cap_bytes"] == int(budget) * gib - 3 * gib // 2
    assert (found["tokens_fits"], found["tokens_fails"]) == (fits, fails)
    most = (found["cap_bytes"] - gib) / (10 << 20)
    assert fits <= most < fails
    assert found["predicted_tokens"] == int(most)
    lengths = [tokens for tokens, _, _ in found["points"]]
    assert lengths == [n for n in (64, 128, 256, 512, 1024) if n <= most]
    taken = found["taken"]
    assert taken[1 : len(lengths) + 1] == lengths, "a first step, then the measured lengths"
    failed = [place for place, tokens in enumerate(taken) if place and tokens > most]
    assert failed
    assert all(taken[place + 1] == GRAIN for place in failed), "no whole step after one that failed"
    assert found["cap_at_the_end"] == 100 * gib, "the cap outlasts the probe"


def test_a_card_that_does_not_hold_the_weights_is_an_answer(on_a_card: OnACard) -> None:
    done = on_a_card("2.6")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["why"] == "the weights and a first step of short documents do not fit"
    assert (found.get("tokens_fits"), found["points"]) == (None, [])


@pytest.mark.slow
def test_a_budget_beyond_the_gpu_is_measured_and_not_confirmed_and_without_one_it_is_the_gpus_own(
    on_a_card: OnACard,
) -> None:
    beyond, own = (on_a_card(budget) for budget in ("120", "all"))
    assert (beyond.returncode, own.returncode) == (0, 0), beyond.stderr[-2000:] + own.stderr[-2000:]
    found = json.loads(beyond.stdout.splitlines()[-1])
    assert found["why"] == "not confirmed: this GPU has 100.0 GiB in all"
    assert (found["tokens_fits"], found["tries"]) == (1024, [])
    assert found["predicted_tokens"] == 12_032
    found = json.loads(own.stdout.splitlines()[-1])
    assert "why" not in found
    assert found["budget_gib"] == 100.0
    assert found["tokens_fits"] <= 9_984 < found["tokens_fails"]


def test_a_model_that_is_given_fewer_tokens_is_no_measurement(on_a_card: OnACard) -> None:
    done = on_a_card("8", "100")
    assert done.returncode == 1
    assert "of 128 tokens the model was given 100" in done.stderr
