"""Export fidelity on a trained base: each claim judged by what a probe found, recorded, then asserted."""

from __future__ import annotations

from typing import Any

import pytest

from harness.export.exports import Exports
from harness.recorder import CLOCK, record_facts, record_metric

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(0)]  # the first test waits for the run


def hold(exports: Exports, benchmark: Any, name: str) -> None:
    """Record the finding on a claim, then assert it."""
    finding = exports.finding(name)
    record_facts(
        benchmark,
        metric=name,
        record_kind="export",
        workload=exports.spec.workload,
        backend=exports.spec.backend,
        verdict=finding.to_dict(),
    )
    assert finding.status == "PASS", f"{finding.status}: {finding.statement} {finding.reason}"


@pytest.mark.benchmark(group="export", timer=CLOCK)
def test_merged_weights_are_base_plus_scaled_product_and_all_else_the_same_bytes(
    exports: Exports, benchmark: Any
) -> None:
    hold(exports, benchmark, "merge")


@pytest.mark.benchmark(group="export", timer=CLOCK)
def test_merged_weights_predict_what_the_adapter_on_the_original_base_predicts(
    exports: Exports, benchmark: Any
) -> None:
    hold(exports, benchmark, "merged_against_adapter")


@pytest.mark.benchmark(group="export", timer=CLOCK)
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_a_file_predicts_what_the_merged_weights_predict(exports: Exports, benchmark: Any, kind: str) -> None:
    hold(exports, benchmark, f"divergence_{kind}")


@pytest.mark.benchmark(group="export", timer=CLOCK)
def test_the_loss_from_base_to_the_smallest_file_is_known(exports: Exports, benchmark: Any) -> None:
    hold(exports, benchmark, "chain")


@pytest.mark.benchmark(group="export", timer=CLOCK)
def test_greedy_text_of_the_f16_file_is_that_of_the_merged_weights(exports: Exports, benchmark: Any) -> None:
    hold(exports, benchmark, "greedy")


@pytest.mark.benchmark(group="export", timer=CLOCK)
def test_the_adapter_as_gguf_equals_the_merged_model(exports: Exports, benchmark: Any) -> None:
    hold(exports, benchmark, "lora_route")


@pytest.mark.benchmark(group="export", timer=CLOCK)
@pytest.mark.parametrize("name", ["tokens", "template", "specials", "modelfile"])
def test_text_reaches_the_model_as_it_did_in_training(exports: Exports, benchmark: Any, name: str) -> None:
    hold(exports, benchmark, name)


@pytest.mark.benchmark(group="export", timer=CLOCK)
def test_every_artefact_from_corpus_to_gguf_is_what_the_records_say(exports: Exports, benchmark: Any) -> None:
    hold(exports, benchmark, "lineage")


@pytest.mark.benchmark(group="export: held-out loss", timer=CLOCK)
@pytest.mark.parametrize("subject", ["base", "adapter", "merged", "f16", "q8_0", "q4_k_m"])
def test_the_held_out_loss_is_recorded(exports: Exports, benchmark: Any, subject: str) -> None:
    answer = exports.answer("divergence")
    assert answer is not None, "INCOMPLETE: no time was left for it in this session"
    row = next(row for row in answer["chain"] if row["subject"] == subject)
    record_metric(
        benchmark,
        [row["nats_per_token"]],
        metric="held_out_loss",
        unit="nats",
        record_kind="export",
        workload=exports.spec.workload,
        backend=exports.spec.backend,
        arm=subject,
        step=row,
    )


@pytest.mark.benchmark(group="export: 7B, seconds", timer=CLOCK)
def test_the_whole_export_at_7b_is_timed(exports: Exports, benchmark: Any) -> None:
    assert exports.large is not None
    answer = exports.timing()
    if answer is None:
        reason = "no time was left for it in this session"
        record_facts(benchmark, metric="none", record_kind="not_run", what="export at 7B", reason=reason)
        pytest.fail(f"INCOMPLETE: export at 7B: {reason}")
    seconds = [float(step["seconds"]) for step in answer["steps"]]
    record_metric(
        benchmark,
        [sum(seconds)],
        metric="export_seconds",
        unit="seconds",
        record_kind="export",
        workload=exports.large.workload,
        backend=exports.large.backend,
        arm="export at 7B",
        **{key: answer[key] for key in ("steps", "files", "needed_disk_bytes", "shape", "key")},
    )
    assert set(answer["files"]) == {"f16", "q8_0", "q4_k_m"}
    assert not any(answer["fallbacks"].values()), answer["fallbacks"]
    assert all(step["peak_rss_bytes"] > 0 for step in answer["steps"])
