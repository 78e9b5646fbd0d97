"""Faults planted into a good GGUF file: what a converter, a tokenizer or a template can get wrong without an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Fields = dict[str, Any]
Tensors = dict[str, tuple[np.ndarray, Any]]  # name -> data, type
Edit = Callable[[Fields, Tensors], None]


def rewrite(source: Path, target: Path, edit: Edit) -> None:
    """Write ``source`` again with other metadata or tensors; ``edit`` changes both in place."""
    from forge.training.llamacpp.native import import_gguf

    gguf = import_gguf()
    reader = gguf.GGUFReader(source)
    kinds = {name: field.types for name, field in reader.fields.items()}
    fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    edit(fields, tensors)
    writer = gguf.GGUFWriter(target, arch=fields.pop("general.architecture"))
    of_value = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
    for name, value in fields.items():
        kind = kinds.get(name) or [of_value[type(value)]]
        writer.add_key_value(name, value, kind[0], kind[-1] if kind[0] == gguf.GGUFValueType.ARRAY else None)
    for name, (data, tensor_type) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def arch(fields: Fields) -> str:
    return str(fields["general.architecture"])


def wrong_tokenizer(fields: Fields, tensors: Tensors) -> None:
    """Digits and words are parted by another rule."""
    fields["tokenizer.ggml.pre"] = "llama-bpe" if fields["tokenizer.ggml.pre"] == "gpt-2" else "gpt-2"


def bos_doubled(fields: Fields, tensors: Tensors) -> None:
    fields["tokenizer.ggml.add_bos_token"] = True


def end_of_turn_wrong(fields: Fields, tensors: Tensors) -> None:
    fields["tokenizer.ggml.eos_token_id"] = fields["tokenizer.ggml.tokens"].index("<|im_start|>")


def end_of_turn_renamed(fields: Fields, tensors: Tensors) -> None:
    tokens = list(fields["tokenizer.ggml.tokens"])
    tokens[tokens.index("<|im_end|>")] = "<|im_gone|>"
    fields["tokenizer.ggml.tokens"] = tokens


def permuted_q(fields: Fields, tensors: Tensors) -> None:
    """The two halves that RoPE turns lie interleaved where they should not, or the other way round."""
    heads = fields[f"{arch(fields)}.attention.head_count"]
    data, kind = tensors["blk.0.attn_q.weight"]
    shaped = data.reshape(heads, 2, -1, data.shape[-1]).swapaxes(1, 2)
    tensors["blk.0.attn_q.weight"] = (shaped.reshape(data.shape), kind)


def missing_head(fields: Fields, tensors: Tensors) -> None:
    """An untied head is lost, and llama.cpp takes the embedding; a tied one gets a matrix that is not the embedding."""
    if "output.weight" in tensors:
        del tensors["output.weight"]
    else:
        data, kind = tensors["token_embd.weight"]
        tensors["output.weight"] = (np.roll(data, 1, axis=0), kind)


def rope_base_changed(fields: Fields, tensors: Tensors) -> None:
    fields[f"{arch(fields)}.rope.freq_base"] /= 10.0


def layer_swapped(fields: Fields, tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("blk.0.")]:
        other = name.replace("blk.0.", "blk.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def template_trimmed(fields: Fields, tensors: Tensors) -> None:
    before = str(fields["tokenizer.chat_template"])
    fields["tokenizer.chat_template"] = before.replace("message['content']", "(message['content'] | trim)")
    assert fields["tokenizer.chat_template"] != before


def generation_prompt_missing(fields: Fields, tensors: Tensors) -> None:
    before = str(fields["tokenizer.chat_template"])
    fields["tokenizer.chat_template"] = before.replace("add_generation_prompt", "false")
    assert fields["tokenizer.chat_template"] != before


def byte_fallback(fields: Fields, tensors: Tensors) -> None:
    """The vocabulary is said to be SentencePiece's, whose unknown characters are bytes."""
    fields["tokenizer.ggml.model"] = "llama"


def matrix_scaled(fields: Fields, tensors: Tensors) -> None:
    """One matrix by a tenth too large, as by a wrong alpha."""
    data, kind = tensors["blk.1.ffn_down.weight"]
    tensors["blk.1.ffn_down.weight"] = ((data.astype(np.float32) * 1.1).astype(data.dtype), kind)


def stale_merge(fields: Fields, tensors: Tensors) -> None:
    """One attention output is not the trained one."""
    data, kind = tensors["blk.0.attn_output.weight"]
    tensors["blk.0.attn_output.weight"] = (np.zeros_like(data), kind)


# what is planted -> the function that plants it, the checks that may catch it
FAULTS: dict[str, tuple[Edit, str]] = {
    "wrong tokenizer": (wrong_tokenizer, "tokens"),
    "byte fallback": (byte_fallback, "tokens"),
    "BOS doubled": (bos_doubled, "specials"),
    "end of turn wrong": (end_of_turn_wrong, "specials"),
    "end of turn renamed": (end_of_turn_renamed, "tokens"),
    "template trimmed": (template_trimmed, "template"),
    "generation prompt missing": (generation_prompt_missing, "template"),
    "permuted q": (permuted_q, "predictions"),
    "missing head": (missing_head, "predictions"),
    "rope base changed": (rope_base_changed, "predictions"),
    "one layer swapped": (layer_swapped, "predictions"),
    "a matrix scaled by 1.1": (matrix_scaled, "predictions"),
    "a matrix not merged": (stale_merge, "predictions"),
}
