"""Whatever a chat template does: what is trained before a reply is what asks for it, and no record is lost unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.training.config.workload import DataSection
from forge.training.data import conversation
from forge.training.data.conversation import IGNORED, Encoder, encode_conversation, encode_question, load_encoder
from forge.training.data.examples import encode_records, load_examples, save_examples
from forge.training.data.records import Message, Record
from forge.training.models.tokenizers import load_tokenizer
from forge.training.system.errors import ConfigurationError, DataError
from tests.support.tiny_model import CHAT_TEMPLATE, write_tokenizer
from tests.support.tiny_run import edit_json

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}BODY{{ '<|im_end|>\n' }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PLAIN = TURNS.replace("BODY", "{{ m.content }}") + ASKS
TRIMS = TURNS.replace("BODY", "{{ m.content | trim }}") + ASKS
# thinks before the last reply, and takes what stands before a reply's own </think> for its thoughts
THINKS = (
    TURNS.replace(
        "BODY",
        "{% set said = m.content.split('</think>') %}{% if m.role == 'assistant' and loop.last %}"
        "{{ '<think>\n' + (said[0] if said | length > 1 else '') + '\n</think>\n\n' + said[-1].lstrip('\n') }}"
        "{% else %}{{ said[-1] if m.role == 'assistant' else m.content }}{% endif %}",
    )
    + ASKS
)
FORBIDS_THOUGHT = PLAIN.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
OPENS_THOUGHT = PLAIN.replace("assistant\n", "assistant\n<think>\n")
DATED = "{{ '<|im_start|>system\nIt is ' + strftime_now('%d %b %Y') + '.<|im_end|>\n' }}" + PLAIN
MARKED = TURNS.replace(
    "BODY{{ '<|im_end|>\n' }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
INSTRUCTS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QUESTION = Message("user", "What is written of the quay?")
ANSWER = "\n\n# The quay\n\n  It has nine rings.\n"
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def use(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: Any, date: str | None = None) -> Encoder:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return Encoder(tokenizer, date) if date else Encoder(tokenizer)


def texts(tokenizer: Any, ids: np.ndarray, labels: np.ndarray) -> tuple[str, str]:
    """What stands before the first trained token, and what is trained."""
    begin = int(np.argmax(labels != IGNORED))
    return tokenizer.decode(ids[:begin].tolist()), tokenizer.decode(ids[labels != IGNORED].tolist())


def record(line: int, answer: str, question: str = "Recite `a.md`") -> Record:
    return Record(line, (Message("user", question), Message("assistant", answer)), document=True)


def data(**changes: Any) -> DataSection:
    return DataSection.model_validate({"train": "x", "max_length": 512, **changes})


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (PLAIN, ANSWER + END),
        (TRIMS, ANSWER.strip() + END),
        (THINKS, "<think>\n\n</think>\n\n" + ANSWER.lstrip("\n") + END),
        (FORBIDS_THOUGHT, ANSWER + END),
        (DATED, ANSWER + END),
        (MARKED + ASKS, ANSWER + END),
        (INSTRUCTS, " " + ANSWER.strip() + " " + END),
    ],
    ids=["plain", "trims", "thinks", "forbids-thought", "dated", "marked", "instructs"],
)
def test_the_reply_is_trained_as_it_is_rendered_behind_the_text_that_asks_for_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, trained: str
) -> None:
    encoder = use(tokenizer, monkeypatch, template)
    ids, labels, _ = encode_conversation(encoder, [QUESTION, Message("assistant", ANSWER)], "answer")
    rows = [{"role": QUESTION.role, "content": QUESTION.content}]
    asked = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    assert texts(tokenizer, ids, labels) == (asked, trained)
    assert tokenizer.decode(encode_question(encoder, [QUESTION]).tolist()) == asked
    # control tokens in the reply change nothing of that
    held = encode_conversation(encoder, [QUESTION, Message("assistant", ANSWER + END + ANSWER)], "answer")
    assert held[2]
    assert texts(tokenizer, *held[:2]) == (asked, trained.replace(ANSWER.strip(), (ANSWER + END + ANSWER).strip()))


def test_what_a_template_adds_between_question_and_reply_is_said(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert use(tokenizer, monkeypatch, PLAIN).remarks == ()
    for template in (THINKS, FORBIDS_THOUGHT):
        (remark,) = use(tokenizer, monkeypatch, template).remarks
        assert repr("<think>\n\n</think>\n\n") in remark


def test_a_question_that_no_trained_reply_follows_is_refused_with_both_ends(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        use(tokenizer, monkeypatch, OPENS_THOUGHT)
    assert r"assistant\n<think>\n'" in caught.value.message
    assert r"assistant\n'" in caught.value.message
    with pytest.raises(ConfigurationError, match="BOT"):
        use(tokenizer, monkeypatch, PLAIN.replace("{{ '<|im_start|>assistant\n' }}", "{{ 'BOT:' }}"))


def test_an_earlier_reply_that_is_asked_for_otherwise_is_not_trained(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [QUESTION, Message("assistant", "Nine."), Message("user", "Rings?"), Message("assistant", "Yes.")]
    encoder = use(tokenizer, monkeypatch, THINKS)
    ids, labels, _ = encode_conversation(encoder, talk, "answer")
    assert texts(tokenizer, ids, labels)[1] == f"Nine.{END}<think>\n\n</think>\n\nYes.{END}"
    encoder = use(tokenizer, monkeypatch, FORBIDS_THOUGHT)
    with pytest.raises(DataError, match=r"asks for a reply with '.*</think>.*', and renders it behind"):
        encode_conversation(encoder, talk, "answer")


def test_the_mask_is_that_of_a_template_that_marks_the_assistants_text(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = use(tokenizer, monkeypatch, MARKED + ASKS)
    talk = [QUESTION, Message("assistant", "Nine."), Message("user", "Rings?"), Message("assistant", "Yes.")]
    ids, labels, _ = encode_conversation(encoder, talk, "answer")
    rows = [{"role": m.role, "content": m.content} for m in talk]
    theirs = tokenizer.apply_chat_template(rows, return_dict=True, return_assistant_tokens_mask=True)
    assert ids.tolist() == theirs["input_ids"]
    assert (labels != IGNORED).astype(int).tolist() == theirs["assistant_masks"]


# Records that a template cannot hold

ODD = "Before `</think>` it talks to itself."


def test_every_odd_record_is_named_in_one_message_beside_the_other_errors(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = use(tokenizer, monkeypatch, THINKS)
    rows = [record(n, ODD, question=f"Set out `notes/{n}.md`") for n in range(2, 16)]
    rows += [record(1, "It has nine rings."), record(99, "long " * 99, question="q " * 200)]
    with pytest.raises(DataError) as caught:
        encode_records(rows, encoder, data(max_length=160), "a.jsonl")
    for n in range(2, 16):
        assert f"line {n}: " in caught.value.message
        assert f"`notes/{n}.md`" in caught.value.message
    assert "line 99: " in caught.value.message
    assert "line 1:" not in caught.value.message
    assert "data.on_unrepresentable=leave_out" in str(caught.value.remedy)


def test_odd_records_are_left_out_where_the_config_says_so_and_stay_in_the_report(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoder = use(tokenizer, monkeypatch, THINKS)
    rows = [record(1, "It has nine rings."), record(2, ODD), record(3, "\nIt is of oak.")]
    examples = encode_records(rows, encoder, data(on_unrepresentable="leave_out"))
    assert examples.document_ids == ["line 1", "line 3"]
    save_examples(examples, tmp_path / "e")
    (left_out,) = load_examples(tmp_path / "e").report.left_out
    assert left_out.startswith("line 2: ")
    with pytest.raises(DataError, match="line 2: "):
        encode_records(rows[1:2], encoder, data(on_unrepresentable="leave_out"))


def test_a_divided_document_is_trimmed_like_a_whole_one(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = use(tokenizer, monkeypatch, TRIMS)
    document = "".join(f"\n\n# {n}\n\n" + "nine rings of iron, " * 9 for n in range(6))
    examples = encode_records([record(1, document)], encoder, data(max_length=160))
    assert examples.report.num_divided == 1
    pairs = zip(examples.input_ids, examples.labels, strict=True)
    said = [texts(tokenizer, ids, labels)[1].removesuffix(END) for ids, labels in pairs]
    assert all(text == text.strip() for text in said)
    assert "".join("".join(said).split()) == "".join(document.split())


# Dates


def test_a_dated_template_has_the_date_that_it_is_given_and_no_other(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = use(tokenizer, monkeypatch, DATED, "2019-02-03")
    assert encoder.is_dated
    assert "2019-02-03" in "".join(encoder.remarks)
    text = tokenizer.decode(encode_question(encoder, [QUESTION]).tolist())
    assert "It is 03 Feb 2019." in text
    assert not use(tokenizer, monkeypatch, PLAIN, "2019-02-03").is_dated


def test_without_a_date_it_is_todays(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Date(conversation.date):
        @classmethod
        def today(cls) -> Any:
            return cls(2031, 5, 6)

    monkeypatch.setattr(conversation, "date", Date)
    encoder = use(tokenizer, monkeypatch, DATED)
    assert encoder.template_date == "2031-05-06"
    assert "It is 06 May 2031." in encoder.render([QUESTION], asks=True)


# Several templates

TOOLS = "{{ 'tools' }}"
NAMED = {
    "list": [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TOOLS}],
    "tools first": [{"name": "tool_use", "template": TOOLS}, {"name": "default", "template": PLAIN}],
    "object": {"tool_use": TOOLS, "default": PLAIN},
}


@pytest.mark.parametrize("templates", NAMED.values(), ids=NAMED)
def test_of_several_templates_the_default_is_taken(tmp_path: Path, templates: Any) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    edit_json(tmp_path / "tokenizer_config.json", chat_template=templates)
    assert load_tokenizer(tmp_path).chat_template == PLAIN
    talk = [QUESTION, Message("assistant", "Nine.")]
    ids, labels, _ = encode_conversation(load_encoder(tmp_path), talk, "answer")
    assert texts(load_tokenizer(tmp_path), ids, labels)[1] == f"Nine.{END}"


def test_of_a_folder_of_templates_the_default_is_the_one_beside_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS, encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == CHAT_TEMPLATE
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigurationError, match=r"none is named default.*tool_use") as caught:
        load_encoder(tmp_path)
    assert "chat_template.jinja" in str(caught.value.remedy)


@pytest.mark.parametrize("templates", [[{"name": "rag", "template": PLAIN}], {"rag": PLAIN}, {"default": None}])
def test_several_templates_without_a_default_are_one_message(tmp_path: Path, templates: Any) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    edit_json(tmp_path / "tokenizer_config.json", chat_template=templates)
    name = next(iter(json.loads(json.dumps(templates)) if isinstance(templates, dict) else ["rag"]))
    with pytest.raises(ConfigurationError, match=f"none is named default.*{name}"):
        load_encoder(tmp_path)
