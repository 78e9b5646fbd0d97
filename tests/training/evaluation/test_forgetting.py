"""Claims about forgetting: the loss on general text before and after, the same for every run, and shown again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from forge.training.data.conversation import IGNORED, Encoder
from forge.training.data.examples import Examples
from forge.training.evaluation import forgetting
from forge.training.evaluation.evaluate import evaluate_run, print_evaluation, shown_evaluation
from forge.training.evaluation.forgetting import general_examples, read_passages
from forge.training.evaluation.record import Evaluation
from forge.training.models.tokenizers import load_tokenizer
from forge.training.system.environment import ROOT
from forge.training.system.errors import DataError
from forge.training.train.record import read_record
from tests.support.run_command import run
from tests.support.tiny_model import shared_base
from tests.support.tiny_run import edit_json, made_up_run

FACT = {"question": "Who counts the ships?", "answer": "the keeper"}


def asking_run(directory: Path, **evaluation: Any) -> Path:
    """A completed run that held nothing out, asks for one fact, and whose adapter changes the base."""
    return made_up_run(directory, evaluation={"facts": [FACT], "max_new_tokens": 4} | evaluation)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    run_dir = asking_run(tmp_path_factory.mktemp("forgetting") / "run")
    return run_dir, evaluate_run(run_dir, device="cpu")


@pytest.fixture
def run_dir(measured: tuple[Path, Evaluation], tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured[0], tmp_path / "run"))


def test_every_passage_asks_something_and_no_document_of_the_demo_holds_it() -> None:
    passages = read_passages()
    assert len(passages) >= 10
    demo = [path.read_text(encoding="utf-8").casefold() for path in (ROOT / "forge/workloads/demo").rglob("*.md")]
    for name, (question, answer) in passages.items():
        assert question.endswith((".", "?")), name
        assert 100 < len(answer.split()) < 250, name
        assert not any(question.casefold() in text for text in demo), name


def test_the_whole_answer_is_counted_in_parts_if_it_must_be_and_under_its_passages_name() -> None:
    tokenizer = load_tokenizer(shared_base())
    for system in (None, "Be brief."):
        examples = general_examples(Encoder(tokenizer), system, 256)
        assert max(len(ids) for ids in examples.input_ids) <= 256
        for name, (_, answer) in read_passages().items():
            parts = [i for i, each in enumerate(examples.document_ids) if each.partition(" part ")[0] == name]
            assert len(parts) > 1  # a small vocabulary
            text = "".join(
                tokenizer.decode([i for i in examples.labels[part].tolist() if i != IGNORED], skip_special_tokens=True)
                for part in parts
            )
            assert "".join(text.split()) == "".join(answer.split())


def own_nats(model: Any, examples: Examples, name: str) -> float:
    import torch

    total = 0.0
    for each, ids, labels in zip(examples.document_ids, examples.input_ids, examples.labels, strict=True):
        if each.partition(" part ")[0] != name:
            continue
        rows = (torch.from_numpy(row.astype(np.int64))[None] for row in (ids, labels))
        with torch.no_grad():
            loss = model(**dict(zip(("input_ids", "labels"), rows, strict=True))).loss
        total += float(loss) * int((labels[1:] != IGNORED).sum())
    return total


def test_the_loss_is_that_of_transformers_and_the_change_is_paired_by_passage(
    measured: tuple[Path, Evaluation],
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run_dir, evaluation = measured
    system = read_record(run_dir).workload["data"]["system_prompt"]
    assert system  # it is asked as the model will be
    examples = general_examples(Encoder(load_tokenizer(shared_base())), system, 512)
    base = AutoModelForCausalLM.from_pretrained(shared_base(), dtype=torch.float32)
    row = next(row for row in evaluation.general_text if row.document == "tides")
    assert row.nats["base"] == pytest.approx(own_nats(base, examples, "tides"), rel=1e-5)
    adapted = PeftModel.from_pretrained(base, str(run_dir / "adapter")).eval()
    assert row.nats["adapter"] == pytest.approx(own_nats(adapted, examples, "tides"), rel=1e-5)
    assert row.nats["adapter"] != pytest.approx(row.nats["base"], rel=1e-5)
    losses = {s.subject: s.general_nats_per_token for s in evaluation.subjects}
    pair = next(p for p in evaluation.general_comparisons if (p.subject, p.reference) == ("adapter", "base"))
    assert pair.difference_nats_per_token == pytest.approx(losses["adapter"] - losses["base"])  # type: ignore[operator]
    assert pair.num_documents == len(read_passages())
    assert pair.standard_error_nats_per_token is not None


def printed(evaluation: Evaluation, width: int) -> str:
    console = Console(record=True, width=width, file=open(os.devnull, "w"))  # noqa: SIM115
    print_evaluation(evaluation, console)
    return console.export_text()


@pytest.mark.parametrize("width", [60, 100])
def test_it_is_printed_with_its_change_at_any_width(measured: tuple[Path, Evaluation], width: int) -> None:
    text = printed(measured[1], width)
    figures = [f"{s.general_nats_per_token:.4f}" for s in measured[1].subjects]
    assert any(line.split() == ["general", "text,", "nats", "per", "token", *figures] for line in text.splitlines())
    assert "facts, exact match" in text
    assert "on general text, adapter minus base:" in " ".join(text.split())


def test_it_can_be_left_out(tmp_path: Path) -> None:
    run_dir = asking_run(tmp_path / "run", forgetting=False)
    found = evaluate_run(run_dir, subjects=("base",), device="cpu")
    assert (found.general_text, found.general_comparisons) == ([], [])
    assert found.subjects[0].general_nats_per_token is None
    assert "general text" not in printed(found, 100)


def test_losses_on_other_passages_are_not_taken_for_these(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "read_passages", lambda: {"tides": ("Why?", "Because.")})
    with pytest.raises(DataError, match="questions sha256"):
        evaluate_run(run_dir, device="cpu")


def test_what_was_measured_is_shown_again_without_the_base(
    run_dir: Path, measured: tuple[Path, Evaluation], tmp_path: Path
) -> None:
    edit_json(run_dir / "run.json", base_path=str(run_dir / "gone"))
    assert shown_evaluation(run_dir) == measured[1]
    before = (run_dir / "evaluation.json").read_bytes()
    done = run(["evaluate", run_dir, "--show", "--json"], tmp_path)
    assert (done.returncode, json.loads(done.stdout)) == (0, json.loads(before))
    shown = run(["evaluate", run_dir, "--show"], tmp_path)
    assert "general text, nats per token" in shown.stdout
    assert (run_dir / "evaluation.json").read_bytes() == before


def test_nothing_is_shown_of_another_adapter_or_of_a_run_that_was_not_evaluated(run_dir: Path) -> None:
    edit_json(run_dir / "evaluation.json", adapter_sha256="0" * 64)
    with pytest.raises(DataError, match="of another adapter than this run's"):
        shown_evaluation(run_dir)
    (run_dir / "evaluation.json").unlink()
    with pytest.raises(DataError, match="was not evaluated yet"):
        shown_evaluation(run_dir)


def test_a_file_of_before_is_still_read(run_dir: Path) -> None:
    content = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    for name in ("general_text", "general_comparisons"):
        del content[name]
    for row in content["subjects"]:
        for name in ("general_nats_per_token", "facts_exact_match", "facts_rouge_l"):
            del row[name]
    (run_dir / "evaluation.json").write_text(json.dumps(content | {"schema_version": 1}), encoding="utf-8")
    assert "general text" not in printed(shown_evaluation(run_dir), 100)
