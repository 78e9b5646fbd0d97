"""What a base model is, by content: digests of its weights and of its tokenizer, and its sizes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


def base_sha256(directory: Path | str) -> str:
    """SHA-256 over the names and SHA-256 of a model's safetensors files.

    A file's digest is remembered under its path, size and time of change: 15 GB take seconds once.
    Raises :class:`DataError` if the directory holds no safetensors file.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise DataError(f"{directory} holds no safetensors file", remedy="name a model directory")
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the interpreter's lock
        digests = list(pool.map(_remembered_sha256, files))
    return sha256_json({path.name: digest for path, digest in zip(files, digests, strict=True)})


def tokenizer_sha256(directory: Path | str) -> str:
    """SHA-256 over the names and SHA-256 of a model's tokenizer files."""
    files = [Path(directory) / name for name in _TOKENIZER_FILES]
    present = {path.name: sha256_file(path) for path in files if path.is_file()}
    if not present:
        raise DataError(f"{directory} holds no tokenizer", remedy="name a model directory with its tokenizer")
    return sha256_json(present)


def _remembered_sha256(path: Path) -> str:
    state = path.stat()
    key = sha256_json([str(path.resolve()), state.st_size, state.st_mtime_ns])
    note = cache_dir() / "digests" / f"{key}.json"
    try:
        return str(json.loads(note.read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        digest = sha256_file(path)
    write_json(note, {"sha256": digest})
    return digest
