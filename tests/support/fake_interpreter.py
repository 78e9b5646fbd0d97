"""An interpreter for tests of the gate on a machine without a GPU: what the arms' Pythons would be.

It reads the real workload and plan and writes a real run record; only the training is left out. How
fast and how large each backend is comes from ``ARM_SECONDS`` and ``ARM_BYTES`` (JSON by backend).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

SECONDS = {"legacy": 4.0, "trl": 2.0, "unsloth": 1.0}
BYTES = {"legacy": 70 << 30, "trl": 30 << 30, "unsloth": 10 << 30}


def train(arguments: list[str]) -> int:
    from forge.training.backends import load_plan
    from forge.training.config.workload import load_workload
    from forge.training.data.inputs import Inputs
    from forge.training.train.record import Losses, MemoryPhase, RunRecord, Trainable

    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("--backend")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--plan", action="append", default=[])
    parser.add_argument("-o", type=Path)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--on-oom", choices=["stop"], required=True)  # a run in another layout is another measurement
    options = parser.parse_args(arguments)
    overrides = list(options.set)
    if options.backend == os.environ.get("ARM_CHANGES_WORKLOAD"):
        overrides.append("lora.dropout=0.0")
    workload = load_workload(options.workload, overrides)
    if options.backend == os.environ.get("ARM_OUT_OF_MEMORY"):
        print("error: out of GPU memory", file=sys.stderr)
        return 5
    if options.backend == os.environ.get("ARM_HANGS"):
        time.sleep(600)
    plan = load_plan(workload, options.backend, options.plan)
    steps = int(workload.training.max_steps or 0)
    seconds = {**SECONDS, **json.loads(os.environ.get("ARM_SECONDS", "{}"))}[options.backend]
    peak = int({**BYTES, **json.loads(os.environ.get("ARM_BYTES", "{}"))}[options.backend])
    noise = 1 + 0.004 * (os.getpid() % 7 - 3) / 3
    digests = [hashlib.sha256(str(step).encode()).hexdigest() for step in range(steps)]
    lines = [
        {"step": n + 1, "seconds": seconds * noise * (1 + n % 3), "documents": 8, "tokens": 4000 + 100 * n}
        | {
            "tokens_squared": 9_000_000 + n**3,
            "trained_tokens": 3992,
            "labels_sha256": digests[n],
            "loss": 12.0 - n / 10,
        }
        for n in range(steps)
    ]
    record = RunRecord(
        status="completed",
        backend=options.backend,
        workload=workload.model_dump(mode="json"),
        workload_sha256=workload.digest(),
        plan=plan.model_dump(),
        seed=workload.training.seed,
        base_path="base",
        started_at="2026-11-24T12:00:00+00:00",
        num_steps=steps,
        num_planned_steps=steps,
        inputs=Inputs(
            base_sha256="b" * 64,
            tokenizer_sha256="c" * 64,
            train_examples_sha256="d" * 64,
            num_train_examples=80,
            num_validation_examples=0,
            num_train_tokens=40_000,
            num_trained_tokens=39_920,
            num_corpus_examples=489,
            num_corpus_tokens=633_003,
            corpus_tokens_squared=5_000_000_000,
        ),
        model_shape={"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 256}
        | {"num_attention_heads": 2, "num_key_value_heads": 1},
        trainable=Trainable(num_parameters=1000, names_sha256="f" * 64, dtype="float32"),
        losses=Losses(first_train_loss=12.0, last_train_loss=11.5),
        memory=[MemoryPhase(phase="train", peak_allocated_bytes=peak, peak_reserved_bytes=peak + (1 << 28))],
        batch_digests=digests,
    )
    (options.o / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record.write(options.o)
    if workload.name == "genome_full" and "ARM_USED" in os.environ:
        used = Path(os.environ["ARM_USED"])
        used.write_text(str(peak + (1 << 29)))
        time.sleep(0.5)  # the monitor looks five times a second
        used.write_text("0")
    return 0


def probe(name: str, arguments: list[str]) -> int:
    if name == "matmul_peak":
        print(json.dumps({"tflops": 700.0}))
        return 0
    backend = arguments[arguments.index("--backend") + 1]
    if os.environ.get("ARM_CONTEXT_FAILS") == backend:
        print("error: planted", file=sys.stderr)
        return 4
    answer = {"predicted_tokens": 1000, "tokens_fits": 985, "tokens_fails": 1015}
    answer |= {"budget_gib": float(arguments[arguments.index("--budget") + 1]), "loaded_bytes": 5 << 30}
    points = [[8192, 8 << 30, 1.0], [32768, 12 << 30, 5.0]]
    print(json.dumps({"backend": backend, "plan": {}, "points": points, "is_embedding_on_host": False, **answer}))
    return 0


def main() -> int:
    if sys.argv[1] == "-m" and sys.argv[2] == "forge.training" and sys.argv[3] == "train":
        return train(sys.argv[4:])
    if sys.argv[1] == "-m" and sys.argv[2].startswith("harness."):
        return probe(sys.argv[2].rpartition(".")[2], sys.argv[3:])
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
