"""An interpreter for tests of the gate on a machine without a GPU: what the arms' Pythons would be.

It reads the real workload and plan and leaves a real run record; only the training is left out. How fast and how
large each backend is comes from ``ARM_SECONDS`` and ``ARM_BYTES`` (JSON by backend). Records are kept in
``ARM_RECORDS``, and the same arguments are not read twice: a gate makes many runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"legacy": 4.0, "trl": 2.0, "unsloth": 1.0}
BYTES = {"legacy": 70 << 30, "trl": 30 << 30, "unsloth": 10 << 30}


def install(folder: Path) -> dict[str, str]:
    """Make the program in ``folder``; returns the variables that name it to a gate."""
    program = folder / "arm"
    if not program.exists():
        settings = f"PYTHONPATH={ROOT} ARM_RECORDS={folder}/records"
        program.write_text(f'#!/bin/sh\n{settings} exec {sys.executable} {__file__} "$@"\n')
        program.chmod(0o755)
    return {"FORGE_LEGACY_PYTHON": str(program), "FORGE_GPU_PYTHON": str(program)}


def write_record(folder: Path, path: str, overrides: list[str], backend: str, plan: list[str], peak: int) -> None:
    """Write the record that this run would leave; ``peak`` in bytes."""
    from forge.training.backends import load_plan
    from forge.training.config.workload import load_workload
    from tests.support.records import make_record

    workload = load_workload(path, overrides)
    steps = int(workload.training.max_steps or 0)
    record = make_record(
        backend=backend,
        workload=workload.model_dump(mode="json"),
        workload_sha256=workload.digest(),
        plan=load_plan(workload, backend, plan).model_dump(),
        seed=workload.training.seed,
        num_steps=steps,
        num_planned_steps=steps,
        inputs={"num_train_examples": 80, "num_train_tokens": 40_000, "num_trained_tokens": 39_920}
        | {"num_corpus_examples": 489, "num_corpus_tokens": 633_003, "corpus_tokens_squared": 5_000_000_000},
        model_shape={"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 256}
        | {"num_attention_heads": 2, "num_key_value_heads": 1},
        losses={"first_train_loss": 12.0, "last_train_loss": 11.5},
        memory=[{"phase": "train", "peak_allocated_bytes": peak, "peak_reserved_bytes": peak + (1 << 28)}],
        batch_digests=[hashlib.sha256(str(step).encode()).hexdigest() for step in range(steps)],
    )
    folder.mkdir(parents=True, exist_ok=True)
    record.write(folder)


def train(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("--backend")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--plan", action="append", default=[])
    parser.add_argument("-o", type=Path)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--on-oom", choices=["stop"], required=True)  # a run in another layout is another measurement
    options = parser.parse_args(arguments)
    if options.backend == os.environ.get("ARM_CHANGES_WORKLOAD"):
        options.set.append("lora.dropout=0.0")
    if options.backend == os.environ.get("ARM_OUT_OF_MEMORY"):
        print("error: out of GPU memory", file=sys.stderr)
        return 5
    if options.backend == os.environ.get("ARM_HANGS"):
        time.sleep(600)
    peak = int({**BYTES, **json.loads(os.environ.get("ARM_BYTES", "{}"))}[options.backend])
    work = (options.workload, options.set, options.backend, options.plan, peak)
    kept = Path(os.environ["ARM_RECORDS"], hashlib.sha256(json.dumps(work).encode()).hexdigest())
    if not (kept / "run.json").exists():
        write_record(kept, *work)
    text = (kept / "run.json").read_text()
    record = json.loads(text)
    seconds = {**SECONDS, **json.loads(os.environ.get("ARM_SECONDS", "{}"))}[options.backend]
    noise = 1 + 0.004 * (os.getpid() % 7 - 3) / 3
    with open(options.o / "steps.jsonl", "w") as stream:
        for n, digest in enumerate(record["batch_digests"]):
            line = {"step": n + 1, "seconds": seconds * noise * (1 + n % 3), "documents": 8, "tokens": 4000 + 100 * n}
            line |= {"tokens_squared": 9_000_000 + n**3, "trained_tokens": 3992, "labels_sha256": digest}
            stream.write(json.dumps(line | {"loss": 12.0 - n / 10}) + "\n")
    (options.o / "run.json").write_text(text)
    if record["workload"]["name"] == "genome_full" and "ARM_USED" in os.environ:
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
