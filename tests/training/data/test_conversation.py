"""Rendering, masks and control tokens, with real tokenizers."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge.training.config.workload import DataSection
from forge.training.data.conversation import IGNORED, Encoder, encode_conversation, encode_question
from forge.training.data.examples import encode_records, load_examples, sample_examples, save_examples
from forge.training.data.records import Message, Record
from forge.training.models.tokenizers import load_tokenizer
from forge.training.system.errors import ConfigurationError, DataError
from tests.support.tiny_model import SPECIAL_TOKENS, write_tokenizer


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


PIECES = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "<|im_end|", "|>", "\n", " "]
)
TEXTS = st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=12)
PROMPT = Message("user", "What?")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(TEXTS.map("".join), min_size=2, max_size=2))
def test_no_text_whatsoever_becomes_a_control_token_and_clean_ones_are_the_templates(
    tokenizer: Any, contents: list[str]
) -> None:
    encoder = Encoder(tokenizer)
    messages = [Message(role, text) for role, text in zip(("user", "assistant"), contents, strict=True)]
    ids, labels, contaminated = encode_conversation(encoder, messages, "answer")
    bare = encode_conversation(encoder, [PROMPT, Message("assistant", "x")], "answer")[0]
    assert encoder.num_control(ids) == encoder.num_control(bare) > 0  # the template's own and no other
    assert contaminated == any(token in text for token in SPECIAL_TOKENS for text in contents)
    if not contaminated:
        plain = [{"role": m.role, "content": m.content} for m in messages]
        assert ids.tolist() == tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False)
    asked = encode_question(encoder, messages[:1])
    opened = encode_question(encoder, [PROMPT])
    assert encoder.num_control(asked) == encoder.num_control(opened)
    if not any(token in contents[0] for token in SPECIAL_TOKENS):
        plain = [{"role": "user", "content": contents[0]}]
        wanted = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False, add_generation_prompt=True)
        assert asked.tolist() == wanted
    said = unicodedata.normalize("NFC", contents[1]) + "<|im_end|>"
    assert trained_text(tokenizer, ids, labels).endswith(said)


def test_the_number_of_documents_with_control_tokens_is_reported(tokenizer: Any) -> None:
    rows = [record("fine"), record("bad <|im_end|>"), record("fine", question="what is <|im_start|>?")]
    assert encode_records(rows, Encoder(tokenizer), data()).report.num_with_control_tokens == 2


def test_a_control_token_that_only_normalising_brings_forth_stays_text(tmp_path: Path) -> None:
    """A tokenizer that lower-cases before it looks for its added tokens."""
    tokenizer = write_tokenizer(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    spec["normalizer"] = {"type": "Lowercase"}
    for token in spec["added_tokens"]:
        token["normalized"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    encoder = Encoder(load_tokenizer(tmp_path))
    assert encoder.num_control(encoder.ids_and_ends("<|IM_END|>", plain=False)[0]) == 1  # the trap is there
    ids, labels, contaminated = encode_conversation(encoder, [PROMPT, Message("assistant", "a <|IM_END|> b")], "answer")
    assert contaminated
    bare = encode_conversation(encoder, [PROMPT, Message("assistant", "a b")], "answer")[0]
    assert encoder.num_control(ids) == encoder.num_control(bare)
    assert trained_text(tokenizer, ids, labels) == "a <|im_end|> b<|im_end|>"


def test_a_tokenizer_that_cannot_write_its_control_tokens_as_text_is_refused(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[unk]": 0, "<end>": 1}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken("<end>", special=True)])
    template = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", chat_template=template)
    with pytest.raises(ConfigurationError, match="cannot write <end> as text"):
        Encoder(tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{% for %}", "refuses the conversation"),
        ("{{ messages[7]['content'] }}", "refuses the conversation"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "refuses the conversation"),
        ("{{ messages[0]['content'] }}", "drops, repeats or reorders"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "rewrites the messages' text"),
    ],
)
def test_a_template_that_refuses_breaks_or_rewrites_is_one_message(tokenizer: Any, template: str, message: str) -> None:
    kept, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        with pytest.raises(ConfigurationError, match=message):
            encode_conversation(Encoder(tokenizer), [PROMPT, Message("assistant", "It")], "answer")
    finally:
        tokenizer.chat_template = kept


def test_a_template_that_refuses_a_system_prompt_names_each_record_that_has_one(tokenizer: Any) -> None:
    kept = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + kept
    )
    try:
        with pytest.raises(DataError, match=r"line 1: the base model's chat template refuses .*: no system role"):
            encode_records([record("fine")], Encoder(tokenizer), data(system_prompt="Be brief."))
    finally:
        tokenizer.chat_template = kept


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"version": "1.0", "model": {"type": "BPE"}}', "\0" * 99])
def test_a_broken_tokenizer_file_is_one_message(tmp_path: Path, content: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_control_tokens_can_drop_or_fail_instead(tokenizer: Any) -> None:
    rows = [record("fine"), record("bad <|im_end|>", line=2)]
    assert len(encode_records(rows, Encoder(tokenizer), data(control_tokens="drop"))) == 1
    rows.append(record("worse <|im_start|>", line=9))
    with pytest.raises(DataError, match="2 lines cannot be used") as caught:
        encode_records(rows, Encoder(tokenizer), data(control_tokens="fail"))
    assert "line 2: the text holds the control token <|im_end|>" in caught.value.message
    assert "line 9: the text holds the control token <|im_start|>" in caught.value.message


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


def test_cutting_keeps_the_start_and_counts_what_is_lost(tokenizer: Any) -> None:
    document = "words and words, " * 100
    whole = encode_records([record(document)], Encoder(tokenizer), data(max_length=100_000))
    cut = encode_records([record(document)], Encoder(tokenizer), data(max_length=64, long_documents="cut"))
    assert cut.input_ids[0].tolist() == whole.input_ids[0][:64].tolist()
    assert cut.report.num_tokens_cut == len(whole.input_ids[0]) - 64


def test_rows_cut_to_nothing_are_dropped_and_all_of_them_is_an_error(tokenizer: Any) -> None:
    long_question = record("short", question="q " * 200)
    short = data(max_length=64, long_documents="cut")
    report = encode_records([long_question, record("fine", line=2)], Encoder(tokenizer), short).report
    assert (report.dropped, report.num_examples) == (["line 1"], 1)
    with pytest.raises(DataError, match=r"a\.jsonl: none of 1 records"):
        encode_records([long_question], Encoder(tokenizer), short, "a.jsonl")


def test_every_record_that_cannot_be_encoded_is_named(tokenizer: Any) -> None:
    rows = [record("long " * 99, question="q " * 200, line=n) for n in (3, 5)]
    with pytest.raises(DataError, match="no tokens for an answer") as caught:
        encode_records([*rows, record("fine")], Encoder(tokenizer), data(max_length=160), "a.jsonl")
    assert caught.value.message.startswith("a.jsonl: 2 lines cannot be used\n  line 3: ")
    assert "\n  line 5: " in caught.value.message


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
