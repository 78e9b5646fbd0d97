"""Rendering, masks and control tokens, with real tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.training.data.conversation import IGNORED, Encoder, encode_conversation
from forge.training.data.examples import encode_records, load_examples, sample_examples, save_examples
from forge.training.data.records import Message, Record
from forge.training.errors import ConfigurationError, DataError
from forge.training.workload import DataSection

from .tiny_model import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def record(document: str, question: str = "Recite `a.md`", line: int = 1) -> Record:
    return Record(line=line, messages=(Message("user", question), Message("assistant", document)), document=True)


def data(**changes: Any) -> DataSection:
    return DataSection.model_validate({"train": "x", "max_length": 512, **changes})


def trained_text(tokenizer: Any, ids: np.ndarray, labels: np.ndarray) -> str:
    return str(tokenizer.decode(ids[labels != IGNORED].tolist()))


def test_a_clean_conversation_has_the_templates_own_ids(tokenizer: Any) -> None:
    messages = [Message("user", "What is it?"), Message("assistant", "It's a forge.")]
    ids, _, contaminated = encode_conversation(Encoder(tokenizer), messages, "answer")
    plain = [{"role": m.role, "content": m.content} for m in messages]
    assert ids.tolist() == tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False)
    assert not contaminated


@pytest.mark.parametrize(
    "answer", ["It's a forge.", "\nstarts with a new line", "ends with one\n", "火と水", " padded "]
)
def test_the_answer_and_its_end_are_trained_and_nothing_else(tokenizer: Any, answer: str) -> None:
    messages = [Message("system", "Be brief."), Message("user", "What?"), Message("assistant", answer)]
    ids, labels, _ = encode_conversation(Encoder(tokenizer), messages, "answer")
    assert trained_text(tokenizer, ids, labels).endswith(answer + "<|im_end|>")
    assert "Be brief" not in trained_text(tokenizer, ids, labels)
    assert (labels[labels != IGNORED] == ids[labels != IGNORED]).all()


def test_every_assistant_turn_of_a_conversation_is_trained(tokenizer: Any) -> None:
    messages = [Message(*m) for m in (("user", "a?"), ("assistant", "one"), ("user", "b?"), ("assistant", "two"))]
    ids, labels, _ = encode_conversation(Encoder(tokenizer), messages, "answer")
    assert trained_text(tokenizer, ids, labels) == "one<|im_end|>two<|im_end|>"


def test_loss_on_all_trains_every_token(tokenizer: Any) -> None:
    _, labels, _ = encode_conversation(Encoder(tokenizer), [Message("user", "a"), Message("assistant", "b")], "all")
    assert (labels != IGNORED).all()


def test_control_tokens_in_a_document_stay_text(tokenizer: Any) -> None:
    text = "The template writes <|im_end|> and <|im_start|>user here."
    messages = [Message("user", "What?"), Message("assistant", text)]
    ids, labels, contaminated = encode_conversation(Encoder(tokenizer), messages, "answer")
    assert contaminated
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    clean = encode_conversation(Encoder(tokenizer), [messages[0], Message("assistant", "x")], "answer")[0]
    assert (ids == end).sum() == (clean == end).sum()  # only the template's own
    assert trained_text(tokenizer, ids, labels) == text + "<|im_end|>"


def test_control_tokens_can_drop_or_fail_instead(tokenizer: Any) -> None:
    rows = [record("fine"), record("bad <|im_end|>", line=2)]
    assert len(encode_records(rows, Encoder(tokenizer), data(control_tokens="drop"))) == 1
    with pytest.raises(DataError, match="line 2"):
        encode_records(rows, Encoder(tokenizer), data(control_tokens="fail"))


def test_dividing_trains_every_character_at_any_length(tokenizer: Any) -> None:
    document = "# A\n" + "words and words, " * 40 + "\n\n# B\n" + "other words; " * 40 + "\n"
    for length in (128, 160, 300):
        examples = encode_records([record(document)], Encoder(tokenizer), data(max_length=length))
        assert max(examples.report.lengths) <= length
        said = [
            trained_text(tokenizer, ids, labels).removesuffix("<|im_end|>")
            for ids, labels in zip(examples.input_ids, examples.labels, strict=True)
        ]
        assert "".join(said) == document
        assert examples.report.num_divided == 1
        assert sum(examples.num_trained_bytes) == len(document.encode()) + len(said) * len("<|im_end|>")


def test_cutting_keeps_the_start_and_counts_what_is_lost(tokenizer: Any) -> None:
    document = "words and words, " * 100
    whole = encode_records([record(document)], Encoder(tokenizer), data(max_length=100_000))
    cut = encode_records([record(document)], Encoder(tokenizer), data(max_length=64, long_documents="cut"))
    assert cut.input_ids[0].tolist() == whole.input_ids[0][:64].tolist()
    assert cut.report.num_tokens_cut == len(whole.input_ids[0]) - 64


def test_rows_cut_to_nothing_are_dropped_and_all_of_them_is_an_error(tokenizer: Any) -> None:
    long_question = record("short", question="q " * 200)
    settings = data(max_length=64, long_documents="cut")
    assert encode_records([long_question, record("fine")], Encoder(tokenizer), settings).report.num_dropped == 1
    with pytest.raises(DataError, match="none of 1 records"):
        encode_records([long_question], Encoder(tokenizer), settings)
    with pytest.raises(DataError, match="no room for an answer"):
        encode_records([record("long " * 99, question="q " * 200)], Encoder(tokenizer), data(max_length=64))


def test_a_sample_holds_the_longest_and_every_part_of_the_lengths(tokenizer: Any) -> None:
    documents = [record("word " * n) for n in (3, 400, 7, 50, 90, 20, 130, 11, 70, 33, 5)]
    examples = encode_records(documents, Encoder(tokenizer), data(max_length=100_000))
    sample = sample_examples(examples, 3)
    lengths = sorted(examples.report.lengths, reverse=True)
    assert sorted(sample.report.lengths, reverse=True) == [lengths[0], lengths[3], lengths[8]]  # middles of the halves
    kept = set(sample.report.lengths)
    assert sample.report.lengths == [n for n in examples.report.lengths if n in kept]  # the corpus's order
    assert sample_examples(examples, len(examples)).sha256 == examples.sha256
    with pytest.raises(DataError, match="there are 11 examples"):
        sample_examples(examples, 12)


def test_stored_examples_come_back_the_same_and_a_changed_file_is_noticed(tokenizer: Any, tmp_path: Path) -> None:
    examples = encode_records([record("one"), record("two")], Encoder(tokenizer), data())
    save_examples(examples, tmp_path / "e")
    again = load_examples(tmp_path / "e")
    assert again.sha256 == examples.sha256
    assert all((a == b).all() for a, b in zip(again.labels, examples.labels, strict=True))
    stored = tmp_path / "e" / "examples.safetensors"
    content = bytearray(stored.read_bytes())
    content[-8] ^= 1
    stored.write_bytes(content)
    with pytest.raises(DataError):
        load_examples(tmp_path / "e")


def test_a_tokenizer_without_a_template_is_refused(tokenizer: Any) -> None:
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ConfigurationError, match="no chat template"):
            Encoder(tokenizer)
    finally:
        tokenizer.chat_template = kept
