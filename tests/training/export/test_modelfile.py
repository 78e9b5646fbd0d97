"""Claims about the Modelfile: what is written is what Ollama's grammar reads; mistakes have a line number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.training.export.chat_template import chatml_default_system
from forge.training.export.modelfile import chatml_template, parse_modelfile, write_modelfile
from forge.training.system.errors import CheckError, ConfigurationError
from tests.support.tiny_model import CHAT_TEMPLATE


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


QWEN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "default_system"),
    [
        (CHAT_TEMPLATE, "You are a helpful assistant."),
        (QWEN + PROMPT, ""),
        (QWEN, None),
        ("{% for m in messages %}[INST]{{ m.content }}{% endfor %}", None),
        ("{% broken", None),
        ("{{ ''.__class__.__mro__ }}", None),
    ],
    ids=["qwen2", "plain", "no-prompt", "llama-2", "broken", "hostile"],
)
def test_only_chatml_counts_as_chatml(template: str, default_system: str | None) -> None:
    assert chatml_default_system(template) == default_system
