"""A run's record and its step log, made up."""

from __future__ import annotations

from typing import Any

from forge.training.train.record import RunRecord


def make_record(*, inputs: dict[str, Any] | None = None, **changes: Any) -> RunRecord:
    """The record of a complete run of three steps; ``inputs`` and ``changes`` replace some of its fields."""
    fields: dict[str, Any] = {
        **{"status": "completed", "backend": "trl", "plan": {}, "seed": 42, "started_at": "2026-11-24T12:00:00+00:00"},
        "workload": {"model": {"path": "/somewhere/of/mine/base"}, "data": {"train": "/somewhere/of/mine/train.jsonl"}},
        **{"workload_sha256": "a" * 64, "base_path": "/somewhere/of/mine/base"},
        **{"num_steps": 3, "num_planned_steps": 3, "batch_digests": ["1" * 64, "2" * 64, "3" * 64]},
        "trainable": {"num_parameters": 30_000, "names_sha256": "f" * 64, "dtype": "float32"},
        "losses": {"first_train_loss": 4.5, "last_train_loss": 1.25},
        "memory": [
            {"phase": "load", "peak_allocated_bytes": 5 << 30, "peak_reserved_bytes": 6 << 30},
            {"phase": "train", "peak_allocated_bytes": 3 << 30, "peak_reserved_bytes": 7 << 30},
        ],
    }
    known_inputs = {
        **{"base_sha256": "b" * 64, "tokenizer_sha256": "c" * 64, "train_examples_sha256": "d" * 64},
        **{"num_train_examples": 12, "num_validation_examples": 0},
        **{"num_train_tokens": 3456, "num_trained_tokens": 1234},
    }
    return RunRecord.model_validate(fields | {"inputs": known_inputs | (inputs or {})} | changes)


def make_steps(seconds: float = 0.5, **changes: Any) -> list[dict[str, Any]]:
    """The step log that belongs to :func:`make_record`; the first step is slow, as real ones are."""
    fields = {"documents": 4, "tokens": 400, "trained_tokens": 100}
    return [
        {"step": n, "seconds": seconds * (4 if n == 1 else 1), **fields, "loss": 2.0 / n, **changes} for n in (1, 2, 3)
    ]
