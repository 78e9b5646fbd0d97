"""Qwen2's tokenizer: rebuilt from llama.cpp's vocabulary file, or made small from a text.

Both have Qwen2's normaliser, pre-tokenizer and byte alphabet, so that llama.cpp's "qwen2"
pre-tokenizer is theirs: the real one is recognised by its hash, the small one by its structure.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from forge.training.llamacpp.install import llama_cpp_tree
from forge.training.llamacpp.native import import_gguf
from forge.training.system.errors import ConfigurationError, DataError, MachineError
from forge.training.system.files import write_json

# How Qwen2 splits text before merging bytes: contractions, words, single digits, punctuation, blanks.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
# ChatML as Qwen2 writes it: a default system turn where the conversation has none.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CONTROL_TYPE = 3  # gguf.TokenType.CONTROL
_NORMAL_TYPE = 1  # gguf.TokenType.NORMAL


def _with_qwen2_rules(tokenizer: Any) -> Any:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Any:
    """A byte-level BPE ``tokenizers.Tokenizer``, control tokens last; fewer entries than asked where text is short."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = _with_qwen2_rules(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    return tokenizer


def rebuild_qwen2_tokenizer() -> Any:
    """The real Qwen2 tokenizer (151,646 entries) from the vocabulary file of the llama.cpp tree.

    Raises :class:`MachineError` where the tree or the file is missing.
    """
    from tokenizers import AddedToken, Tokenizer, models

    path = llama_cpp_tree() / "models" / "ggml-vocab-qwen2.gguf"
    if not path.is_file():
        raise MachineError(
            f"{path} is missing: the Qwen2 tokenizer is rebuilt from it", remedy="run `make setup` again"
        )
    fields = import_gguf().GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _NORMAL_TYPE}
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TYPE]
    tokenizer = _with_qwen2_rules(Tokenizer(models.BPE(vocab=vocabulary, merges=merges)))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    assert [tokenizer.token_to_id(token) for token in control] == [tokens.index(token) for token in control]
    return tokenizer


def import_without_torch() -> None:
    """Import transformers' tokenizers and not PyTorch, which they do not need and which takes seconds.

    Only for a process that will never use a model; nothing happens where either is imported already.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    before = os.environ.get("TRANSFORMERS_VERBOSITY")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it would say that PyTorch was not found
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from transformers import AutoTokenizer  # noqa: F401
    finally:
        del sys.modules["torch"]
        if before is None:
            del os.environ["TRANSFORMERS_VERBOSITY"]
        else:
            os.environ["TRANSFORMERS_VERBOSITY"] = before


def load_tokenizer(directory: Path | str) -> Any:
    """A base's tokenizer, never from the hub; padding on the right (Unsloth drops the mask and relies on it).

    Its ``chat_template`` is one text, or ``None``. Raises :class:`DataError` where its files cannot be used,
    :class:`ConfigurationError` for several templates without a default.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust library raises bare Exception, transformers what its parsing happens to meet
        problem = str(error).partition("\n")[0]
        raise DataError(
            f"{directory} holds no usable tokenizer: {type(error).__name__}: {problem:.200}",
            remedy="copy the tokenizer's files again from where the model came from",
        ) from error
    tokenizer.padding_side = "right"
    tokenizer.chat_template = default_template(tokenizer.chat_template)
    return tokenizer


def default_template(templates: Any) -> str | None:
    """The chat template of a conversation without tools: the only one, or of several the one named ``default``.

    ``templates``: a text, texts by name, a list of ``{name, template}``, or ``None``. Raises
    :class:`ConfigurationError` for several without a default.
    """
    if isinstance(templates, list | tuple):
        templates = {item.get("name"): item.get("template") for item in templates if isinstance(item, dict)}
    if not isinstance(templates, dict):
        return templates or None
    template = templates.get("default")
    if isinstance(template, str):
        return template
    names = ", ".join(sorted(map(str, templates))) or "none"
    raise ConfigurationError(
        f"the base model's tokenizer has several chat templates, and none is named default (it has: {names:.200})",
        remedy="write the one to train with into chat_template.jinja in the base's directory",
    )


def save_tokenizer(tokenizer: Any, directory: Path, max_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` as transformers 4 and 5 read them."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in CONTROL_TOKENS
    }
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    config = {
        "add_prefix_space": False,
        "add_bos_token": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": "<|endoftext|>",  # not the end-of-turn token: padding must not teach the model to stop
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(directory / "tokenizer_config.json", config)
    # transformers 4 wants the two halves of tokenizer.json as files of their own as well
    model = json.loads(tokenizer.to_str())["model"]
    write_json(directory / "vocab.json", model["vocab"])
    pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")
