"""Claims about tokenizers: the rebuilt one is Qwen2's, and the small one is like it in everything but its size."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.training.llamacpp.converter import recognise_pre_tokenizer
from forge.training.llamacpp.install import llama_cpp_tree
from forge.training.models.qwen2 import documentation
from forge.training.models.tokenizers import (
    CONTROL_TOKENS,
    DEFAULT_SYSTEM_PROMPT,
    rebuild_qwen2_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from forge.training.system.errors import MachineError
from tests.support.tiny_model import SENTENCES, scratch

# All in NFC: llama.cpp does not normalise, the tokenizer does.
AWKWARD = (
    *("", " ", "\n", "\t\n  \n", "a  b   c", "trailing ", "   leading", "a\r\nb\r", "\u00a0\u2003\ufeff", "x" * 300),
    *("été naïve", "火と水。", "\U0001f525\U0001f9d1\u200d\U0001f680", "بسم الله", "हिन्दी", "\x01\x7f"),
    *("1234567890 ٣٤ Ⅻ ½", "it's they'LL I'd don'T", "$$$ %% @@ __init__(self):\n\treturn 1e-4  # ..."),
    *("<|im_start|>user\nhi<|im_end|>", "<|im_start", "<|im_start|><|endoftext|>", "<|IM_END|>", "a<|im_end|> b"),
    *SENTENCES,
)


@cache
def rebuilt() -> Any:
    return rebuild_qwen2_tokenizer()


@cache
def saved(kind: str) -> Path:
    """The real tokenizer, or a small one of 600 entries, as the files that transformers reads."""
    directory = scratch() / f"tokenizer-{kind}"
    directory.mkdir()
    save_tokenizer(rebuilt() if kind == "qwen2" else train_tokenizer(SENTENCES, 600), directory, 2048)
    return directory


@cache
def from_transformers(kind: str) -> Any:
    from transformers import AutoConfig, AutoTokenizer

    from forge.training.models.base import QWEN2_7B
    from forge.training.models.qwen2 import write_configs

    tokenizer = rebuilt() if kind == "qwen2" else train_tokenizer(SENTENCES, 600)
    write_configs(QWEN2_7B, {token: tokenizer.token_to_id(token) for token in CONTROL_TOKENS}, saved(kind))
    assert AutoConfig.from_pretrained(saved(kind)).model_type == "qwen2"
    return AutoTokenizer.from_pretrained(saved(kind))


@pytest.fixture(scope="module")
def ids_of_llama_cpp() -> Iterator[Callable[[str], list[int]]]:
    """llama.cpp's own reading of the vocabulary file."""
    import llama_cpp

    path = llama_cpp_tree() / "models" / "ggml-vocab-qwen2.gguf"
    with closing(llama_cpp.Llama(str(path), vocab_only=True, verbose=False)) as model:
        yield lambda text: list(model.tokenize(text.encode(), add_bos=False, special=True))


@pytest.mark.slow
def test_the_rebuilt_tokenizer_has_qwen2s_control_tokens_at_their_ids() -> None:
    assert [rebuilt().token_to_id(token) for token in CONTROL_TOKENS] == [151643, 151644, 151645]
    assert rebuilt().get_vocab_size() == 151646


@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: repr(text)[:30])
def test_the_rebuilt_tokenizer_gives_llama_cpps_ids(text: str, ids_of_llama_cpp: Callable[[str], list[int]]) -> None:
    expected = ids_of_llama_cpp(text)
    assert rebuilt().encode(text, add_special_tokens=False).ids == expected
    assert from_transformers("qwen2").encode(text, add_special_tokens=False) == expected


@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=60))
def test_the_rebuilt_tokenizer_gives_llama_cpps_ids_for_any_normalised_text(
    ids_of_llama_cpp: Callable[[str], list[int]], text: str
) -> None:
    normalised = rebuilt().normalizer.normalize_str(text)
    ids = rebuilt().encode(normalised, add_special_tokens=False).ids
    assert ids == ids_of_llama_cpp(normalised)
    assert rebuilt().decode(ids, skip_special_tokens=False) == normalised


def test_the_converter_knows_the_rebuilt_tokenizer_by_its_hash() -> None:
    code = (
        "import sys; tree, directory = sys.argv[1:]\n"
        "sys.path[:0] = [tree, tree + '/gguf-py']\n"
        "from transformers import AutoTokenizer\n"
        "from conversion.base import TextModel\n"
        "print(TextModel.get_vocab_base_pre(object.__new__(TextModel), AutoTokenizer.from_pretrained(directory)))"
    )
    from_transformers("qwen2")  # writes the configuration that AutoTokenizer looks at
    command = [sys.executable, "-c", code, str(llama_cpp_tree()), str(saved("qwen2"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[-1:] == ["qwen2"], done.stderr


def test_the_small_tokenizer_has_its_size_every_byte_and_the_control_tokens_last() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = train_tokenizer([text for _, text in documentation()[:5]], 512)
    assert tokenizer.get_vocab_size() == 512
    assert set(ByteLevel.alphabet()) <= set(tokenizer.get_vocab())
    assert [tokenizer.token_to_id(token) for token in CONTROL_TOKENS] == [509, 510, 511]


def test_the_small_tokenizer_is_recognised_as_qwen2s_by_its_structure() -> None:
    assert recognise_pre_tokenizer(json.loads((saved("small") / "tokenizer.json").read_text())) == "qwen2"


def test_the_small_tokenizer_is_the_same_each_time_it_is_trained() -> None:
    code = (
        "import sys; from forge.training.models.tokenizers import train_tokenizer\n"
        "sys.stdout.write(train_tokenizer(eval(sys.argv[1]), 600).to_str())"
    )
    processes = [  # other processes: hash seeds and the order of threads differ
        subprocess.run([sys.executable, "-c", code, repr(SENTENCES)], capture_output=True, timeout=120, check=True)
        for _ in range(2)
    ]
    assert len({hashlib.sha256(process.stdout).hexdigest() for process in processes}) == 1
    assert processes[0].stdout.decode() == train_tokenizer(SENTENCES, 600).to_str()


@pytest.mark.parametrize("kind", ["qwen2", "small"])
def test_nothing_is_added_to_a_text_and_padding_is_not_the_end_of_a_turn(kind: str) -> None:
    tokenizer = from_transformers(kind)
    assert tokenizer.encode("a forge") == tokenizer.encode("a forge", add_special_tokens=False)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    for token in CONTROL_TOKENS:
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]


@pytest.mark.parametrize("kind", ["qwen2", "small"])
@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: repr(text)[:30])
def test_what_is_encoded_comes_back(kind: str, text: str) -> None:
    tokenizer = from_transformers(kind)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


TURNS = [
    {"role": "user", "content": "What's it? {{ x }} 'quoted' \\ \n火"},
    {"role": "assistant", "content": "  kept as it is \n"},
    {"role": "user", "content": ""},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def rendered_by_hand(messages: list[dict[str, str]], *, answer_next: bool) -> str:
    """ChatML as Qwen2's documentation describes it."""
    turns = messages if messages[0]["role"] == "system" else [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}]
    turns = turns if turns is messages else turns + messages
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return text + ("<|im_start|>assistant\n" if answer_next else "")


@pytest.mark.parametrize("answer_next", [True, False])
@pytest.mark.parametrize("messages", [TURNS, [SYSTEM, *TURNS], TURNS[:1], [SYSTEM]], ids=str)
def test_the_template_renders_chatml_with_qwen2s_default_system_turn(
    messages: list[dict[str, str]], answer_next: bool
) -> None:
    tokenizer = from_transformers("small")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    assert text == rendered_by_hand(messages, answer_next=answer_next)


def test_a_tree_without_the_vocabulary_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py"):
        (tmp_path / name).symlink_to(llama_cpp_tree() / name)
    monkeypatch.setenv("FORGE_LLAMA_CPP", str(tmp_path))
    with pytest.raises(MachineError, match=r"ggml-vocab-qwen2\.gguf is missing"):
        rebuild_qwen2_tokenizer()
