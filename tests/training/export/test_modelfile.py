"""Claims about the Modelfile: what is written is what Ollama's grammar reads; mistakes have a line number."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.training.data.conversation import Encoder
from forge.training.export.chat_template import ChatML, recognise_chatml
from forge.training.export.modelfile import chatml_template, parse_modelfile, write_modelfile
from forge.training.system.errors import CheckError, ConfigurationError
from tests.support.tiny_model import CHAT_TEMPLATE, write_tokenizer


def values(text: str, name: str) -> list[str]:
    return [command.value for command in parse_modelfile(text) if command.name == name]


def test_everything_written_is_read_back() -> None:
    parameters = {"temperature": 0.2, "num_ctx": 4096, "use_mmap": True, "stop": ["<|im_start|>"]}
    template = chatml_template("You are a helpful assistant.")
    text = write_modelfile("m.q4_k_m.gguf", 'Say "yes",\nor say no.', parameters, template=template)
    assert values(text, "model") == ["./m.q4_k_m.gguf"]
    assert values(text, "system") == ['Say "yes",\nor say no.']
    assert values(text, "template") == [template]
    assert values(text, "temperature") == ["0.2"]
    assert values(text, "use_mmap") == ["true"]
    assert values(text, "stop") == ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def test_template_is_the_chatml_that_was_checked_against_go() -> None:
    assert chatml_template("You are a helpful assistant.") == (
        "{{- if not .System }}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{{ end }}"
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    )


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_system_prompt_survives_or_is_refused(prompt: str) -> None:
    try:
        text = write_modelfile("m.gguf", prompt)
    except ConfigurationError:
        assert '"""' in prompt or any(not c.isprintable() and c not in "\n\t" for c in prompt)
    else:
        assert values(text, "system") == ([prompt.replace("\r\n", "\n")] if prompt else [])


@pytest.mark.parametrize(
    "prompt", ['ends in "', '"', '""', 'a\n"', " spaces kept \n", "FROM x\nPARAMETER y", "# no comment"]
)
def test_awkward_system_prompts_survive(prompt: str) -> None:
    assert values(write_modelfile("m.gguf", prompt), "system") == [prompt]


@pytest.mark.parametrize("prompt", ['a """ b', "null \0", "zero\u200dwidth", "no\u00a0break", "line\rfeed"])
def test_system_prompts_that_ollama_would_change_are_refused(prompt: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot carry this system"):
        write_modelfile("m.gguf", prompt)


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"temprature": 0.1}, "did you mean temperature"),
        ({"num_ctx": 1.5}, "expected int"),
        ({"num_ctx": True}, "expected int"),
        ({"temperature": "hot"}, "expected float"),
        ({"use_mmap": 1}, "expected bool"),
        ({"stop": [""]}, "expected str"),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        write_modelfile("m.gguf", None, parameters)  # type: ignore[arg-type]
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("FROM a", [("model", "a")]),
        ("\ufefffrom a\r\n\r\n  # note\nSystem hello there \n", [("model", "a"), ("system", "hello there")]),
        ('FROM a\nSYSTEM "two\nlines"', [("model", "a"), ("system", "two\nlines")]),
        ('FROM a\nTEMPLATE """x\n"y"\n"""', [("model", "a"), ("template", 'x\n"y"\n')]),
        ("PARAMETER top_k 3\nFROM a", [("top_k", "3"), ("model", "a")]),
        ("FROM a\nMESSAGE user hi", [("model", "a"), ("message user", "hi")]),
        ("FROM a\nADAPTER ./b.gguf\nLICENSE MIT", [("model", "a"), ("adapter", "./b.gguf"), ("license", "MIT")]),
    ],
)
def test_the_grammar_is_ollamas(text: str, commands: list[tuple[str, str]]) -> None:
    assert [(command.name, command.value) for command in parse_modelfile(text)] == commands


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no FROM"),
        ("# only a note", "no FROM"),
        ("FROM a\n\nPARAMTER top_k 3", "line 3: unknown command"),
        ("FROM a\nPARAMETER topk 3", "line 2: unknown parameter"),
        ("FROM a\nPARAMETER top_k three", "line 2: top_k is 'three', not int"),
        ("FROM a\nPARAMETER use_mmap yes", "line 2: use_mmap"),
        ("FROM a\nPARAMETER top_k", "line 2: PARAMETER needs a value"),
        ("FROM", "line 1: FROM needs a value"),
        ('FROM a\nSYSTEM """never\nclosed', "line 2: the quotation is not closed"),
        ('FROM a\nSYSTEM "never closed', "line 2: the quotation is not closed"),
        ("FROM a\nMESSAGE robot hi", "line 2: unknown role"),
    ],
)
def test_mistakes_are_refused_with_their_line(text: str, complaint: str) -> None:
    with pytest.raises(CheckError, match=complaint):
        parse_modelfile(text)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
QWEN = "{% for m in messages %}" + TURN + "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = (  # for transformers' mask of the assistant's tokens
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
TRIMMING = QWEN.replace("m.content", "m.content | trim")
FORGETFUL = QWEN.replace("m.content", "m.content.split('</think>\n\n')[-1]")
SILENT = PROMPT.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
SYSTEM = "{{ '<|im_start|>system\n' + TEXT + '<|im_end|>\n' if messages[0].role != 'system' }}"
DATED = SYSTEM.replace("TEXT", "'It is ' + strftime_now('%d %b %Y') + '.'")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHAT_TEMPLATE, ChatML("You are a helpful assistant.")),
        (QWEN + PROMPT, ChatML("")),
        (MARKED + PROMPT, ChatML("")),
        (QWEN.replace("m.role", "m['role']").replace("<|im_end|>", "<|im_' 'end|>") + PROMPT, ChatML("")),
        (QWEN + SILENT, ChatML("", "<think>\n\n</think>\n\n")),
        (QWEN, None),
        ("{% for m in messages %}[INST]{{ m.content }}{% endfor %}", None),
        (QWEN.replace("\n' }}", "' }}") + PROMPT, None),
        (SYSTEM.replace("TEXT", "'{{ .System }}'") + QWEN + PROMPT, None),
    ],
    ids=[
        *("qwen2", "plain", "generation-tag", "other-spelling", "thinks-for-it"),
        *("no-prompt", "llama-2", "no-line-ends", "go-in-system"),
    ],
)
def test_chatml_is_what_renders_as_chatml(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, found: ChatML | None
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert recognise_chatml(Encoder(tokenizer)) == found


@pytest.mark.parametrize(
    ("template", "default_system", "remark"),
    [
        (TRIMMING + PROMPT, "", "trims"),
        (FORGETFUL + PROMPT, "", "</think>"),
        (DATED + QWEN + PROMPT, "It is 07 Mar 2021.", "2021-03-07"),
    ],
)
def test_what_chatml_does_that_a_modelfile_cannot_is_said(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, default_system: str, remark: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chatml = recognise_chatml(Encoder(tokenizer, "2021-03-07"))
    assert chatml is not None
    assert chatml.default_system == default_system
    assert [remark in each for each in chatml.remarks] == [True]
    text = write_modelfile("m.gguf", template=chatml_template(default_system), remarks=chatml.remarks)
    assert remark in text.partition("FROM")[0]
    assert values(text, "model") == ["./m.gguf"]
