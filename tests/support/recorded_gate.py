"""A synthetic gate's store and benchmark JSON: plausible numbers, none of them measured.

The runs are real ones (tests/data/h200_runs.json), scaled to what other arms might show and varied by seeded noise;
the GPU's name says that they are synthetic. The verdicts are of the real classes and judges.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forge.training.config.workload import load_workload
from forge.training.system.files import sha256_json, write_json
from harness.export import claims as export
from harness.measurement.results import Monitor, Outcome, Pair, RunSpec, Store, TrialState
from harness.parity.suite import BASELINE, CANDIDATE
from harness.perf.claims import CLAIMS, Claim, judge
from harness.report.evidence import Run, read_run
from harness.report.verdicts import EXPECTED
from tests.support.export_answers import divergence_answer

RUNS = json.loads((Path(__file__).parents[1] / "data" / "h200_runs.json").read_text(encoding="utf-8"))
CLAIM = {claim.name: claim for claim in CLAIMS}
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


def small_gate(directory: Path, *, pairs: int = 2, planned: int = 2, **changes: Any) -> Gate:
    """One trial, ``genome_full``; ``changes`` are the candidate's."""
    gate = Gate(directory)
    candidate = replace(ARMS["genome_full", "unsloth"], **changes)
    runs = [
        [gate.run(shape, "genome_full") for shape in (ARMS["genome_full", "legacy"], candidate)] for _ in range(pairs)
    ]
    baseline, fast = [pair[0] for pair in runs], [pair[1] for pair in runs]
    gate.metrics("genome_full", "legacy", "legacy", baseline)
    gate.metrics("genome_full", "unsloth", "unsloth", fast)
    gate.claim(CLAIM["genome_full_speed"], baseline, fast, planned)
    return gate


Info = tuple[str, str, dict[str, Any]]  # kind, metric, what else the entry holds
_STEP = "step_begin substep_end pre_optimizer_step optimizer_step step_end log"
_SAME = {"identical": True, "largest": 0.0, "relative": 0.0, "largest_loss": 0.0, "first_different_step": None}
_RESUMED = {"difference": _SAME, "resumed_from_step": 10, "num_steps": 40, "same_labels": True}
_SMALL = {"noise": _SAME, "killed": _RESUMED, "stopped": _RESUMED, "events": [_STEP, f"{_STEP} evaluate save"]}
_LARGE = {"stop_seconds": 5.25, "state": "interrupted", "checkpoint_problem": None, "checkpoint_bytes": 162_000_000}
_TIGHT = {
    **{"cap_gib": 8.0, "micro_batch": 2, "resumes": [{"after": "out_of_memory"}], "num_steps": 4},
    **{"num_planned_steps": 4, "documents": [8, 8, 8, 8]},
}
ANSWERS: dict[str, dict[str, Any]] = {"resume": _SMALL, "callbacks": _SMALL, "stop": _LARGE, "memory": _TIGHT}
_EXPORT_STEPS = [{"name": "merge", "seconds": 36.2, "num_bytes": 15 << 30, "peak_rss_bytes": 9 << 30}]


def verdicts() -> Iterator[Info]:
    """Parity, export and reliability of a whole gate: each verdict there must be, once, and a PASS."""
    judged = ("merged_against_adapter", "chain", *(f"divergence_{kind}" for kind in export.KINDS))
    exported = {claim.name: claim for claim in export.CLAIMS if claim.name in judged}
    divergence = _divergence()
    arms = {"workload": "parity", "arm": CANDIDATE, "backend": CANDIDATE, "baseline": BASELINE}
    for kind in ("parity", "export", "reliability"):
        for missing in EXPECTED[kind]:
            name, _, backend = missing.name.rpartition("_")
            measured = ANSWERS.get(name, {})
            if kind == "export":
                claim = exported.get(missing.name)
                measured = claim.verdict(divergence).figures if claim else {}
            passed = {"status": "PASS", "reason": "synthetic data", "figures": {**missing.figures, **measured}}
            info = {**arms, "backend": backend} if kind == "reliability" else arms
            yield kind, missing.name, {**info, "verdict": missing.model_copy(update=passed).to_dict()}
    yield "export", "export_seconds", {"workload": "legacy_256", "backend": CANDIDATE, "steps": _EXPORT_STEPS}


def _divergence() -> dict[str, Any]:
    answer = divergence_answer(0.0, 1e-5, num_documents=32)
    answer["held_out"]["num_tokens"] = 8192
    shift = {"shift_nats_per_token": 0.0125, "standard_error_nats_per_token": 0.001}
    answer["four_bit"] = {"nats_per_token": 2.51, **shift}
    for pair, mean in zip(answer["pairs"], (0.8, 2e-5, 4e-7, 3e-4, 0.02), strict=True):
        pair |= {"mean_kl_nats": mean, "standard_error_nats": mean / 50, "same_top_share": 0.9871}
    losses = (3.41, 2.52, 2.5201, 2.5201, 2.5204, 2.533)
    for row, loss, before in zip(answer["chain"], losses, (None, *losses), strict=False):
        change = None if before is None else loss - before
        error = None if change is None else abs(change) / 20 + 1e-5
        row |= {"nats_per_token": loss, "change_nats_per_token": change, "standard_error_nats_per_token": error}
    return answer
