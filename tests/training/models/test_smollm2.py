"""The base `smollm2`: fetched once, checked, made in seconds; llama.cpp makes the same file and ids of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from forge.training.config.workload import Workload
from forge.training.models import smollm2
from forge.training.models.base import is_here, resolve_base
from forge.training.system.errors import DataError, MachineError

AWKWARD = [
    "The year 1911, 48 ships; it's what we'll do.",
    "  two  blanks\n\n\ttab\r\n",
    "Wer übt, wird besser. 火と水。 ½ ² ٣",
    "def f(x):\n    return x ** 2  # <|im_end|> as text",
    "\U0001f98a e\u0301 \u200b\ufeff",
]


@pytest.fixture
def base() -> Path:
    """The base of this machine; set-up has fetched what it is made from."""
    return resolve_base("smollm2", offline=True)


def test_offline_without_the_package_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    with pytest.raises(MachineError, match=r"is missing, and Forge is offline") as caught:
        resolve_base("smollm2")
    assert "--online" in str(caught.value.remedy)
    assert not is_here("smollm2")


def test_another_file_under_the_packages_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    smollm2.wheel_path().parent.mkdir()
    smollm2.wheel_path().write_bytes(b"PK")
    with pytest.raises(DataError, match="SHA-256 differs"):
        resolve_base("smollm2")
    assert not any(path.is_dir() for path in (tmp_path / "models").iterdir())


def test_check_says_what_will_be_fetched_or_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from forge.training.checks.model import find_base

    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))

    def workload(offline: bool) -> Workload:
        model = {"path": "smollm2", "offline": offline}
        return Workload.model_validate({"name": "w", "model": model, "data": {"documents": "embedded"}})

    weights, (finding,) = find_base(workload(False), has_gpu=False)
    assert (weights, finding.level) == (None, "warning")
    assert "fetched" in finding.message
    with pytest.raises(MachineError, match="offline"):
        find_base(workload(True), has_gpu=False)


@pytest.mark.slow
def test_it_is_made_in_seconds_from_the_package_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = smollm2.wheel_path()
    tree = os.environ.get("FORGE_LLAMA_CPP") or str(next(wheel.parents[1].glob("llama_cpp_python-*/llama.cpp")))
    monkeypatch.setenv("FORGE_LLAMA_CPP", tree)
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    smollm2.wheel_path().parent.mkdir()
    smollm2.wheel_path().symlink_to(wheel)
    started = time.monotonic()
    made = resolve_base("smollm2")
    assert time.monotonic() - started < 60
    assert made.parent == tmp_path / "models"
    assert sorted(path.name for path in made.iterdir()) == [
        *("LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert "license: apache-2.0" in (made / "README.md").read_text()
    assert "Apache License" in (made / "LICENSE").read_text()


@pytest.mark.slow
def test_llama_cpps_converter_gives_back_the_packages_own_file(base: Path, tmp_path: Path) -> None:
    import zipfile

    from forge.training.llamacpp.install import llama_cpp_tree
    from forge.training.llamacpp.native import import_gguf

    target = tmp_path / "f16.gguf"
    converter = llama_cpp_tree() / "convert_hf_to_gguf.py"
    command = [sys.executable, str(converter), str(base), "--outfile", str(target), "--outtype", "f16"]
    subprocess.run(command, check=True, capture_output=True)
    gguf = import_gguf()
    with zipfile.ZipFile(smollm2.wheel_path()) as archive:
        original = gguf.GGUFReader(archive.extract(smollm2._MEMBER, tmp_path))
    converted = gguf.GGUFReader(target)
    tensors = {tensor.name: tensor for tensor in converted.tensors}
    assert tensors.keys() == {tensor.name for tensor in original.tensors}
    for tensor in original.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        assert np.array_equal(values, tensors[tensor.name].data.astype(np.float16)), tensor.name
    for key in ("tokens", "token_type", "merges", "pre", "bos_token_id", "eos_token_id"):
        name = f"tokenizer.ggml.{key}"
        assert original.fields[name].contents() == converted.fields[name].contents(), key
    for key in ("rope.freq_base", "attention.head_count", "attention.head_count_kv", "context_length"):
        name = f"llama.{key}"
        assert original.fields[name].contents() == converted.fields[name].contents(), key


@pytest.mark.slow
def test_llama_cpp_reads_text_as_the_tokenizer_does(base: Path, tmp_path: Path) -> None:
    import zipfile

    import llama_cpp

    from forge.training.models.tokenizers import load_tokenizer

    with zipfile.ZipFile(smollm2.wheel_path()) as archive:
        path = archive.extract(smollm2._MEMBER, tmp_path)
    native = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    tokenizer = load_tokenizer(base)
    for text in AWKWARD:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == native.tokenize(text.encode(), add_bos=False, special=False), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@pytest.mark.slow
def test_it_speaks(base: Path) -> None:
    import torch

    from forge.training.models.base import load_causal_model
    from forge.training.models.tokenizers import load_tokenizer

    model, tokenizer = load_causal_model(base, "float32", nf4=False, device_map="cpu"), load_tokenizer(base)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])
    assert answer[0, -1] == tokenizer.eos_token_id


@pytest.mark.network
def test_pip_fetches_the_pinned_package_and_compares_its_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    path = smollm2.provide_wheel(offline=False)
    assert path.parent.parent == tmp_path
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    path.unlink()
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(MachineError, match="pip could not fetch"):
        smollm2.provide_wheel(offline=False)
    assert not path.exists()
