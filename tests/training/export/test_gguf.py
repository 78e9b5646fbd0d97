"""Claims about GGUF files: they compute what the original computes, and a bad one hurts nobody."""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.training.adapter.merge import merge_adapter
from forge.training.export.chat import answer
from forge.training.export.gguf import convert_lora_to_gguf, convert_to_gguf, quantize, verify_gguf
from forge.training.models.tokenizers import load_tokenizer
from forge.training.system.errors import CheckError, ConfigurationError, DataError, DiskError
from tests.support.tiny_model import (
    SENTENCES,
    gguf_file,
    merged_dir,
    scratch,
    shared_base,
    write_adapter,
    write_base,
)
from tests.support.tiny_run import edit_json


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """Imported when the first test runs: collecting the tests imports no torch."""
    global torch, load_file, save_file, AutoModelForCausalLM, AutoTokenizer
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer


AWKWARD = [
    *(
        "",
        " ",
        "\n",
        "\t\n  \n",
        "a  b   c",
        "trailing ",
        "\u00e9t\u00e9 na\u00efve",
        "\u706b\u3068\u6c34",
        "\U0001f525\U0001f9d1\u200d\U0001f680",
    ),
    *(
        "1234567890",
        "it's they'LL I'd",
        "x" * 300,
        "<|im_start|>user\nhi<|im_end|>",
        "<|im_start",
        "a\r\nb\r",
        "\u00a0\u2003\ufeff",
    ),
    *(
        "$$$ %% @@ __init__(self):\n\treturn 1e-4",
        "\u0628\u0633\u0645 \u0627\u0644\u0644\u0647",
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        "\x00\x01",
    ),
    *SENTENCES,
]


def log_probabilities(path: Path, ids: list[int], lora: Path | None = None) -> torch.Tensor:
    """(tokens, vocabulary) in nats, from llama.cpp."""
    import llama_cpp

    llm = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, n_ubatch=256, logits_all=True, verbose=False, lora_path=lora and str(lora)
    )
    llm.eval(ids)
    logits = torch.tensor(np.array(llm.scores[: len(ids)]))
    llm.close()
    return logits.double().log_softmax(-1)


def reference(directory: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def mean_kl_nats(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def token_ids() -> list[int]:
    return AutoTokenizer.from_pretrained(merged_dir())("\n".join(SENTENCES))["input_ids"][:200]


@pytest.mark.parametrize(("quantization", "limit"), [("f16", 1e-6), ("q8_0", 1e-3), ("q4_k_m", 0.05)])
def test_gguf_predicts_what_the_merged_model_predicts(quantization: str, limit: float) -> None:
    ids = token_ids()
    predicted = log_probabilities(gguf_file(quantization), ids)
    found, unmerged = (mean_kl_nats(reference(path, ids), predicted) for path in (merged_dir(), shared_base()))
    print(f"{quantization}: mean KL {found:.2e} nats; to the unmerged base {unmerged:.2e}")
    assert 0 <= found < limit
    assert unmerged > 10 * found


@pytest.mark.parametrize("quantization", ["f16", "q8_0", "q4_k_m"])
def test_good_files_pass_and_are_described(quantization: str) -> None:
    report = verify_gguf(gguf_file(quantization))
    assert report.file_type == quantization
    assert report.pre_tokenizer == "qwen2"
    assert report.has_chat_template
    assert report.fallbacks == []
    assert sum(report.tensor_types.values()) == report.num_tensors == 26


def test_llama_cpp_tokenises_as_the_tokenizer_does() -> None:
    import llama_cpp

    tokenizer = AutoTokenizer.from_pretrained(merged_dir())
    llm = llama_cpp.Llama(str(gguf_file("f16")), vocab_only=True, verbose=False)
    for text in AWKWARD:
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llm.tokenize(text.encode(), add_bos=False, special=True) == wanted, repr(text)
    rendered = llm.metadata["tokenizer.chat_template"]
    llm.close()
    assert rendered == tokenizer.chat_template


@pytest.mark.parametrize("others", ["{{ 'another' }}", {"tool_use": "{{ 'tools' }}"}], ids=["another", "unreadable"])
def test_the_trained_chat_template_is_the_files_whatever_else_the_directory_holds(tmp_path: Path, others: Any) -> None:
    import llama_cpp

    model = Path(shutil.copytree(merged_dir(), tmp_path / "model"))
    edit_json(model / "tokenizer_config.json", chat_template=others)
    trained = load_tokenizer(model).chat_template
    assert trained == (model / "chat_template.jinja").read_text(encoding="utf-8")
    convert_to_gguf(model, tmp_path / "m.gguf", chat_template=trained)
    llm = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    found = llm.metadata["tokenizer.chat_template"]
    llm.close()
    assert found == trained


@pytest.mark.slow
def test_no_path_of_this_machine_is_in_a_file() -> None:
    for path in (gguf_file("f16"), lora_file()[1]):
        content = path.read_bytes()
        for needle in (str(scratch()), tempfile_root(), str(Path.home()), "huggingface.co"):
            assert needle.encode() not in content, needle


def tempfile_root() -> str:
    import tempfile

    return f"{tempfile.gettempdir()}/forge"


@cache
def lora_file() -> tuple[Path, Path]:
    """A base and an rsLoRA adapter with patterns, both as GGUF; llama.cpp alone would scale it wrongly."""
    directory = scratch() / "lora"
    write_adapter(
        shared_base(), directory / "adapter", use_rslora=True, alpha_pattern={"up_proj": 32}, rank_pattern={"q_proj": 2}
    )
    convert_lora_to_gguf(directory / "adapter", shared_base(), directory / "adapter.gguf")
    convert_to_gguf(shared_base(), directory / "base.gguf")
    return directory / "base.gguf", directory / "adapter.gguf"


def test_adapter_as_gguf_equals_the_merged_model(tmp_path: Path) -> None:
    base, adapter = lora_file()
    merge_adapter(shared_base(dtype="bfloat16"), adapter.parent / "adapter", tmp_path / "merged")
    ids = token_ids()
    wanted = reference(tmp_path / "merged", ids)
    assert mean_kl_nats(wanted, log_probabilities(base, ids, adapter)) < 1e-4  # the merge rounds to bfloat16
    assert mean_kl_nats(wanted, log_probabilities(base, ids)) > 1e-2
    assert verify_gguf(adapter, adapter=True, base=base).architecture == "qwen2"


def header(magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return struct.pack("<4sIQQ", magic, version, tensors, entries)


def patched(content: bytes, key: str, value: int) -> bytes:
    """Replace the uint32 of a metadata key."""
    at = content.index(key.encode()) + len(key) + 4
    return content[:at] + struct.pack("<I", value) + content[at + 4 :]


def with_count(good: bytes, change: int) -> bytes:
    """The same file, which claims more or fewer tensors than it has."""
    (count,) = struct.unpack_from("<Q", good, 8)
    return good[:8] + struct.pack("<Q", count + change) + good[16:]


def without_last_token(good: bytes) -> bytes:
    """The same file in good order, but that its tokenizer has a token less than its embedding has rows."""
    from forge.training.llamacpp.native import import_gguf

    path = scratch() / "good.gguf"
    path.write_bytes(good)
    reader = import_gguf().GGUFReader(path)
    tokens, types = (reader.fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    last_info = reader.tensors[-1].field
    end = last_info.offset + sum(part.nbytes for part in last_info.parts)
    removed = []
    for field, num_last_parts in ((tokens, 2), (types, 1)):  # a string's length and its bytes; a number
        stop = field.offset + sum(part.nbytes for part in field.parts)
        removed.append((stop - sum(part.nbytes for part in field.parts[-num_last_parts:]), stop))
    content = bytearray(good[:end])
    for field in (tokens, types):
        at = field.offset + 8 + len(field.name.encode()) + 4 + 4  # key, type, type of the elements
        struct.pack_into("<Q", content, at, len(field.data) - 1)
    for start, stop in sorted(removed, reverse=True):
        del content[start:stop]
    content += bytes(-len(content) % 32)
    return patched(bytes(content) + good[reader.data_offset :], "tokenizer.ggml.eos_token_id", 0)


BAD_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", "not a GGUF file"),
    "text": (lambda good: b"hello, world" * 99, "not a GGUF file"),
    "header cut off": (lambda good: good[:20], "cut off"),
    "version 99": (lambda good: header(version=99) + good[24:], "version 99"),
    "49 bytes claiming 2**40 entries": (lambda good: header(entries=2**40) + b"\0" * 25, "do not fit"),
    "claiming 2**60 tensors": (lambda good: header(tensors=2**60) + good[24:], "do not fit"),
    "49 bytes with an endless array": (
        lambda good: header(entries=1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 2**62),
        "not a readable GGUF file",
    ),
    "cut in the metadata": (lambda good: good[:3000], "not a readable GGUF file|do not fit"),
    "cut in the tensors": (lambda good: good[:-5000], "not a readable GGUF file|refuses"),
    "a million layers": (lambda good: patched(good, "qwen2.block_count", 10**6), "block_count"),
    "eos outside the vocabulary": (lambda good: patched(good, "tokenizer.ggml.eos_token_id", 10**6), "eos_token_id"),
    "no pre-tokenizer": (lambda good: good.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.prx"), "ggml.pre"),
    "one tensor less than there is": (lambda good: with_count(good, -1), "not a readable GGUF file|refuses"),
    "one tensor more than there is": (lambda good: with_count(good, 1), "not a readable GGUF file|refuses"),
    "a token less than the embedding has rows": (without_last_token, r"token_embd\.weight.* wrong shape"),
    "a NaN weight": (lambda good: good[:-2] + b"\xc0\x7f", "refuses"),  # the last tensor is a norm in float32
    "an absurd weight": (lambda good: good[:-2] + b"\x00\x7e", "not finite"),
    "wrong head count": (lambda good: patched(good, "qwen2.attention.head_count", 7), "refuses|cannot verify"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_bounded_time(tmp_path: Path, name: str) -> None:
    spoil, complaint = BAD_FILES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(spoil(gguf_file("f16").read_bytes()))
    started = time.monotonic()
    with pytest.raises(CheckError, match=complaint):
        verify_gguf(path)
    assert time.monotonic() - started < 20


def test_the_end_of_the_tools_own_log_is_part_of_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(without_last_token(gguf_file("f16").read_bytes()))
    with pytest.raises(CheckError, match=r"(?s)llama.cpp refuses .*\n  \| .*token_embd\.weight") as error:
        verify_gguf(path)
    assert error.value.exit_code == 8


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, complaint in ((tmp_path / "pipe.gguf", "not a file"), (tmp_path, "not a file")):
        with pytest.raises(DataError, match=complaint):
            answer(path, "hello")


def test_a_weight_that_f16_cannot_hold_is_found(tmp_path: Path) -> None:
    write_base(tmp_path / "model", num_steps=0)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    convert_to_gguf(tmp_path / "model", tmp_path / "bad.gguf")  # says nothing
    with pytest.raises(CheckError, match="refuses"):
        verify_gguf(tmp_path / "bad.gguf")


def test_a_model_that_kills_llama_cpp_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "deadly.gguf"
    path.write_bytes(patched(gguf_file("f16").read_bytes(), "qwen2.block_count", 10**6))
    with pytest.raises(CheckError, match=r"killed by SIG(ABRT|SEGV)"):
        answer(path, "hello")


def test_refused_adapters_are_one_error_and_not_a_crash(tmp_path: Path) -> None:
    write_base(tmp_path / "wider", num_steps=0, intermediate_size=768)
    write_adapter(tmp_path / "wider", tmp_path / "foreign")
    convert_lora_to_gguf(tmp_path / "foreign", tmp_path / "wider", tmp_path / "foreign.gguf")
    for adapter in (tmp_path / "foreign.gguf", gguf_file("q8_0")):
        with pytest.raises(CheckError, match=r"refuses the adapter|cannot"):
            answer(gguf_file("f16"), "hello", lora=adapter)
    with pytest.raises(CheckError, match="refuses the adapter"):
        verify_gguf(tmp_path / "foreign.gguf", adapter=True, base=gguf_file("f16"))
    with pytest.raises(CheckError, match="not an adapter"):
        verify_gguf(gguf_file("q8_0"), adapter=True)
    with pytest.raises(CheckError, match="not a model"):
        verify_gguf(tmp_path / "foreign.gguf")


def test_tensors_that_cannot_take_the_type_are_named(tmp_path: Path) -> None:
    write_base(tmp_path / "model", num_steps=0, intermediate_size=320)
    convert_to_gguf(tmp_path / "model", tmp_path / "f16.gguf")
    quantize(tmp_path / "f16.gguf", tmp_path / "q4.gguf", "q4_k_m")
    report = verify_gguf(tmp_path / "q4.gguf")
    assert report.file_type == "q4_k_m"
    assert [name.split()[0] for name in report.fallbacks] == [f"blk.{layer}.ffn_down.weight" for layer in (0, 1)]


def test_quantisation_refuses_what_llama_cpp_would_die_of_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    shutil.copyfile(gguf_file("f16"), source)
    (tmp_path / "link.gguf").symlink_to(source)
    with pytest.raises(ConfigurationError, match="same file"):
        quantize(source, tmp_path / "link.gguf", "q8_0", force=True)
    with pytest.raises(ConfigurationError, match="unknown quantisation"):
        quantize(source, tmp_path / "x.gguf", "q4_2")
    with pytest.raises(CheckError, match="requantizing"):
        quantize(gguf_file("q4_k_m"), tmp_path / "x.gguf", "q8_0")
    with pytest.raises(DataError, match="No such file"):
        quantize(tmp_path / "absent.gguf", tmp_path / "x.gguf", "q8_0")
    with pytest.raises(DiskError, match="exists already"):
        quantize(gguf_file("f16"), source, "q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.gguf", "source.gguf"]
    assert source.read_bytes() == gguf_file("f16").read_bytes()


def test_models_that_the_converter_would_spoil_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(merged_dir(), model)
    tokenizer = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").unlink()  # transformers would invent an empty one
    with pytest.raises(DataError, match=r"lacks tokenizer\.json"):
        convert_to_gguf(model, tmp_path / "x.gguf")
    (model / "tokenizer.json").write_text(tokenizer)
    for path in model.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(DataError, match="holds no"):
        convert_to_gguf(model, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
