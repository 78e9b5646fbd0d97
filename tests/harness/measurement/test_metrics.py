"""That two runs did the same work, their metrics, and the model FLOPs of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from forge.training.system.environment import ROOT
from forge.training.system.errors import CheckError
from harness.measurement.metrics import WorkMismatch, check_same_work, measure, model_flops
from harness.measurement.results import Monitor
from tests.support.fake_runs import OTHER, make_outcome
from tests.support.records import make_record, make_steps


def test_the_same_work_passes_however_it_is_laid_out() -> None:
    check_same_work(make_outcome(), make_outcome(record={"plan": {"micro_batch": 8}, "backend": "legacy"}, spec=OTHER))


INPUTS = make_record().inputs.model_dump()
TRAINABLE = {"num_parameters": 30_000, "names_sha256": "f" * 64, "dtype": "float32"}


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ({"record": {"workload_sha256": "9" * 64}}, f"workload_sha256: {'a' * 64} | {'9' * 64}"),
        ({"record": {"seed": 7}}, "seed: 42 | 7"),
        ({"record": {"num_steps": 2}}, "num_steps: 3 | 2"),
        ({"record": {"inputs": INPUTS | {"base_sha256": "9"}}}, f"inputs.base_sha256: {'b' * 64} | 9"),
        ({"record": {"inputs": INPUTS | {"tokenizer_sha256": "9"}}}, f"inputs.tokenizer_sha256: {'c' * 64} | 9"),
        ({"record": {"inputs": INPUTS | {"train_examples_sha256": "9"}}}, "inputs.train_examples_sha256: "),
        ({"record": {"trainable": TRAINABLE | {"names_sha256": "9"}}}, f"trainable.names_sha256: {'f' * 64} | 9"),
        ({"record": {"trainable": TRAINABLE | {"num_parameters": 1}}}, "trainable.num_parameters: 30000 | 1"),
        ({"record": {"batch_digests": ["1" * 64, "9", "9"]}}, "batch_digests, step 2: "),
        ({"record": {"batch_digests": ["1" * 64]}}, "batch_digests: 3 steps | 1 steps"),
        ({"steps": {"trained_tokens": 99}}, "trained_tokens, step 1: 100 | 99 (and 2 further steps)"),
        ({"steps": {"tokens": 401}}, "  tokens, step 1: 400 | 401 (and 2 further steps)"),
        ({"steps": {"documents": 5}}, "documents, step 1: 4 | 5 (and 2 further steps)"),
        ({"record": {"trainable": None}}, f"trainable.names_sha256: {'f' * 64} | None"),
    ],
)
def test_other_work_is_refused_showing_both_values(other: dict[str, Any], shown: str) -> None:
    with pytest.raises(WorkMismatch) as caught:
        check_same_work(make_outcome(), make_outcome(**other))
    assert shown in caught.value.message
    assert caught.value.exit_code == 8


def test_what_neither_side_has_recorded_is_not_the_same() -> None:
    empty = make_outcome(steps=None, record={"trainable": None, "batch_digests": []})
    with pytest.raises(WorkMismatch) as caught:
        check_same_work(empty, empty)
    assert "trainable.names_sha256: None | None" in caught.value.message
    assert "batch_digests: 0 steps | 0 steps" in caught.value.message


# Metrics


def test_metrics_are_those_of_the_record_the_steps_and_the_monitor() -> None:
    seen = Monitor(device_used_before_bytes=1 << 30, device_used_peak_bytes=9 << 30)
    run = make_outcome(monitor=seen)
    figures = {
        metric: measure(run, metric, num_warmup_steps=1)
        for metric in (
            *("measured_seconds", "seconds_per_document", "peak_allocated_bytes", "peak_reserved_bytes"),
            *("device_used_bytes", "last_train_loss"),
        )
    }
    assert figures == {
        "measured_seconds": 1.0,
        "seconds_per_document": 0.125,
        "peak_allocated_bytes": 5 << 30,
        "peak_reserved_bytes": 7 << 30,
        "device_used_bytes": 8 << 30,
        "last_train_loss": 1.25,
    }
    assert measure(run, "measured_seconds", num_warmup_steps=0) == 3.0
    with pytest.raises(ValueError, match="no metric 'speed'"):
        measure(run, "speed", num_warmup_steps=0)


def test_evaluations_in_the_step_log_are_no_steps() -> None:
    lines = make_steps()
    lines.insert(2, {"step": 2, "validation_loss": 3.0})
    assert measure(make_outcome().model_copy(update={"steps": lines}), "measured_seconds", num_warmup_steps=2) == 0.5


@pytest.mark.parametrize("metric", ["measured_seconds", "device_used_bytes", "peak_allocated_bytes"])
def test_what_was_not_measured_is_no_number(metric: Any) -> None:
    with pytest.raises(CheckError, match=f"{metric} was not measured in run 0123456789ab-0001"):
        measure(make_outcome(record={"memory": []}), metric, num_warmup_steps=3)


def test_model_flops_are_those_counted_by_hand() -> None:
    shape: dict[str, Any] = {"hidden_size": 4, "num_hidden_layers": 2, "intermediate_size": 8, "vocab_size": 16}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    layer = 4 * 4 + 4 * 4 + 2 * 4 * 2 + 3 * 4 * 8  # q, o; k, v of one head of two; the MLP
    weights = 2 * layer + 4 * 16
    by_hand = 4 * weights * 10 + 6 * 5 * 10 + 3 * 2 * 2 * 4 * 100
    assert model_flops(shape, 5, 10, 100) == by_hand


def test_the_gate_measures_without_importing_torch() -> None:
    code = "import sys, harness.measurement.trial; print({'torch', 'transformers', 'scipy'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown == "set()\n"
