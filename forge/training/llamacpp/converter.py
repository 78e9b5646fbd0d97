"""Drives llama.cpp's own converters. Only imported in a child process: they import torch and exit at will.

Two things are added. llama.cpp recognises a tokenizer by a hash over token ids, so it can only
know vocabularies it has seen. Where it does not, the pre-tokenizer is recognised here by its
structure, and only if llama.cpp implements exactly that structure. And where a directory holds
several chat templates, the file gets the one that was trained: transformers and llama.cpp choose differently.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge.training.llamacpp.install import llama_cpp_tree
from forge.training.llamacpp.native import raise_if_full
from forge.training.system.errors import CheckError, ForgeError, MachineError
from forge.training.system.files import disk_errors
from forge.training.system.oom import memory_errors

# The regular expressions of llama.cpp's src/llama-vocab.cpp, as tokenizer.json spells them.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split_then_bytes(regex: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    }


_QWEN2 = _split_then_bytes(_WORDS + r"\p{N}" + _REST)
_LLAMA3 = _split_then_bytes(_WORDS + r"\p{N}{1,3}" + _REST)
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}

# (llama.cpp's name, pre_tokenizer, ignore_merges)
_KNOWN_PRE_TOKENIZERS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("qwen2", _QWEN2, False),
    ("llama-bpe", _LLAMA3, True),
    ("smaug-bpe", _LLAMA3, False),
    ("gpt-2", _GPT2, False),
)
_HARMLESS_NORMALIZERS = (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []})


def recognise_pre_tokenizer(specification: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json.

    Raises :class:`CheckError` unless it is one that llama.cpp implements. NFC passes although
    llama.cpp never normalises: text has to be normalised before it gets there.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    model = specification["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        raise CheckError("the tokenizer is not a byte-level BPE, and llama.cpp does not know it")
    if not set(ByteLevel.alphabet()) <= set(model["vocab"]):
        # transformers 5 makes an empty tokenizer, silently, where tokenizer.json is missing
        raise CheckError("the tokenizer's vocabulary lacks some of the 256 byte symbols")
    normalizer = specification.get("normalizer")
    if normalizer not in _HARMLESS_NORMALIZERS:
        raise CheckError(f"llama.cpp does not implement the normalizer {json.dumps(normalizer)[:100]}")
    pre_tokenizer = _without_offsets(specification.get("pre_tokenizer"))
    for name, known, ignore_merges in _KNOWN_PRE_TOKENIZERS:
        if pre_tokenizer == known and bool(model.get("ignore_merges")) == ignore_merges:
            return name
    raise CheckError(f"llama.cpp does not implement the pre-tokenizer {json.dumps(pre_tokenizer)[:200]}")


def _without_offsets(value: Any) -> Any:
    """``trim_offsets`` changes reported offsets only, never token ids."""
    if isinstance(value, dict):
        return {key: _without_offsets(item) for key, item in value.items() if key != "trim_offsets"}
    return [_without_offsets(item) for item in value] if isinstance(value, list) else value


def convert(
    model_dir: str, target: str, outtype: str, model_name: str, chat_template: str | None = None
) -> dict[str, Any]:
    """HF directory -> GGUF by convert_hf_to_gguf.py. A half-written target is the parent's to remove."""
    tree = _prepare(target)
    name = Path(target).name
    sys.argv = [str(tree / "convert_hf_to_gguf.py"), "--outfile", name, "--outtype", outtype]
    sys.argv += ["--model-name", model_name, "--", model_dir]
    _call(lambda: _convert_knowing_more(chat_template), model_dir, target)
    return {}


def _convert_knowing_more(chat_template: str | None) -> None:
    script: Any = importlib.import_module("convert_hf_to_gguf")
    text_model: Any = importlib.import_module("conversion.base").TextModel
    by_hash = text_model.get_vocab_base_pre

    def by_hash_or_structure(model: Any, tokenizer: Any) -> str:
        try:
            return str(by_hash(model, tokenizer))
        except NotImplementedError:
            return recognise_pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()))

    special_vocabulary: Any = importlib.import_module("gguf").SpecialVocab
    load = special_vocabulary._load

    def load_with_template(vocabulary: Any, path: Path) -> None:
        load(vocabulary, path)
        found = vocabulary.chat_template
        if isinstance(found, list):
            found = next((each.get("template") for each in found if each.get("name") == "default"), None)
        if chat_template is not None and found != chat_template:
            vocabulary.chat_template = chat_template

    text_model.get_vocab_base_pre = by_hash_or_structure
    special_vocabulary._load = load_with_template
    script.main()


def convert_lora(adapter_dir: str, base_dir: str, target: str) -> dict[str, Any]:
    """PEFT adapter (already canonical) -> GGUF adapter by convert_lora_to_gguf.py."""
    script = str(_prepare(target) / "convert_lora_to_gguf.py")
    sys.argv = [script, "--base", base_dir, "--outfile", Path(target).name, "--outtype", "f32", "--", adapter_dir]
    _call(lambda: runpy.run_path(script, run_name="__main__"), adapter_dir, target)
    return {}


def _prepare(target: str) -> Path:
    tree = llama_cpp_tree()
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    os.chdir(Path(target).parent)  # the converter runs str.format over --outfile: only a plain name is safe
    return tree


def _call(script: Callable[[], Any], source: str, target: str) -> None:
    refusal = f"llama.cpp's converter refuses {source}"
    try:
        with disk_errors(target), memory_errors("the conversion"):
            script()
    except ForgeError:
        raise
    except SystemExit as exit_:
        if exit_.code:
            raise CheckError(refusal) from exit_
    except (ImportError, SyntaxError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise MachineError(f"llama.cpp's converter cannot be run: {cause}", remedy="run `make setup` again") from error
    except Exception as error:  # it raises whatever it meets
        if Path(target).exists():
            raise_if_full(target)
        raise CheckError(f"{refusal}: {type(error).__name__}: {error}") from error
    if not Path(target).is_file():
        raise CheckError(f"{refusal}: it ended without an error and without a file")
