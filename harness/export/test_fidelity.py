"""Export fidelity on a trained base: each claim judged by what a probe answers, recorded, then asserted."""

from __future__ import annotations

from typing import Any

import pytest

from harness.export.claims import KINDS
from harness.export.exports import Exports
from harness.recorder import CLOCK, record_facts, record_metric
from harness.verdict import Hold

pytestmark = [
    *(pytest.mark.gpu, pytest.mark.timeout(0)),  # the first test waits for the run
    pytest.mark.benchmark(group="export", timer=CLOCK),
]


def test_merged_weights_are_base_plus_scaled_product_and_all_else_the_same_bytes(exports: Exports, hold: Hold) -> None:
    hold(exports.verdict("merge"), **exports.entry)


def test_merged_weights_predict_what_the_adapter_on_the_original_base_predicts(exports: Exports, hold: Hold) -> None:
    hold(exports.verdict("merged_against_adapter"), **exports.entry)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_predicts_what_the_merged_weights_predict(exports: Exports, hold: Hold, kind: str) -> None:
    hold(exports.verdict(f"divergence_{kind}"), **exports.entry)


def test_the_loss_from_base_to_the_smallest_file_is_known(exports: Exports, hold: Hold) -> None:
    hold(exports.verdict("chain"), **exports.entry)


def test_greedy_text_of_the_f16_file_is_that_of_the_merged_weights(exports: Exports, hold: Hold) -> None:
    hold(exports.verdict("greedy"), **exports.entry)


def test_the_adapter_as_gguf_equals_the_merged_model(exports: Exports, hold: Hold) -> None:
    hold(exports.verdict("lora_route"), **exports.entry)


@pytest.mark.parametrize("name", ["tokens", "template", "specials", "modelfile"])
def test_text_reaches_the_model_as_it_did_in_training(exports: Exports, hold: Hold, name: str) -> None:
    hold(exports.verdict(name), **exports.entry)


def test_every_artefact_from_corpus_to_gguf_is_what_the_records_say(exports: Exports, hold: Hold) -> None:
    hold(exports.verdict("provenance"), **exports.entry)


@pytest.mark.benchmark(group="export: held-out loss", timer=CLOCK)
@pytest.mark.parametrize("subject", ["base", "adapter", "merged", *KINDS])
def test_the_held_out_loss_is_recorded(exports: Exports, benchmark: Any, subject: str) -> None:
    answer = exports.answer("divergence")
    assert answer is not None, f"INCOMPLETE: {exports.session.why_missing()}"
    step = next(step for step in answer["chain"] if step["subject"] == subject)
    samples = [step["nats_per_token"]]
    record_metric(benchmark, samples, metric="held_out_loss", unit="nats", arm=subject, step=step, **exports.entry)


@pytest.mark.benchmark(group="export: 7B, seconds", timer=CLOCK)
def test_the_whole_export_at_7b_is_timed(exports: Exports, benchmark: Any) -> None:
    assert exports.large is not None
    answer = exports.timing()
    if answer is None:
        reason = exports.session.why_missing()
        record_facts(benchmark, metric="none", record_kind="not_run", what="export at 7B", reason=reason)
        pytest.fail(f"INCOMPLETE: export at 7B: {reason}")
    record_metric(
        benchmark,
        [sum(float(step["seconds"]) for step in answer["steps"])],
        metric="export_seconds",
        unit="seconds",
        record_kind="export",
        workload=exports.large.workload,
        backend=exports.large.backend,
        arm="export at 7B",
        steps=answer["steps"],
        files=answer["files"],
        needed_disk_bytes=answer["needed_disk_bytes"],
        shape=answer["shape"],
        key=answer["key"],
    )
    assert set(answer["files"]) == set(KINDS)
    assert not any(answer["fallbacks"].values()), answer["fallbacks"]
    assert all(step["peak_rss_bytes"] > 0 for step in answer["steps"])
