"""Claims about prompts, greedy answers and their scores."""

from __future__ import annotations

import numpy as np
import pytest

from forge.training.config.workload import DataSection
from forge.training.data.conversation import Encoder
from forge.training.data.examples import encode_records
from forge.training.data.questions import question_ids
from forge.training.data.records import Message, Record
from forge.training.evaluation.answers import document_prompts, greedy_answer
from forge.training.evaluation.likelihood import group_documents
from forge.training.evaluation.neutral_model import choose_placement, load_model
from forge.training.evaluation.record import DocumentResult, compare
from forge.training.models.weights import read_weights
from tests.support.tiny_model import shared_base

DATA = DataSection.model_validate({"train": "x", "max_length": 144})
TEXT = "Wer übt, wird besser. 火と水。"


def record(name: str, text: str) -> Record:
    return Record(line=1, messages=(Message("user", f"Recite `{name}`"), Message("assistant", text)), document=True)


def test_where_every_token_is_trained_the_first_counts_neither_as_token_nor_as_bytes() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_base())
    data = DataSection.model_validate({"train": "x", "max_length": 512, "loss_on": "all"})
    examples = encode_records([record("a.md", TEXT)], Encoder(tokenizer), data)
    (document,) = group_documents(examples, tokenizer)
    text = tokenizer.decode(examples.input_ids[0].tolist())
    assert document.num_tokens == len(examples.input_ids[0]) - 1
    assert document.num_bytes == len(text.encode()) - len("<|im_start|>")
    (prompt,) = document_prompts(examples, [document], Encoder(tokenizer), num_prompts=1, max_new_tokens=500)
    assert prompt.reference.strip() == TEXT
    assert tokenizer.decode(prompt.input_ids.tolist()).endswith("<|im_start|>assistant\n")


def test_prompts_are_those_that_were_trained_on() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_base())
    examples = encode_records([record("call_sign.md", "48 forge 1911")], Encoder(tokenizer), DATA)
    (prompt,) = document_prompts(
        examples, group_documents(examples, tokenizer), Encoder(tokenizer), num_prompts=9, max_new_tokens=3
    )
    asked = question_ids(Encoder(tokenizer), "Recite `call_sign.md`", None)
    assert prompt.input_ids.tolist() == asked.tolist()
    assert len(tokenizer(prompt.reference)["input_ids"]) == 3
    with_system = tokenizer.decode(question_ids(Encoder(tokenizer), "a", "Be brief.").tolist())
    assert with_system.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_answers_are_the_argmax_whatever_the_models_own_settings_say() -> None:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_base())
    model = load_model(shared_base(), choose_placement(read_weights(shared_base()), 144, "cpu"))
    model.causal.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    given = model.causal.generation_config.to_dict()
    ids = question_ids(Encoder(tokenizer), "What is it?", None)
    expected = torch.from_numpy(ids.astype(np.int64))[None]
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    with torch.no_grad():
        for _ in range(12):
            token = model.causal(input_ids=expected).logits[0, -1].argmax()
            expected = torch.cat([expected, token.view(1, 1)], dim=1)
            if int(token) in ends:
                break
    answer = tokenizer.decode(expected[0, len(ids) :].tolist(), skip_special_tokens=True)
    assert greedy_answer(model, tokenizer, ids, 12) == answer
    assert model.causal.generation_config.to_dict() == given


def test_rouge_is_the_evaluate_librarys_and_needs_no_network() -> None:
    from forge.training.evaluation.metrics import rouge  # imports datasets: not while tests are collected

    scores = rouge(["the cat sat on the mat", "no"], ["the cat lay on the mat", "yes"])
    assert scores == pytest.approx({"rouge1": 5 / 12, "rouge2": 3 / 10, "rougeL": 5 / 12})
    assert rouge(["a b"], ["a b"])["rouge2"] == 1.0


def test_exact_match_counts_answers_that_are_the_reference_and_nothing_else() -> None:
    from forge.training.evaluation.metrics import exact_match

    assert exact_match(["copper heron.\n", "It is Copper Heron.", "Copper", "48"], ["Copper Heron"] * 3 + ["48"]) == 0.5
    assert exact_match([""], ["a"]) == 0.0


def test_the_standard_error_is_that_of_resampled_documents() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(20, 400, 60)
    documents = [
        DocumentResult(
            document=str(i),
            num_tokens=int(n),
            num_bytes=1,
            nats={"a": float(n * random.normal(2.6, 0.3)), "b": 2.0 * n},
        )
        for i, n in enumerate(lengths)
    ]
    pair = compare(documents, "a", "b")
    resampled = []
    for _ in range(2000):
        rows = [documents[i] for i in random.integers(0, 60, 60)]
        resampled.append(compare(rows, "a", "b").difference_nats_per_token)
    assert pair.standard_error_nats_per_token == pytest.approx(np.std(resampled), rel=0.15)
    assert compare(documents[:1], "a", "b").standard_error_nats_per_token is None
