"""A tiny training run for tests: a base of half a million parameters, 24 short documents, 24 steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny_model import write_base

NUM_STEPS = 24
SAVE_EVERY, EVALUATE_EVERY = 5, 8


def write_inputs(folder: Path) -> None:
    """The base and the documents, 20 to train on and 4 held out."""
    write_base(folder / "base", tied=False)
    rows = [
        {"instruction": f"Recite `{i}.md`", "input": "", "output": f"# {i}\n" + "It counts ships. " * (1 + i % 7)}
        for i in range(24)
    ]
    for name, part in (("train", rows[:20]), ("validation", rows[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part), encoding="utf-8")


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    """The command line that trains on them into ``out``; dropout is on, so the random state matters."""
    settings = {
        "model.path": folder / "base",
        "data.train": folder / "train.jsonl",
        "data.validation": folder / "validation.jsonl",
        "data.max_length": 128,
        "lora.rank": 4,
        "lora.dropout": 0.1,
        "training.max_steps": NUM_STEPS,
        "training.evaluate_every_steps": EVALUATE_EVERY,
        "training.save_every_steps": SAVE_EVERY,
        "report_to": "[]",
    }
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["train", "smoke", "--backend", "trl", *given, "-o", str(out), *more]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The step log."""
    return [json.loads(text) for text in (run_dir / "steps.jsonl").read_text().splitlines()]


def adapter(run_dir: Path) -> bytes:
    """The finished adapter's weights."""
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def record(run_dir: Path) -> dict[str, Any]:
    """``run.json``."""
    content: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return content


def status(run_dir: Path) -> dict[str, Any]:
    """``status.json``."""
    content: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return content
