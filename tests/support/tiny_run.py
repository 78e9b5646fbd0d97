"""A run directory as `train` leaves it, around the tiny model and adapter, without training anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forge.training.config.workload import Workload
from forge.training.data.inputs import Inputs
from forge.training.system.files import sha256_file
from forge.training.train.record import Losses, MemoryPhase, RunRecord, Timing, Trainable


def write_run(run_dir: Path, base_dir: Path, **workload: Any) -> RunRecord:
    """Write ``run.json`` for the adapter in ``run_dir/adapter``, trained (so it says) on ``base_dir``."""
    from forge.training.models.digests import base_sha256, tokenizer_sha256

    adapter = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    parsed = Workload.model_validate(
        {
            "name": "lighthouse",
            "data": {"documents": "embedded", "system_prompt": 'You keep a "lighthouse".'},
            "lora": {
                "rank": adapter["r"],
                "alpha": adapter["lora_alpha"],
                "targets": adapter["target_modules"],
                "use_rslora": adapter["use_rslora"],
            },
            "export": {"parameters": {"temperature": 0.2, "num_ctx": 512}},
        }
        | workload
    )
    record = RunRecord(
        status="completed",
        backend="trl",
        workload=parsed.model_dump(mode="json"),
        workload_sha256=parsed.digest(),
        plan={},
        seed=42,
        base_path=str(base_dir),
        started_at="2026-11-23T12:00:00+00:00",
        num_steps=7,
        num_planned_steps=7,
        inputs=Inputs(
            base_sha256=base_sha256(base_dir),
            tokenizer_sha256=tokenizer_sha256(base_dir),
            corpus_sha256="c" * 64,
            train_examples_sha256="e" * 64,
            num_train_examples=12,
            num_validation_examples=3,
            num_train_tokens=3456,
            num_trained_tokens=1234,
        ),
        trainable=Trainable(num_parameters=30_000, names_sha256="f" * 64, dtype="float32"),
        timing=Timing(train_seconds=12.5, tokens_per_second=987.0),
        losses=Losses(first_train_loss=4.5, last_train_loss=1.25, best_validation_loss=1.5),
        memory=[MemoryPhase(phase="train", peak_allocated_bytes=3 << 30, peak_reserved_bytes=4 << 30)],
        environment={"packages": {"torch": "2.13.0", "secret-tool": "1"}, "cwd": str(run_dir.absolute())},
        adapter_sha256=sha256_file(run_dir / "adapter" / "adapter_model.safetensors"),
    )
    record.write(run_dir)
    return record
