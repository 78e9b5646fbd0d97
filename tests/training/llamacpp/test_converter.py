"""Claims about llama.cpp's converter: it is found or said to be missing, and no tokenizer is guessed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.training.llamacpp.converter import recognise_pre_tokenizer
from forge.training.llamacpp.install import llama_cpp_tree, load_llama_cpp, supported_architectures
from forge.training.system.errors import CheckError, MachineError
from tests.support.tiny_model import shared_base

SPECIFICATIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "other digits": (lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x"), "pre-tokenizer"),
    "spaces prefixed": (
        lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "pre-tokenizer",
    ),
    "none": (lambda s: s.update(pre_tokenizer=None), "pre-tokenizer"),
    "merges ignored": (lambda s: s["model"].update(ignore_merges=True), "pre-tokenizer"),
    "lower case": (lambda s: s.update(normalizer={"type": "Lowercase"}), "normalizer"),
    "empty vocabulary": (lambda s: s["model"].update(vocab={}), "256 byte symbols"),
    "byte fallback": (lambda s: s["model"].update(byte_fallback=True), "byte-level BPE"),
    "unigram": (lambda s: s["model"].update(type="Unigram"), "byte-level BPE"),
}


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_only_pre_tokenizers_that_llama_cpp_implements_are_recognised(name: str) -> None:
    specification = json.loads((shared_base() / "tokenizer.json").read_text())
    assert recognise_pre_tokenizer(specification) == "qwen2"
    change, complaint = SPECIFICATIONS[name]
    change(specification)
    with pytest.raises(CheckError, match=complaint):
        recognise_pre_tokenizer(specification)


def test_llama_cpp_is_found_and_its_absence_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_llama_cpp()
    assert "Qwen2ForCausalLM" in supported_architectures()
    tree = llama_cpp_tree()
    monkeypatch.setenv("FORGE_LLAMA_CPP", str(tmp_path))
    with pytest.raises(MachineError, match="is not at"):
        load_llama_cpp()
    shutil.copyfile(tree / "convert_hf_to_gguf.py", tmp_path / "convert_hf_to_gguf.py")
    with pytest.raises(MachineError, match="incomplete"):
        load_llama_cpp()
    os.environ.pop("FORGE_LLAMA_CPP", None)
