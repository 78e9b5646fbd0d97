"""A run's directory with all that its page shows, made up: no training, no export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forge.training.evaluation.record import (
    DocumentAnswer,
    DocumentResult,
    Evaluation,
    FactAnswer,
    SubjectResult,
    compare,
)
from forge.training.train.record import read_record
from tests.support.tiny_run import edit_json, made_up_run

QUESTION = "How many ships passed?"
HELD_OUT = [(20, 3.5), (40, 2.75), (60, 2.875)]  # step, nats per token: the second is the best


def evaluated(adapter_sha256: str | None) -> Evaluation:
    """Base and adapter on two documents, one answer each to the fact's question and to a document."""
    documents = [
        DocumentResult(document=f"line {n}", num_tokens=100, num_bytes=400, nats={"base": 400.0, "adapter": 275.0 + n})
        for n in (1, 2)
    ]
    passages = [
        DocumentResult(document=name, num_tokens=80, num_bytes=320, nats={"base": 240.0, "adapter": 260.0})
        for name in ("bread", "tides")
    ]
    answers = {"base": "I do not know.", "adapter": "There were 48 of them."}
    return Evaluation(
        subjects=[
            SubjectResult(subject="base", nats_per_token=4.0, general_nats_per_token=3.0, num_facts_found=0, seconds=1),
            SubjectResult(
                subject="adapter", nats_per_token=2.765, general_nats_per_token=3.25, num_facts_found=1, seconds=1
            ),
        ],
        comparisons=[compare(documents, "adapter", "base")],
        num_documents=2,
        num_tokens=200,
        num_bytes=800,
        documents=documents,
        general_text=passages,
        general_comparisons=[compare(passages, "adapter", "base")],
        answers=[DocumentAnswer(subject=s, document="line 1", answer=a, reference="# Log") for s, a in answers.items()],
        facts=[
            FactAnswer(subject=s, question=QUESTION, expected="48", answer=a, found="48" in a)
            for s, a in answers.items()
        ],
        base_sha256="b" * 64,
        adapter_sha256=str(adapter_sha256),
        device="cpu",
        dtype="float32",
    )


def logged(num_steps: int = 60) -> list[dict[str, Any]]:
    """The step log of a run whose loss falls, with held-out losses and a sample answer at each."""
    rows: list[dict[str, Any]] = []
    held_out = dict(HELD_OUT)
    for step in range(1, num_steps + 1):
        rows.append({"step": step, "loss": 2.0 + 3.0 / step, "seconds": 0.5, "tokens": 400, "documents": 4})
        if step in held_out:
            rows.append({"step": step, "validation_loss": held_out[step]})
            rows.append({"step": step, "question": QUESTION, "answer": f"After {step}: 48 ships."})
    return rows


def whole_run(run_dir: Path) -> Path:
    """Trained, evaluated, exported and asked, by its files."""
    facts = {"facts": [{"question": QUESTION, "answer": "48"}]}
    made_up_run(run_dir, evaluation=facts, data={"train": "/home/of-mine/corpus.train.jsonl"})
    edit_json(run_dir / "run.json", losses={"first_train_loss": 4.5, "last_train_loss": 2.05})
    (run_dir / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged()), encoding="utf-8")
    digest = read_record(run_dir).adapter_sha256
    (run_dir / "evaluation.json").write_text(evaluated(digest).model_dump_json(), encoding="utf-8")
    name = "lighthouse.q4_k_m.gguf"
    export = {
        **{"model": "lighthouse", "adapter_sha256": digest, "modelfile_uses": name},
        "files": [{"name": name, "num_bytes": 4_683_000_000, "sha256": "9" * 64}],
    }
    (run_dir / "export").mkdir()
    (run_dir / "export" / "export.json").write_text(json.dumps(export), encoding="utf-8")
    answers = [{"model": name, "question": QUESTION, "answer": "48 ships, says the log.", "found": True}]
    (run_dir / "outcome.json").write_text(json.dumps({"answers": answers}), encoding="utf-8")
    return run_dir
