"""First steps of tiny bases, measured in this process for rungs 1 to 3 of the parity ladder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.parity.first_step.checks import Check, direction_check, first_step_checks, layout_checks
from harness.parity.first_step.compare import MeasuredStep, read_step
from harness.parity.probes import first_step
from harness.parity.probes.architecture import write_architecture
from tests.support.tiny_model import write_base

PACKED, PADDED = "none", "longest"
BF16 = "model.dtype=bfloat16"


def overrides(base: Path, train: Path, *more: str) -> list[str]:
    settings = {
        "model.path": base,
        "data.train": train,
        "data.validation_share": 0,
        "data.max_length": 160,
        "lora.rank": 4,
        "lora.alpha": 8,
    }
    return [*(f"{key}={value}" for key, value in settings.items()), "training.max_steps=20", *more]


class Bench:
    """Measures first steps of one base in this process, each once."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.folder, self.base = folder, folder / architecture
        self.taken: dict[Any, MeasuredStep] = {}

    def take(
        self,
        backend: str,
        layout: str = "8x1",
        padding: str = PADDED,
        fault: str | None = None,
        more: str = "seed=42",
        *,
        plan: tuple[str, ...] = (),
        dropout: float = 0.0,
    ) -> MeasuredStep:
        """Only micro-batches of all eight are looked at for leaks, to save time, and none with dropout."""
        key = (backend, layout, padding, fault, more, plan, dropout)
        if key not in self.taken:
            settings = [f"training.{more}" if more.startswith("seed") else more, f"lora.dropout={dropout}"]
            settings = overrides(self.base, self.folder / "train.jsonl", *settings)
            workload = first_step.frozen_workload("smoke", settings, dropout=dropout > 0)
            changes = [f"micro_batch={first_step.LAYOUTS[layout]}", f"padding={padding}", *plan]
            leaks = layout == "8x1" and not dropout
            tensors, facts = first_step.measure(
                workload, backend, changes, fault=fault, looks_for_leaks=leaks, num_positions=3
            )
            path = self.folder / f"{self.base.name}-{len(self.taken)}.safetensors"
            first_step.write(tensors, {**facts, "layout": f"{layout} ({', '.join(plan)})" if plan else layout}, path)
            self.taken[key] = read_step(path)
        return self.taken[key]

    def inputs(self, fault: str | None = None, *more: str) -> dict[str, Any]:
        """What rung 1 compares, of the workload as it is; dropout 0.05."""
        settings = overrides(self.base, self.folder / "train.jsonl", "lora.dropout=0.05", *more)
        workload = first_step.frozen_workload("smoke", settings, inputs_only=True)
        return first_step.measure(workload, "trl", [], fault=fault, inputs_only=True)[1]

    def rung_2(self, candidate: MeasuredStep, more: str = "seed=42") -> list[str]:
        reference, baseline = self.take("reference", more=more), self.take("trl", "1x8", more=more)
        return missed([direction_check(reference, baseline), *first_step_checks(reference, baseline, candidate)])

    def rung_3(self, *layouts: MeasuredStep, more: str = "seed=42") -> list[str]:
        return missed(layout_checks(self.take("reference", more=more), self.take("trl", "1x8", more=more), [*layouts]))


def write_bases(folder: Path) -> Path:
    """Documents and a base in each architecture."""
    rows = [
        {"instruction": f"Recite `{i}.md`", "input": "", "output": "It counts the ships at night. " * (1 + i * i // 8)}
        for i in range(10)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_base(folder / "qwen2", tied=False, dtype="float32", hidden_size=64, intermediate_size=128, num_steps=20)
    for architecture in ("llama", "qwen3"):
        write_architecture(folder / "qwen2", folder / architecture, architecture)
    return folder


def missed(checks: list[Check]) -> list[str]:
    return [check.sentence() for check in checks if not check.holds]
