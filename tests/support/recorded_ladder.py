"""A parity ladder on recorded trajectories and invented evaluations: its rungs 4 to 6 without any training.

``parity_trajectories.json`` has real runs of 100 steps (trl, the tiny base in bfloat16, effective batch 8, dropout 0):
nine layouts of a sound run, and runs with the faults of tests/support/faults.py. The file says how it was made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forge.training.system.environment import ROOT
from harness.measurement.key import identify
from harness.measurement.results import Outcome, RunSpec, Store
from harness.parity.claims import verdict_on
from harness.parity.session import Ladder
from harness.parity.simulation import Recorded
from harness.session import Session
from tests.support.records import make_record

RECORDED = ROOT / "tests" / "data" / "parity_trajectories.json"
LAYOUTS: Sequence[tuple[str, ...]] = (
    *((), ("micro_batch=4",), ("micro_batch=2",), ("micro_batch=1",), ("micro_batch=4", "grouping=length")),
    *(("micro_batch=2", "grouping=length"), ("micro_batch=4", "grouping=tokens"), ("micro_batch=2", "grouping=tokens")),
)


def write_corpus(path: Path) -> Path:
    """Documents enough for the ladder, every one twice."""
    rows = [{"instruction": f"Recite {i}.", "input": "", "output": f"Ship {i} came by night. " * 9} for i in range(230)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows]))
    return path


class Runs:
    """Takes the place of ``run_once``: recorded trajectories, invented evaluations.

    ``candidate``: "sound", or the fault that its runs have. ``held_out``: nats per token by backend and seed.
    ``faults``: by backend the status of its runs, by "control" that of the run with a planted fault; "recites": whether
    the candidate knows the fact; "stock": how much worse the stock baseline is; "rate of X", "dtype of X".
    """

    def __init__(self, recorded: Recorded, *, candidate: str = "sound", held_out: Any = None, **faults: Any) -> None:
        self.sound = list(recorded.sound.values())
        self.faulty = recorded.faulty
        self.candidate = candidate
        self.held_out = held_out or (lambda backend, seed: 3.0 + 0.0005 * math.sin(seed * 7 + len(backend)))
        self.faults = faults
        self.num_started = 0

    def __call__(self, spec: RunSpec, *, store: Store, time_limit_seconds: float, is_alone: bool = True) -> Outcome:
        self.num_started += 1
        settings = dict(setting.split("=", 1) for setting in spec.overrides)
        seed, is_candidate = int(settings["training.seed"]), spec.backend == "unsloth"
        is_control = "optimizer.learning_rate" in settings
        if is_control:
            losses, norms = self.faulty["learning-rate"]
        elif is_candidate:
            losses, norms = self.sound[8] if self.candidate == "sound" else self.faulty[self.candidate]
        else:
            layout = LAYOUTS.index(spec.plan_overrides) if spec.plan_overrides in LAYOUTS else 0
            losses, norms = self.sound[layout]
        digests = ["d" * 64] * len(losses)
        steps = [
            {"step": n, "seconds": 1.0, "documents": 8, "tokens": 400, "trained_tokens": 100, "loss": float(loss)}
            | {"grad_norm": float(np.exp(norm)), "learning_rate": self.rate(spec.backend, n)}
            for n, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
        ]
        identity = identify(spec)
        status = self.faults.get("control" if is_control else spec.backend, "completed")
        record = make_record(backend=spec.backend, seed=seed, num_steps=len(losses), batch_digests=digests)
        kept = "float32" if is_candidate or spec.float32_adapter else "bfloat16"
        record.trainable.dtype = self.faults.get(f"dtype of {spec.backend}", kept)
        outcome = Outcome(
            run_id=store.new_run_id(identity.key),
            key=identity.key,
            key_parts=identity.parts,
            spec=spec.portable(),
            status=status,
            exit_code=0,
            started_at="2026-11-24T12:00:00+00:00",
            wall_seconds=1.0,
            machine="0" * 16,
            monitor={},  # type: ignore[arg-type]
            log_tail="",
            record=record.model_dump(mode="json"),
            steps=steps,
            evaluation=self.evaluation(spec, seed) if spec.evaluate and status == "completed" else None,
        )
        store.append(outcome)
        return outcome

    def rate(self, backend: str, step: int) -> float:
        return 0.002 / step * self.faults.get(f"rate of {backend}", 1.0)

    def evaluation(self, spec: RunSpec, seed: int) -> dict[str, Any]:
        is_stock = spec.backend != "unsloth" and not spec.float32_adapter
        loss = self.held_out(spec.backend, seed) + is_stock * self.faults.get("stock", 0.02)
        recites = spec.backend != "unsloth" or self.faults.get("recites", True)
        nats = [{"base": 400.0, "adapter": 100 * loss}, {"base": 1600.0, "adapter": 400 * loss}]
        return {
            "subjects": [
                {"subject": name, "nats_per_token": value, "rouge_l": 0.1}
                for name, value in (("base", 4.0), ("adapter", loss))
            ],
            "documents": [
                {"document": f"d{i}", "num_tokens": n, "nats": row}
                for i, (n, row) in enumerate(zip((100, 400), nats, strict=True))
            ],
            "facts": [
                {"subject": "base", "question": "?", "found": False},
                {"subject": "adapter", "question": "?", "found": recites},
            ],
            **{"base_sha256": "b", "validation_examples_sha256": "v", "device": "cuda", "dtype": "bfloat16"},
        }


def make_ladder(where: Path, corpus: Path, runs: Runs, *, below: int = 4, **session: Any) -> Ladder:
    """A ladder whose rungs below ``below`` have passed."""
    (where / "base").mkdir(parents=True, exist_ok=True)
    ladder = Ladder(
        Session(store=Store(where / "store"), train=corpus, run_one=runs, **session),
        base=str(where / "base"),
        baseline="trl",
        layouts=tuple(LAYOUTS),
    )
    ladder.verdicts = {number: verdict_on(number, "PASS", "not of this test") for number in range(1, below)}
    return ladder
