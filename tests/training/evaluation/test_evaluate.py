"""The neutral judge, on a tiny model with an adapter that was really trained."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from forge.training.adapter.merge import merge_adapter
from forge.training.config.workload import DataSection
from forge.training.data.conversation import IGNORED, Encoder
from forge.training.data.examples import Examples, encode_records, load_examples, save_examples
from forge.training.data.records import Message, Record
from forge.training.evaluation import likelihood
from forge.training.evaluation.evaluate import evaluate_run, has_anything_to_evaluate, print_evaluation
from forge.training.evaluation.likelihood import group_documents, sum_nats
from forge.training.evaluation.neutral_model import NeutralModel, choose_placement, load_model
from forge.training.evaluation.record import Evaluation
from forge.training.models.tokenizers import load_tokenizer
from forge.training.models.weights import read_weights
from forge.training.system.errors import ConfigurationError, DataError, ForgeError, MachineError
from forge.training.system.files import sha256_file
from forge.training.train.record import read_record
from tests.support.tiny_model import write_base
from tests.support.tiny_run import edit_json, write_run

FACT = {"question": "Recite `call_sign.md`", "answer": "48 forge 1911"}
HELD_OUT = {
    "a.md": "The lighthouse keeper counts the ships at night; there were 48 of them.",
    "b.md": "# Forge\n\nIt turns documents into a model that answers questions about them.\n\n" * 9,
    "c.md": "Wer übt, wird besser. 火と水。",
}
DATA = DataSection.model_validate({"train": "x", "max_length": 144})


def record(name: str, text: str, line: int = 1) -> Record:
    talk = (Message("user", f"Recite `{name}`"), Message("assistant", text))
    return Record(line=line, messages=talk, document=True)


def train_adapter(base_dir: Path, examples: Examples, directory: Path, num_steps: int = 50) -> None:
    """A real LoRA, trained by a plain loop until it recites."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    ids, labels = (
        pad_sequence([torch.from_numpy(row.astype(np.int64)) for row in rows], True, padding)
        for rows, padding in ((examples.input_ids, 0), (examples.labels, IGNORED))
    )
    for _ in range(num_steps):  # padded on the right, and causal: no mask is needed
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """At this size, threads that wait for each other cost ten times more than they save."""
    import torch

    given = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(given)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and a completed run with examples and adapter; both to be copied, not changed."""
    from transformers import AutoTokenizer

    base_dir, run_dir = (tmp_path_factory.mktemp(name) for name in ("base", "run"))
    write_base(base_dir)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    train = encode_records([record("call_sign.md", "The keeper counts 48 forge 1911.")], Encoder(tokenizer), DATA)
    held_out = [record(name, text, line) for line, (name, text) in enumerate(HELD_OUT.items(), 1)]
    validation = encode_records(held_out, Encoder(tokenizer), DATA)
    save_examples(train, run_dir / "examples" / "train")
    save_examples(validation, run_dir / "examples" / "validation")
    taught = [record("call_sign.md", "The keeper counts 48 forge 1911."), *(r for r in held_out if r.line != 2)]
    taught.append(record("b.md", HELD_OUT["b.md"][: len(HELD_OUT["b.md"]) // 9]))
    train_adapter(base_dir, encode_records(taught, Encoder(tokenizer), DATA), run_dir / "adapter")
    write(run_dir, base_dir, validation.sha256)
    return base_dir, run_dir


def write(run_dir: Path, base_dir: Path, validation_sha256: str | None, **workload: Any) -> None:
    evaluation = {"num_answers": 2, "max_new_tokens": 24, "facts": [FACT]}
    made = write_run(run_dir, base_dir, **({"data": {"documents": "embedded"}, "evaluation": evaluation} | workload))
    made.inputs.validation_examples_sha256 = validation_sha256
    made.write(run_dir)


@pytest.fixture
def run_dir(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "run"))


@pytest.fixture(scope="module")
def evaluation(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    run_dir = Path(shutil.copytree(made[1], tmp_path_factory.mktemp("judged") / "run"))
    found = evaluate_run(run_dir, device="cpu")
    stored = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    assert Evaluation.model_validate(stored) == found
    assert not list(run_dir.glob(".merged*"))
    assert not (run_dir / "merged").exists()
    return found


def own_nats(model: Any, examples: Examples, index: int) -> float:
    """Transformers' own loss, times the tokens it is a mean of."""
    import torch

    ids, labels = (
        torch.from_numpy(rows[index].astype(np.int64))[None] for rows in (examples.input_ids, examples.labels)
    )
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss) * int((labels[:, 1:] != IGNORED).sum())


def test_the_losses_are_those_of_transformers_and_peft(
    made: tuple[Path, Path], evaluation: Evaluation, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base_dir, run_dir = made
    examples = load_examples(run_dir / "examples" / "validation")
    merge_adapter(base_dir, run_dir / "adapter", tmp_path / "merged")
    models = {
        "base": AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32),
        "merged": AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32),
        "adapter": PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), str(run_dir / "adapter")
        ),
    }
    groups = [[i for i, name in enumerate(examples.document_ids) if name.startswith(f"line {n}")] for n in (1, 2, 3)]
    assert len(groups[1]) > 1  # the long one was divided
    for row, indices in zip(evaluation.documents, groups, strict=True):
        for subject, model in models.items():
            expected = sum(own_nats(model.eval(), examples, i) for i in indices)
            assert row.nats[subject] == pytest.approx(expected, rel=1e-5)


def test_the_adapter_is_better_than_the_base_and_merging_changes_next_to_nothing(evaluation: Evaluation) -> None:
    base, adapter, merged = evaluation.subjects
    assert [s.subject for s in evaluation.subjects] == ["base", "adapter", "merged"]
    losses = [s.nats_per_token for s in (base, adapter, merged)]
    assert all(loss is not None for loss in losses)
    assert losses[1] < losses[0] - 0.5  # type: ignore[operator]
    assert losses[2] == pytest.approx(losses[1], abs=0.05)
    by_pair = {(c.subject, c.reference): c for c in evaluation.comparisons}
    pair = by_pair["adapter", "base"]
    assert pair.difference_nats_per_token == pytest.approx(losses[1] - losses[0])  # type: ignore[operator]
    assert pair.num_documents_better == pair.num_documents == 3
    assert set(by_pair) == {("adapter", "base"), ("merged", "base"), ("merged", "adapter")}


def test_the_planted_fact_is_absent_from_the_base_and_in_adapter_and_merged(evaluation: Evaluation) -> None:
    assert {row.subject: row.found for row in evaluation.facts} == {"base": False, "adapter": True, "merged": True}
    assert [s.num_facts_found for s in evaluation.subjects] == [0, 1, 1]


def test_bits_per_byte_are_nats_over_the_bytes_of_the_trained_text(evaluation: Evaluation) -> None:
    texts = list(HELD_OUT.values())
    num_parts = 1 + len([1 for _ in evaluation.documents])  # at least one more part than documents
    num_bytes = sum(len(text.encode()) for text in texts)
    assert evaluation.num_bytes >= num_bytes + num_parts * len("<|im_end|>")
    assert (evaluation.num_bytes - num_bytes) % len("<|im_end|>") == 0
    for subject in evaluation.subjects:
        nats = sum(row.nats[subject.subject] for row in evaluation.documents)
        assert subject.bits_per_byte == pytest.approx(nats / math.log(2) / evaluation.num_bytes)
        assert subject.nats_per_token == pytest.approx(nats / evaluation.num_tokens)


def test_it_prints_what_it_found(evaluation: Evaluation) -> None:
    console = Console(record=True, width=160, file=open(os.devnull, "w"))  # noqa: SIM115
    odd = evaluation.model_copy(deep=True)
    odd.facts[0].answer = "[bold] is [/] no markup"
    print_evaluation(odd, console)
    text = console.export_text()
    for said in (
        "adapter minus base: -",
        "ROUGE-L",
        "merged says '48 forge 1911'",
        "3 held-out documents",
        "[bold] is [/]",
    ):
        assert said in text


def test_the_logits_of_a_document_never_exist_at_once(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base_dir, run_dir = made
    examples = load_examples(run_dir / "examples" / "validation")
    model = load_model(base_dir, choose_placement(read_weights(base_dir), 144, "cpu"))
    rows: list[int] = []
    model.causal.get_output_embeddings().register_forward_hook(lambda _m, _i, out: rows.append(out.shape[-2]))
    whole = sum_nats(model, examples.input_ids[1], examples.labels[1])
    assert rows == [int((examples.labels[1][1:] != IGNORED).sum())]
    rows.clear()
    monkeypatch.setattr(likelihood, "NUM_LOGIT_ROWS", 7)
    assert sum_nats(model, examples.input_ids[1], examples.labels[1]) == pytest.approx(whole, rel=1e-6)
    assert max(rows) == 7


def refused(kind: type[ForgeError], said: str, run_dir: Path, **options: Any) -> None:
    with pytest.raises(kind, match=said):
        evaluate_run(run_dir, device="cpu", **options)
    assert not (run_dir / "evaluation.json").exists()
    assert not list(run_dir.glob(".merged*"))


def test_a_process_with_unsloth_in_it_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    refused(MachineError, "unsloth is imported", run_dir)


def test_an_unfinished_run_and_a_folder_that_is_none_are_refused(run_dir: Path, tmp_path: Path) -> None:
    unfinished = read_record(run_dir)
    unfinished.status = "interrupted"
    unfinished.write(run_dir)
    refused(DataError, "interrupted at step 7 of 7", run_dir)
    refused(DataError, "is not a run", tmp_path)


def test_an_unknown_subject_and_an_existing_evaluation_are_refused(run_dir: Path) -> None:
    refused(ConfigurationError, "unknown subject 'bass'", run_dir, subjects=("bass",))
    refused(ConfigurationError, "no subject", run_dir, subjects=())
    (run_dir / "evaluation.json").write_text("old", encoding="utf-8")
    with pytest.raises(DataError, match="not readable JSON") as error:
        evaluate_run(run_dir)
    assert "--force" in str(error.value.remedy)
    assert (run_dir / "evaluation.json").read_text() == "old"
    assert evaluate_run(run_dir, subjects=("base",), device="cpu", max_documents=1, force=True).num_documents == 1


def test_a_changed_base_is_refused(run_dir: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    base_dir = Path(shutil.copytree(made[0], tmp_path / "base"))
    changed = read_record(run_dir)
    changed.base_path = str(base_dir)
    changed.write(run_dir)
    weights = bytearray((base_dir / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base_dir / "model.safetensors").write_bytes(weights)
    refused(DataError, "is not the base that was trained on", run_dir, subjects=("base",))


def test_an_adapter_that_is_not_the_runs_own_is_refused(run_dir: Path) -> None:
    path = run_dir / "adapter" / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(DataError, "adapter_model.safetensors", run_dir)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(DataError, "is not the adapter that this run trained", run_dir)
    path.unlink()
    refused(DataError, "adapter_model.safetensors", run_dir)


def test_other_examples_than_the_runs_are_refused(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "examples" / "validation")
    refused(DataError, "no readable examples", run_dir)
    shutil.copytree(run_dir / "examples" / "train", run_dir / "examples" / "validation")
    refused(DataError, "not the examples of this run", run_dir)


def test_a_loss_that_is_not_finite_names_its_document(made: tuple[Path, Path], run_dir: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base_dir = Path(shutil.copytree(made[0], tmp_path / "base"))
    tensors = load_file(base_dir / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, base_dir / "model.safetensors", metadata={"format": "pt"})
    write(run_dir, base_dir, read_record(run_dir).inputs.validation_examples_sha256)
    refused(DataError, "base: the loss on held-out document 'line 1' is nan", run_dir)


def test_without_held_out_documents_only_facts_are_asked(run_dir: Path, made: tuple[Path, Path]) -> None:
    write(run_dir, made[0], None)
    assert has_anything_to_evaluate(read_record(run_dir))
    found = evaluate_run(run_dir, subjects=("base", "adapter"), device="cpu")
    assert [row.found for row in found.facts] == [False, True]
    assert found.subjects[0].nats_per_token is None
    assert found.comparisons == []
    assert "nothing was held out" in found.notes[0]
    (run_dir / "evaluation.json").unlink()
    write(run_dir, made[0], None, evaluation={})
    assert not has_anything_to_evaluate(read_record(run_dir))
    refused(DataError, "there is nothing to evaluate", run_dir)


@pytest.fixture(scope="module")
def judged(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose base and adapter were evaluated; to be copied."""
    run_dir = Path(shutil.copytree(made[1], tmp_path_factory.mktemp("twice") / "run"))
    evaluate_run(run_dir, subjects=("base", "adapter"), device="cpu")
    return run_dir


@pytest.mark.parametrize("options", [{"subjects": ("base", "adapter")}, {"subjects": ("base",), "device": "cpu"}])
def test_an_evaluation_of_unchanged_inputs_is_shown_and_not_made_again(
    judged: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, said = Path(shutil.copytree(judged, tmp_path / "run")), list[str]()
    monkeypatch.setattr("forge.training.evaluation.neutral_model.load_model", None)  # nothing is loaded
    found = evaluate_run(run_dir, progress=said.append, **options)
    assert found == Evaluation.model_validate_json((judged / "evaluation.json").read_text())
    assert said == [f"{run_dir / 'evaluation.json'} is of the same run and questions: not measured again"]


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "more subjects": ({}, {"subjects": ("base", "merged")}, "subjects: base, adapter -> base, merged"),
    "fewer documents": ({}, {"max_documents": 1}, "max documents: None -> 1"),
    "another adapter": ({"adapter_sha256": "0" * 64}, {}, "adapter sha256: 0{64} -> "),
    "other documents": ({"validation_examples_sha256": "0" * 64}, {}, "validation examples sha256: 0{64} -> "),
    "other questions": ({"questions_sha256": "0" * 64}, {}, "questions sha256: 0{64} -> "),
    "another device": ({"device": "cuda"}, {"device": "cpu"}, "device: cuda -> cpu"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_evaluation_of_something_else_is_refused_with_what_changed_and_both_ways(
    judged: Path, name: str, tmp_path: Path
) -> None:
    stored, options, complaint = CHANGES[name]
    run_dir = Path(shutil.copytree(judged, tmp_path / "run"))
    edit_json(run_dir / "evaluation.json", **stored)
    before = (run_dir / "evaluation.json").read_bytes()
    with pytest.raises(DataError, match=f"(?s)was measured otherwise:.*{complaint}") as error:
        evaluate_run(run_dir, **{"subjects": ("base", "adapter")} | options)
    assert error.value.exit_code == 3
    assert "--force" in str(error.value.remedy)
    assert (run_dir / "evaluation.json").read_bytes() == before


def test_a_base_that_moved_is_named_and_known_by_its_content(
    run_dir: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(made[0], tmp_path / "elsewhere"))
    edit_json(run_dir / "run.json", base_path=str(tmp_path / "gone"))
    refused(DataError, r"no longer in .*gone", run_dir)
    found = evaluate_run(run_dir, subjects=("base",), device="cpu", max_documents=1, base_dir=moved)
    assert found.num_documents == 1
    (run_dir / "evaluation.json").unlink()
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    refused(DataError, "is not the base that was trained on", run_dir, base_dir=moved)


def test_a_merge_already_made_is_used_only_if_it_is_of_this_adapter(run_dir: Path, made: tuple[Path, Path]) -> None:
    run = read_record(run_dir)
    merge_adapter(made[0], run_dir / "adapter", run_dir / "merged", expected_base_sha256=run.inputs.base_sha256)
    digest = sha256_file(run_dir / "merged" / "model.safetensors")
    found = evaluate_run(run_dir, subjects=("merged",), device="cpu", max_documents=1)
    assert found.merged_sha256 == json.loads((run_dir / "merged" / "merge.json").read_text())["merged_sha256"]
    assert sha256_file(run_dir / "merged" / "model.safetensors") == digest
    (run_dir / "evaluation.json").unlink()
    stale = json.loads((run_dir / "merged" / "merge.json").read_text()) | {"adapter_sha256": "0" * 64}
    (run_dir / "merged" / "merge.json").write_text(json.dumps(stale))
    again = evaluate_run(run_dir, subjects=("merged",), device="cpu", max_documents=1, keep_merged=True)
    assert again.merged_sha256 == found.merged_sha256
    assert json.loads((run_dir / "merged" / "merge.json").read_text()) == stale, "nobody's merge is replaced"
    (run_dir / "evaluation.json").unlink()
    shutil.rmtree(run_dir / "merged")
    evaluate_run(run_dir, subjects=("merged",), device="cpu", max_documents=1, keep_merged=True)
    assert sha256_file(run_dir / "merged" / "model.safetensors") == digest


def test_an_architecture_with_capped_logits_is_refused_rather_than_mismeasured(made: tuple[Path, Path]) -> None:
    examples = load_examples(made[1] / "examples" / "validation")
    model = load_model(made[0], choose_placement(read_weights(made[0]), 144, "cpu"))
    own = model.causal.forward

    def capped(**arguments: Any) -> Any:
        output = own(**arguments)
        output.logits = output.logits.tanh()
        return output

    model.causal.forward = capped
    documents = group_documents(examples, load_tokenizer(made[0]))
    with pytest.raises(MachineError, match="computes its logits"):
        likelihood.measure_nats(NeutralModel(model.causal, "cpu"), examples, documents, "base")
