"""Planted faults in what the files predict, and how the bars on predictions are judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.training.train.record import completed_record
from harness.export.claims import KL_BARS
from harness.export.exports import Exports
from tests.support.export_answers import (
    assert_red,
    divergence,
    divergence_answer,
    entry,
    file_of,
    number,
    patched,
    verdict_on,
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_left_of_the_f16_files_divergence_is_llama_cpps_arithmetic(exports: Exports) -> None:
    answer = exports.answer("divergence")
    assert answer is not None
    kl = {row["subject"]: row["mean_kl_nats"] for row in answer["pairs"] if row["reference"] == "merged"}
    print({name: f"{value:.2e}" for name, value in kl.items()})
    assert kl["f32"] < 1e-10  # converter, graphs, positions: nothing is wrong
    assert kl["f32"] * 100 < kl["f16"] < kl["with an f16 cache"] < kl["q8_0"] < kl["q4_k_m"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_q4_k_m_that_fell_back_to_another_type_is_red_however_good_its_predictions(
    run_dir: Path, tmp_path: Path
) -> None:
    key = "general.file_type"
    change = (entry(key, 4, number(7)), entry(key, 4, number(15)))  # says q4_k_m, holds Q8_0
    path = patched(file_of(run_dir, "q8_0"), tmp_path / "x.gguf", change)
    answer = divergence(run_dir, path)
    assert next(row for row in answer["pairs"] if row["subject"] == "q4_k_m")["mean_kl_nats"] < KL_BARS["q4_k_m"] / 10
    assert_red(answer, "divergence_q4_k_m", r"\d+ tensors are of another type, .*Q8_0")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_files_of_the_base_instead_of_the_merged_weights_are_red(run_dir: Path, tmp_path: Path) -> None:
    from forge.training.export.gguf import convert_to_gguf

    convert_to_gguf(Path(completed_record(run_dir).base_path), tmp_path / "x.gguf")
    answer = divergence(run_dir, tmp_path / "x.gguf")
    assert_red(answer, "divergence_f16", "mean KL")
    assert_red(answer, "greedy", "parts at token 0, where the merged weights' choice leads by")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_q8_0_where_an_f16_was_asked_for_is_no_f16(run_dir: Path) -> None:
    answer = divergence(run_dir, file_of(run_dir, "q8_0"))
    assert verdict_on(answer, "divergence_f16").status == "INCOMPLETE"
    assert_red(answer, "greedy", "compared was q8_0")


@pytest.mark.parametrize(
    ("mean", "error", "num_documents", "status"),
    [
        (5e-7, 1e-8, 10, "PASS"),
        (5e-7, 1e-8, 2, "PASS"),
        (9e-7, 1e-7, 10, "INCONCLUSIVE"),
        (5e-7, 1e-7, 2, "INCONCLUSIVE"),  # Student's t of two documents is 12.7
        (5e-7, None, 1, "INCONCLUSIVE"),
        (1e-6, 1e-9, 10, "FAIL"),
        (2e-6, None, 1, "FAIL"),
    ],
)
def test_a_bar_is_cleared_by_the_whole_interval_over_documents(
    mean: float, error: float | None, num_documents: int, status: str
) -> None:
    assert verdict_on(divergence_answer(mean, error, num_documents), "divergence_f16").status == status


def test_what_was_not_measured_is_no_pass() -> None:
    answer = divergence_answer(1e-9, 1e-10)
    assert verdict_on(answer, "lora_route").status == "INCOMPLETE"
    assert verdict_on({"modelfile": None}, "modelfile").status == "INCOMPLETE"
    assert verdict_on({"greedy": {"subject": "f16", "num_tokens": 48, "answers": []}}, "greedy").status == "FAIL"
    assert verdict_on(divergence_answer(0.01, 0.001), "chain").status == "FAIL"  # the adapter is worse than its base
    assert verdict_on(divergence_answer(-0.01, 0.001), "chain").status == "PASS"
    nothing_was_learned = verdict_on(answer, "merged_against_adapter")
    assert nothing_was_learned.status == "INCONCLUSIVE"
    del answer["files"]["q8_0"]
    assert verdict_on(answer, "divergence_q8_0").status == "INCOMPLETE"


def test_a_loss_that_moves_beyond_the_margin_is_red_even_where_the_kl_is_small() -> None:
    answer = divergence_answer(1e-6, 1e-8)
    answer["pairs"][0]["mean_kl_nats"] = 1.0
    assert verdict_on(answer, "merged_against_adapter").status == "PASS"
    answer["four_bit"] = {"why": "RuntimeError: no kernel"}
    assert verdict_on(answer, "merged_against_adapter").status == "INCOMPLETE"
    answer["four_bit"] = None
    next(row for row in answer["chain"] if row["subject"] == "merged")["change_nats_per_token"] = 0.02
    assert_red(answer, "merged_against_adapter", "the loss moves by")
