"""A synthetic gate for tests of the report: plausible numbers, none of them measured.

The runs are real ones (tests/data/h200_runs.json), scaled to what other arms might show and varied by seeded noise;
the GPU's name says that they are synthetic. The verdicts on them are the real ones.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge.training.config.workload import load_workload
from forge.training.system.files import sha256_json, write_json
from harness.measurement.results import Monitor, Outcome, Pair, RunSpec, Store, TrialState
from harness.perf.claims import CLAIMS, Claim, judge
from harness.report.evidence import Run, read_run
from tests.support.recorded_verdicts import verdicts

RUNS = json.loads((Path(__file__).parents[1] / "data" / "h200_runs.json").read_text(encoding="utf-8"))
GPU = "NVIDIA H200 (synthetic data)"
QWEN2_7B = {
    **{"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "vocab_size": 152064},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
}
_UNITS = {"measured_seconds": "seconds", "last_train_loss": "nats"}
_METRICS = ("measured_seconds", "peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes", "last_train_loss")


@dataclass(frozen=True)
class Shape:
    """How an arm differs from the real record it is made of: factors of its seconds and of its peak above the load."""

    backend: str
    source: str
    seconds: float = 1.0
    memory: float = 1.0
    plan: dict[str, Any] = field(default_factory=dict)


_ONE = {"micro_batch": 1, "padding": "longest", "attention": "default", "gradient_checkpointing": "full"}
_FAST = {"micro_batch": 4, "padding": "none", "attention": "flash", "grouping": "tokens"}
_TILED = {**_FAST, "gradient_checkpointing": "offload", "mlp_tile_tokens": 4096, "loss_chunk_gib": 1.0}
ARMS: dict[tuple[str, str], Shape] = {
    ("legacy_256", "legacy"): Shape("legacy", "8k-trl", 2.1, 0.07, _ONE),
    ("legacy_256", "trl"): Shape("trl", "8k-trl", 0.55, 0.05, {**_ONE, "micro_batch": 8}),
    ("legacy_256", "unsloth"): Shape("unsloth", "8k-unsloth", 0.33, 0.16, {**_FAST, "micro_batch": 8}),
    ("genome_8k", "legacy"): Shape("legacy", "8k-trl", 1.7, 1.9, _ONE),
    ("genome_8k", "trl"): Shape("trl", "8k-trl", 1.0, 1.0, {**_ONE, "micro_batch": 4, "grouping": "length"}),
    ("genome_8k", "unsloth"): Shape("unsloth", "8k-unsloth", 1.0, 1.0, _TILED),
    ("genome_full", "legacy"): Shape("legacy", "full-unsloth", 3.3, 6.2, _ONE),
    ("genome_full", "legacy fastest layout"): Shape("legacy", "full-unsloth", 2.6, 8.8, {**_ONE, "micro_batch": 2}),
    ("genome_full", "trl"): Shape("trl", "full-unsloth", 1.9, 2.3, {**_ONE, "grouping": "length"}),
    ("genome_full", "unsloth"): Shape("unsloth", "full-unsloth", 1.0, 0.73, _TILED),
}
_CANDIDATE = ARMS["genome_full", "unsloth"]
ABLATION: dict[str, Shape] = {
    "legacy 1 x 8": Shape("legacy", "full-unsloth", 3.3, 6.2, _ONE),
    "trl 1 x 8: fused loss": Shape("trl", "full-unsloth", 2.7, 2.1, _ONE),
    "unsloth 1 x 8: its kernels": Shape("unsloth", "full-unsloth", 2.6, 0.95, _ONE),
    "+ flash attention below 8,192, loss in chunks": Shape(
        "unsloth", "full-unsloth", 1.6, 0.95, {**_ONE, "attention": "flash"}
    ),
    "+ no padding": Shape("unsloth", "full-unsloth", 1.02, 1.0, {**_FAST, "grouping": "none"}),
    "+ MLP in tiles": Shape("unsloth", "full-unsloth", 1.0, 0.73, _TILED),
}


def _real(source: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The record of a real run and its step log."""
    run = copy.deepcopy(RUNS["runs"][source])
    fields = ("seconds", "documents", "tokens", "loss")
    steps = [{"step": i, **dict(zip(fields, values, strict=True))} for i, values in enumerate(run.pop("steps"), 1)]
    record = copy.deepcopy(RUNS["record"])
    record["environment"] |= run.pop("environment", {})
    return record | run, steps


class Gate:
    """Collects a store and a benchmark JSON. ``write`` makes ``DIR/benchmark.json`` and ``DIR/store``."""

    def __init__(self, directory: Path, seed: int = 7) -> None:
        self.directory = directory
        self.store = Store(directory / "store")
        self.noise = random.Random(seed)
        self.entries: list[dict[str, Any]] = []
        self.runs: dict[str, Run] = {}

    def run(self, shape: Shape, workload: str, status: str = "completed") -> Run:
        """One more run in the store."""
        record, steps = _real(shape.source)
        record["plan"] |= shape.plan
        record.update(backend=shape.backend, model_shape=QWEN2_7B, seed=42)
        description = load_workload(workload).description
        record["workload"].update(
            name=workload, description=description, gate={"num_pairs": 5, "num_steps": 10, "num_warmup_steps": 2}
        )
        record["inputs"].update(num_corpus_examples=489, num_corpus_tokens=633_003, corpus_tokens_squared=4_100_000_000)
        record["environment"]["gpu"]["name"] = GPU
        load = record["memory"][0]["peak_allocated_bytes"]
        for phase in record["memory"]:
            for key in ("peak_allocated_bytes", "peak_reserved_bytes"):
                phase[key] = int(load + max(0, phase[key] - load) * shape.memory) + self.noise.randrange(1 << 20)
        slow = shape.seconds * self.noise.lognormvariate(0, 0.006)
        for step in steps:
            step["seconds"] *= slow * self.noise.lognormvariate(0, 0.01)
            step["tokens_squared"] = int(step["tokens"] ** 2 / step["documents"] * self.noise.uniform(1.5, 2.5))
            step["loss"] += self.noise.gauss(0, 0.002)
        key = sha256_json({"shape": [shape.backend, shape.source, shape.plan], "workload": workload})
        before = 1_400_000_000
        outcome = Outcome(
            run_id=self.store.new_run_id(key),
            key=key,
            key_parts={"code": sha256_json("synthetic"), "gpu": GPU},
            spec=RunSpec(backend=shape.backend, workload=workload),  # type: ignore[arg-type]
            status=status,  # type: ignore[arg-type]
            message=None if status == "completed" else "synthetic: CUDA out of memory",
            exit_code=0 if status == "completed" else 5,
            started_at=f"2026-11-24T{len(self.runs) // 60:02d}:{len(self.runs) % 60:02d}:00+00:00",
            wall_seconds=40 + sum(step["seconds"] for step in steps),
            machine="0123456789abcdef",
            monitor=Monitor(
                num_samples=200,
                device_used_before_bytes=before,
                device_used_peak_bytes=before + record["memory"][-1]["peak_reserved_bytes"] + 600_000_000,
                sm_clock_mhz_median=1965.0,
                sm_clock_mhz_min=1905.0,
                temperature_celsius_max=58.0,
                power_watts_median=431.5,
                num_foreign_processes_max=0,
            ),
            log_tail="",
            record=record if status == "completed" else None,
            steps=steps if status == "completed" else [],
        )
        self.store.append(outcome)
        self.runs[outcome.run_id] = read_run(outcome)
        return self.runs[outcome.run_id]

    def probe(self, module: str, backend: str) -> str:
        """One more probe in the store; returns its key."""
        key = sha256_json([module, backend, "synthetic"])
        content = {"key": key, "key_parts": {"code": sha256_json("synthetic")}, "machine": "0123456789abcdef"}
        content |= {"started_at": "2026-11-24T02:30:00+00:00", "wall_seconds": 95.0}
        write_json(self.store.directory / "probes" / f"{module}-{backend}-{key[:12]}.json", content)
        return key

    def entry(self, name: str, kind: str, samples: Sequence[float] = (0.0,), **info: Any) -> None:
        extra = {"record_kind": kind, "unit": "none", "gpu": GPU, "run_ids": [], **info}
        self.entries.append({"name": name, "fullname": name, "extra_info": extra, "stats": {"data": list(samples)}})

    def metrics(self, workload: str, arm: str, backend: str, runs: Sequence[Run], kind: str = "metric") -> None:
        """An entry for each metric that these runs have."""
        for metric in _METRICS:
            samples = [value for run in runs if (value := run.measure(metric)) is not None]
            named = {"metric": metric, "unit": _UNITS.get(metric, "bytes"), "workload": workload, "arm": arm}
            ids = [run.id for run in runs]
            if len(samples) == len(runs) or metric == _METRICS[0]:
                self.entry(f"{kind}/{workload}/{arm}/{metric}", kind, samples, **named, backend=backend, run_ids=ids)

    def claim(self, claim: Claim, baseline: Sequence[Run], candidate: Sequence[Run], num_planned: int = 5) -> None:
        """The verdict that these pairs earn, and their trial in the store."""
        self.trial(claim.trial, baseline, candidate, num_planned)
        both = [run for pair in zip(baseline, candidate, strict=True) for run in pair]
        complete = [pair for pair in zip(baseline, candidate, strict=True) if all(run.is_complete for run in pair)]
        values = [[run.measure(claim.metric) or 0.0 for run in arm] for arm in zip(*complete, strict=True)] or [[], []]
        verdict = judge(
            claim,
            *values,
            num_pairs_planned=num_planned,
            baseline_statuses=[run.status for run in baseline],
            candidate_statuses=[run.status for run in candidate],
        )
        ids = [run.id for run in both]
        self.entry(f"claim/{claim.name}", "claim", metric=claim.metric, verdict=verdict.to_dict(), run_ids=ids)

    def trial(self, name: str, baseline: Sequence[Run], candidate: Sequence[Run], num_pairs: int = 5) -> None:
        """The trial's state in the store; the pairs' order is not what the report looks at."""
        both = list(zip(baseline, candidate, strict=True))
        ids = [(a.id, b.id) for a, b in both if a.is_complete and b.is_complete]
        pairs = [Pair(index=i, order="AB", baseline=a, candidate=b) for i, (a, b) in enumerate(ids, 1)]
        fixed: dict[str, Any] = {"name": name, "num_pairs": num_pairs, "pairs": pairs}
        for role, runs in (("baseline", baseline), ("candidate", candidate)):
            outcome = runs[0].outcome
            fixed |= {role: outcome.spec, f"{role}_key": outcome.key, f"{role}_parts": outcome.key_parts}
            if failed := [run for run in runs if not run.is_complete]:
                fixed |= {"failure": failed[0].id, "failed_role": role}
        self.store.trial_path(name).parent.mkdir(parents=True, exist_ok=True)
        self.store.write_trial(TrialState(**fixed))

    def write(self, **top: Any) -> Path:
        path = self.directory / "benchmark.json"
        gpu = {"name": GPU, "driver": "580.159.04", "driver_cuda": "13.0", "memory_total_bytes": 150754820096}
        gpu |= {"compute_capability": "9.0", "max_sm_clock_mhz": 1980, "power_limit_watts": 700.0}
        content = {
            "machine_info": {"gpu": gpu, "torch": "2.11.0", "python": "3.12.3", "system": "Linux", "machine": "x86_64"},
            "commit_info": {"id": "0" * 40, "dirty": False},
            "benchmarks": self.entries,
            "datetime": "2026-11-24T03:00:00+00:00",
            "version": "5.3.1",
        }
        path.write_text(json.dumps({**content, **top}, indent=2), encoding="utf-8")
        return path


def whole_gate(directory: Path) -> Gate:
    """Everything a gate leaves: five pairs per trial, the arms beside them, ablation, context. Not yet written."""
    gate = Gate(directory)
    runs: dict[tuple[str, str], list[Run]] = {}
    trials = {"legacy_256": "legacy_256", "genome_full": "genome_full", "control_aa": "legacy_256"}
    pairs: dict[str, tuple[list[Run], list[Run]]] = {}
    for trial, workload in trials.items():
        other = "legacy" if trial == "control_aa" else "unsloth"
        arms = (ARMS[workload, "legacy"], ARMS[workload, other])
        measured = [[gate.run(shape, workload) for shape in arms] for _ in range(5)]
        pairs[trial] = ([pair[0] for pair in measured], [pair[1] for pair in measured])
        if trial != "control_aa":
            runs[workload, "legacy"], runs[workload, "unsloth"] = pairs[trial]
    for (workload, arm), shape in ARMS.items():
        if (workload, arm) not in runs:
            runs[workload, arm] = [gate.run(shape, workload)]
        gate.metrics(workload, arm, shape.backend, runs[workload, arm])
    for claim in CLAIMS:
        gate.claim(claim, *pairs[claim.trial])
    beside = [gate.run(shape, "genome_full") for shape in (ARMS["genome_full", "legacy fastest layout"], _CANDIDATE)]
    gate.trial("genome_full_fastest_legacy", beside[:1], beside[1:], num_pairs=1)
    for change, shape in ABLATION.items():
        gate.metrics("genome_full", change, shape.backend, [gate.run(shape, "genome_full")], kind="ablation")
    per_token = {"legacy": 2_200_000, "trl": 640_000, "unsloth": 240_000}
    for backend, size in per_token.items():
        points = [[tokens, 5_700_000_000 + size * tokens] for tokens in (2048, 8192, 16384, 32768)]
        probe = gate.probe("max_context", backend)
        for budget in (8.0, 24.0, 80.0):
            longest = int((budget * 2**30 - 5_700_000_000) / size)
            context = {
                "backend": backend,
                "budget_gib": budget,
                "predicted_tokens": longest,
                "points": points,
                "probe": probe,
            }
            context["is_embedding_on_host"] = (backend, budget) == ("unsloth", 8.0)
            fits, fails = longest // 256 * 256, longest // 256 * 256 + 512
            gate.entry(f"context/{backend}/{budget:g}", "max_context", **context, tokens_fits=fits, tokens_fails=fails)
    speeds = {"legacy": 9.1e13, "trl": 1.6e14, "unsloth": 3.0e14}
    shares = {backend: speed / 7.9e14 for backend, speed in speeds.items()}
    facts = {"tflops": 790.0, "model_flops_per_second": speeds, "utilisation": shares}
    firsts = [runs["genome_full", backend][0].id for backend in speeds]
    probe = gate.probe("matmul_peak", "unsloth")
    gate.entry("matmul_peak", "matmul_peak", workload="genome_full", probe=probe, run_ids=firsts, **facts)
    gate.entry(
        "not_run/fp16", "not_run", what="fp16 in the legacy arm", reason="its gradient scaler refuses bfloat16 adapters"
    )
    for kind, name, info in verdicts():
        if kind == "reliability":
            info["probe"] = gate.probe("survival", info["backend"])
        gate.entry(f"{kind}/{name}", kind, metric=name, **info)
    return gate
