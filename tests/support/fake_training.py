"""Quick children that leave what a training run leaves. All of it is real, but for the learning."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge.training.data.inputs import Inputs
from forge.training.train.record import Losses, MemoryPhase, RunRecord, Trainable
from harness.measurement.results import Monitor, Outcome, RunSpec

SPEC = RunSpec(backend="trl", workload="smoke")
OTHER = RunSpec(backend="trl", workload="smoke", plan_overrides=("micro_batch=2",))


def make_record(**changes: Any) -> RunRecord:
    """A complete record of three steps; ``changes`` replace its fields."""
    fields: dict[str, Any] = {
        "status": "completed",
        "backend": "trl",
        "workload": {"model": {"path": "/somewhere/of/mine/base"}, "data": {"train": "/somewhere/of/mine/train.jsonl"}},
        "workload_sha256": "a" * 64,
        "plan": {},
        "seed": 42,
        "base_path": "/somewhere/of/mine/base",
        "started_at": "2026-11-24T12:00:00+00:00",
        "num_steps": 3,
        "num_planned_steps": 3,
        "inputs": Inputs(
            base_sha256="b" * 64,
            tokenizer_sha256="c" * 64,
            train_examples_sha256="d" * 64,
            num_train_examples=12,
            num_validation_examples=0,
            num_train_tokens=3456,
            num_trained_tokens=1234,
        ),
        "trainable": Trainable(num_parameters=30_000, names_sha256="f" * 64, dtype="float32"),
        "losses": Losses(first_train_loss=4.5, last_train_loss=1.25),
        "memory": [
            MemoryPhase(phase="load", peak_allocated_bytes=5 << 30, peak_reserved_bytes=6 << 30),
            MemoryPhase(phase="train", peak_allocated_bytes=3 << 30, peak_reserved_bytes=7 << 30),
        ],
        "batch_digests": ["1" * 64, "2" * 64, "3" * 64],
    }
    return RunRecord.model_validate(fields | changes)


def make_steps(seconds: float = 0.5, **changes: Any) -> list[dict[str, Any]]:
    """The step log that belongs to :func:`make_record`; the first step is slow, as real ones are."""
    return [
        {"step": n, "seconds": seconds * (4 if n == 1 else 1), "documents": 4, "tokens": 400, "trained_tokens": 100}
        | {"loss": 2.0 / n}
        | changes
        for n in (1, 2, 3)
    ]


# No import but the standard library's: a gate's test starts many of them.
_CHILD = """
import json, sys, time
run_dir, told = sys.argv[1], json.loads(sys.argv[2])
time.sleep(told["sleep"])
for name in ("run.json", "steps.jsonl"):
    with open(f"{run_dir}/{name}", "w") as stream:
        stream.write(told[name])
sys.exit(told["exit_code"])
"""


def make_outcome(record: dict[str, Any] | None = None, steps: dict[str, Any] | None = None, **more: Any) -> Outcome:
    """A completed outcome; ``record`` and ``steps``: changes for :func:`make_record` and :func:`make_steps`."""
    return Outcome(
        **{
            "run_id": "0123456789ab-0001",
            "key": "0123456789ab",
            "key_parts": {},
            "spec": SPEC,
            "status": "completed",
            "exit_code": 0,
            "started_at": "2026-11-24T12:00:00+00:00",
            "wall_seconds": 3.0,
            "machine": "0" * 16,
            "monitor": Monitor(),
            "log_tail": "",
            "record": make_record(**(record or {})).model_dump(mode="json"),
            "steps": make_steps(**(steps or {})),
            **more,
        }
    )


def fake(
    *, sleep: float = 0.0, record: dict[str, Any] | None = None, steps: dict[str, Any] | None = None, exit_code: int = 0
) -> Callable[[RunSpec, Path], list[str]]:
    """A command for :func:`harness.measurement.runner.run_once`; ``sleep`` in seconds."""
    told = {
        "sleep": sleep,
        "run.json": make_record(**(record or {})).model_dump_json(),
        "steps.jsonl": "".join(json.dumps(line) + "\n" for line in make_steps(**(steps or {}))),
        "exit_code": exit_code,
    }
    return lambda spec, run_dir: [sys.executable, "-I", "-S", "-c", _CHILD, str(run_dir), json.dumps(told)]
