"""What a base model is, by content: digests of its weights and of its tokenizer, and its sizes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.training.models.weights import largest_magnitude, read_shard, read_whole
from forge.training.system.errors import DataError
from forge.training.system.files import cache_dir, read_json_object, sha256_file, sha256_json, write_json

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
)


_SIZES = (
    *("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings"),
)
_NO_SIZES = ("model_type", "tie_word_embeddings")
_NEEDED_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_attention_heads")


def model_shape(directory: Path | str) -> dict[str, Any]:
    """The sizes in a model's ``config.json``: what its memory floor and its floating-point operations follow from."""
    config = read_json_object(Path(directory) / "config.json")
    return {key: config[key] for key in _SIZES if config.get(key) is not None}


def refuse_strange_sizes(path: Path, config: dict[str, Any]) -> None:
    """Raise :class:`DataError` where a ``config.json`` lacks a size, or one is not a whole number above zero."""
    for key in _SIZES:
        size = config.get(key)
        needed = key in _NEEDED_SIZES
        if key in _NO_SIZES or (size is None and not needed):
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 1 << 40:
            raise DataError(
                f"{path}: {key} is {size!r:.40}, not a number above zero" if key in config else f"{path} has no {key}",
                remedy="copy the model's files again from where it came from",
            )
    if config["hidden_size"] % config["num_attention_heads"] and not config.get("head_dim"):
        raise DataError(f"{path}: hidden_size is not a multiple of num_attention_heads")


@dataclass(frozen=True)
class LargestWeight:
    """The largest absolute value in a model's weights, NaN or infinity included, and where it stands."""

    value: float
    tensor: str
    file: Path


def base_sha256(directory: Path | str) -> str:
    """SHA-256 over the names and SHA-256 of a model's safetensors files.

    A file's digest is remembered under its path, size and time of change: 15 GB take seconds once.
    Raises :class:`DataError` if the directory holds no safetensors file.
    """
    return sha256_json({path.name: note["sha256"] for path, note in _notes(Path(directory))})


def largest_weight(directory: Path | str) -> LargestWeight:
    """Found while the weights are digested, and remembered with their digests. Raises as :func:`base_sha256`."""
    found = [LargestWeight(float(n["largest"]), n["tensor"], path) for path, n in _notes(Path(directory))]
    return max(found, key=lambda weight: weight.value if math.isfinite(weight.value) else math.inf)


def _notes(directory: Path) -> list[tuple[Path, dict[str, str]]]:
    """What is remembered of each of a model's safetensors files."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise DataError(f"{directory} holds no safetensors file", remedy="name a model directory")
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib and numpy release the interpreter's lock
        notes = pool.map(lambda path: _remembered(path, _read_weights_file, ("sha256", "largest", "tensor")), files)
        return list(zip(files, notes, strict=True))


def tokenizer_sha256(directory: Path | str) -> str:
    """SHA-256 over the names and SHA-256 of a model's tokenizer files."""
    files = [Path(directory) / name for name in _TOKENIZER_FILES]
    present = {path.name: sha256_file(path) for path in files if path.is_file()}
    if not present:
        raise DataError(f"{directory} holds no tokenizer", remedy="name a model directory with its tokenizer")
    return sha256_json(present)


def remembered_sha256(path: Path) -> str:
    """A file's SHA-256, remembered under its path, size and time of change."""
    return _remembered(path, lambda path: {"sha256": sha256_file(path)}, ("sha256",))["sha256"]


def remember_sha256(path: Path, sha256: str) -> None:
    """Spare :func:`remembered_sha256` the reading of a file that was just digested."""
    write_json(_note(path), {"sha256": sha256})


def _remembered(path: Path, find: Callable[[Path], dict[str, str]], keys: Sequence[str]) -> dict[str, str]:
    note = _note(path)
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        return {key: str(known[key]) for key in keys}
    except (OSError, ValueError, KeyError, TypeError):
        found = find(path)
    write_json(note, found)
    return found


def _note(path: Path) -> Path:
    state = path.stat()
    key = sha256_json([str(path.resolve()), state.st_size, state.st_mtime_ns])
    return cache_dir() / "digests" / f"{key}.json"


def _read_weights_file(path: Path) -> dict[str, str]:
    """A safetensors file's SHA-256, its largest weight and that weight's tensor. Reads the file once."""
    try:
        shard = read_shard(path)
    except DataError:  # a digest needs no header; whoever reads the weights says what is wrong with it
        return {"sha256": sha256_file(path), "largest": "0.0", "tensor": ""}
    digest, largest, where = hashlib.sha256(), 0.0, ""
    with open(path, "rb") as stream:
        for tensor, raw in read_whole(stream, shard):
            digest.update(raw)
            value = largest_magnitude(raw, tensor.dtype) if tensor is not None else 0.0
            if tensor is not None and not value <= largest and not math.isnan(largest):
                largest, where = value, tensor.name
    return {"sha256": digest.hexdigest(), "largest": repr(largest), "tensor": where}
