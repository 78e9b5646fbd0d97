"""A run's directory: made up around the tiny adapter without training, or really trained for 24 steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from forge.training.config.workload import Workload
from forge.training.system.files import sha256_file
from forge.training.train.record import RunRecord
from tests.support.records import make_record
from tests.support.tiny_model import SENTENCES, shared_adapter, shared_base, write_base

NUM_STEPS = 24
SAVE_EVERY, EVALUATE_EVERY = 5, 8


def write_run(run_dir: Path, base_dir: Path, **workload: Any) -> RunRecord:
    """Write ``run.json`` for the adapter in ``run_dir/adapter``, trained (so it says) on ``base_dir``."""
    from forge.training.models.digests import base_sha256, tokenizer_sha256

    adapter = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    lora = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules", "use_rslora": "use_rslora"}
    parsed = Workload.model_validate(
        {
            "name": "lighthouse",
            "data": {"documents": "embedded", "system_prompt": 'You keep a "lighthouse".'},
            "lora": {ours: adapter[theirs] for ours, theirs in lora.items()},
            "export": {"parameters": {"temperature": 0.2, "num_ctx": 512}},
        }
        | workload
    )
    digests = {"base_sha256": base_sha256(base_dir), "tokenizer_sha256": tokenizer_sha256(base_dir)}
    digests |= {"corpus_sha256": "c" * 64, "train_examples_sha256": "e" * 64}
    record = make_record(
        num_steps=7,
        num_planned_steps=7,
        workload=parsed.model_dump(mode="json"),
        workload_sha256=parsed.digest(),
        base_path=str(base_dir),
        inputs={**digests, "num_validation_examples": 3},
        timing={"train_seconds": 12.5, "tokens_per_second": 987.0},
        environment={"packages": {"torch": "2.13.0", "secret-tool": "1"}, "cwd": str(run_dir.absolute())},
        memory=[{"phase": "train", "peak_allocated_bytes": 3 << 30, "peak_reserved_bytes": 4 << 30}],
        adapter_sha256=sha256_file(run_dir / "adapter" / "adapter_model.safetensors"),
    )
    record.write(run_dir)
    return record


def made_up_run(run_dir: Path, **workload: Any) -> Path:
    """A completed run of the shared adapter on the shared base."""
    shutil.copytree(shared_adapter(), run_dir / "adapter")
    write_run(run_dir, shared_base(), **workload)
    return run_dir


def add_training_examples(run_dir: Path, base_dir: Path) -> None:
    """The sentences that the base was made of, as what a made-up run was trained on."""
    from forge.training.data.conversation import load_encoder
    from forge.training.data.examples import encode_records, save_examples
    from forge.training.data.records import Message, Record

    talks = [(Message("user", f"Recite {i}"), Message("assistant", text)) for i, text in enumerate(SENTENCES)]
    records = [Record(line=i + 1, messages=talk, document=True) for i, talk in enumerate(talks)]
    data = Workload.model_validate(record(run_dir)["workload"]).data
    examples = encode_records(records, load_encoder(base_dir), data)
    save_examples(examples, run_dir / "examples" / "train")
    inputs = record(run_dir)["inputs"] | {"train_examples_sha256": examples.sha256}
    edit_json(run_dir / "run.json", inputs=inputs)


def edit_json(path: Path, **fields: object) -> None:
    """Replace some fields of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def write_inputs(folder: Path) -> None:
    """What :func:`arguments` trains on: a tiny base, 20 documents, and 4 held out."""
    write_base(folder / "base", tied=False, hidden_size=64, intermediate_size=128, num_steps=0)
    rows = [
        {"instruction": f"Recite `{i}.md`", "input": "", "output": f"# {i}\n" + "It counts ships. " * (1 + i % 7)}
        for i in range(24)
    ]
    for name, part in (("train", rows[:20]), ("validation", rows[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part), encoding="utf-8")


def settings(folder: Path) -> list[str]:
    """``--set KEY=VALUE ...`` for a run on them; dropout is on, so the random state matters."""
    values = {
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
        "export.quantizations": "[f16]",  # its rows are too short for k-quants
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    """The command line that trains on them into ``out``, without asking what `check` would say."""
    return ["train", "smoke", "--backend", "trl", *settings(folder), "-o", str(out), "--no-check", *more]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The step log, of whole lines: a kill cuts the last one short."""
    texts = (run_dir / "steps.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(text) for text in texts if text.endswith("\n")]


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
