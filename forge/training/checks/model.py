"""The base model and its tokenizer, against each other, the config and the export."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forge.training.checks.finding import Finding, failure, ok, warning
from forge.training.config.workload import Workload
from forge.training.data.conversation import load_encoder
from forge.training.data.examples import Examples, describe_left_out
from forge.training.data.inputs import corpus_paths, encode_corpus, refuse_too_long
from forge.training.export.disk_space import check_architecture, check_range, check_row_sizes
from forge.training.models import smollm2
from forge.training.models.base import STANDINS, hub_is_off, require_gpu_to_make, resolve_base
from forge.training.models.lora_targets import refuse_targets
from forge.training.models.qwen2 import config_json, tensor_shapes
from forge.training.models.weights import ModelWeights, Shard, Tensor, read_weights
from forge.training.system.errors import ConfigurationError, DataError, ForgeError, MachineError
from forge.training.system.files import cache_dir


def find_base(workload: Workload, has_gpu: bool) -> tuple[ModelWeights | None, list[Finding]]:
    """The base's weights as its headers describe them, without making or fetching anything.

    A stand-in that is not made yet is described by its shape. Raises the errors of
    :func:`~forge.training.models.base.resolve_base`.
    """
    path = workload.model.path
    if path in STANDINS:
        made = sorted(cache_dir().glob(f"models/{path}-*/config.json"), key=os.path.getmtime)
        if made:
            return read_weights(made[-1].parent), [ok("model", f"the stand-in {path}")]
        require_gpu_to_make(path, lambda: has_gpu)
        return _planned_standin(path), [ok("model", f"the stand-in {path} will be made {STANDINS[path].making}, once")]
    is_offline = hub_is_off(workload.model.offline)
    if path == smollm2.NAME:
        return _find_smollm2(is_offline)
    if Path(path).is_dir():
        base = read_weights(resolve_base(path))
        return base, [ok("model", f"{base.num_parameters / 1e9:.2f} billion parameters in {path}")]
    try:
        base = read_weights(resolve_base(path, offline=True, revision=workload.model.revision))
    except MachineError:
        if is_offline:
            raise
        return None, [warning("model", f"{path} is not on this machine and will be fetched from the hub")]
    return base, [ok("model", f"{path}, {base.num_parameters / 1e9:.2f} billion parameters, in the hub's cache")]


def _find_smollm2(is_offline: bool) -> tuple[ModelWeights | None, list[Finding]]:
    if smollm2.directory().is_dir():
        return read_weights(smollm2.directory()), [ok("model", "SmolLM2-135M-Instruct")]
    if not is_offline and not smollm2.wheel_path().is_file():
        return None, [
            warning("model", "SmolLM2-135M-Instruct is not on this machine and will be fetched (93 MB), once")
        ]
    smollm2.provide_wheel(offline=is_offline)
    return None, [ok("model", "SmolLM2-135M-Instruct will be made in seconds, once")]


def _planned_standin(name: str) -> ModelWeights:
    shape = STANDINS[name].shape
    config = config_json(shape, {"<|endoftext|>": 0, "<|im_end|>": 0})
    tensors = {tensor: Tensor(tensor, "BF16", size, 0, 2 * math.prod(size)) for tensor, size in tensor_shapes(shape)}
    directory = cache_dir() / "models" / name
    shard = Shard(directory / "model.safetensors", sum(tensor.end for tensor in tensors.values()), 0, ())
    return ModelWeights(directory, config, (shard,), tensors)


def is_made(base: ModelWeights) -> bool:
    """Whether the weights are on disk, and not only planned."""
    return bool(base.shards[0].tensors)


def check_fit(workload: Workload, base: ModelWeights) -> Iterator[Finding]:
    """Lengths and LoRA targets against the model. Raises :class:`ConfigurationError`."""
    refuse_too_long(workload, base.config)
    refuse_targets(workload.lora.targets, base)
    limit = base.config.get("max_position_embeddings") or "unlimited"
    yield ok("model", f"documents of {workload.data.max_length:,} tokens fit into its {limit} positions")


def check_tokenizer(base: ModelWeights) -> Iterator[Finding]:
    """The tokenizer against the model: every id has a row, and turns have an end."""
    from tokenizers import Tokenizer

    path = base.directory / "tokenizer.json"
    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the Rust library raises bare Exception
        raise DataError(f"{path} is not a usable tokenizer: {error}") from error
    rows = int(base.config["vocab_size"])
    largest = max(vocabulary.values())
    if largest >= rows:
        raise DataError(
            f"the tokenizer has an id {largest} and the model only {rows} rows of embeddings",
            remedy="tokenizer and model do not belong together: take both from one place",
        )
    settings = json.loads((base.directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    end, padding = (_token(settings.get(f"{kind}_token")) for kind in ("eos", "pad"))
    for kind, token in (("eos", end), ("pad", padding)):
        if token is not None and token not in vocabulary:
            raise DataError(f"tokenizer_config.json names the {kind} token {token!r}, which tokenizer.json lacks")
    if end is None:
        raise DataError("the tokenizer names no eos token: answers would never end", remedy="add it to its files")
    if padding is None or padding == end:
        what = "names no pad token" if padding is None else f"pads with {end}, the token that ends a turn"
        yield warning("tokenizer", f"it {what}", "give it a pad token of its own, such as <|endoftext|> in Qwen2")
    yield ok("tokenizer", f"{len(vocabulary):,} tokens for {rows:,} rows of embeddings, turns end with {end}")


def check_examples(workload: Workload, base: ModelWeights, *, data_is_readable: bool) -> Iterator[Finding]:
    """The chat template, and every record by it: with the encoder and the code that training uses. Imports torch.

    Raises :class:`DataError` for the records.
    """
    try:
        encoder = load_encoder(base.directory)
    except ForgeError as error:
        yield failure("chat template", error)
        return
    if encoder.remarks:
        yield from (warning("chat template", remark) for remark in encoder.remarks)
    else:
        yield ok("chat template", "what is trained before a reply is what asks for it")
    if not data_is_readable:
        return
    with tempfile.TemporaryDirectory() as scratch:
        train_path, validation_path, _ = corpus_paths(workload, Path(scratch))
        encoded = encode_corpus(workload, encoder, train_path, validation_path)
    sides = {"training": encoded.train, "held out": encoded.validation}
    for name, examples in sides.items():
        if examples is not None:
            yield from _describe_examples(name, examples)


def _describe_examples(name: str, examples: Examples) -> Iterator[Finding]:
    for note in describe_left_out(name, examples.report):
        yield warning("examples", note)
    yield ok("examples", f"{name}: {len(examples):,} of {examples.report.num_tokens:,} tokens")


def _token(value: Any) -> str | None:
    """A special token as tokenizer_config.json spells it: text, or an object with the text as content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def check_export(workload: Workload, base: ModelWeights) -> Iterator[Finding]:
    """Whether llama.cpp knows the architecture and can hold its weights in the types asked for. Reads them once."""
    check_architecture(base)
    quantizations = workload.export.quantizations
    bad = []
    for quantization in quantizations:
        try:
            check_row_sizes(base, [quantization])
        except ConfigurationError as error:
            bad.append(failure("export", error))
    source = "f16"
    if is_made(base):
        try:
            source = check_range(base, quantizations)
        except ForgeError as error:
            bad.append(failure("export", error))
    yield from bad
    if not bad:
        made = "" if source == "f16" else f", quantised from {source}: float16 cannot hold the base's largest weight"
        yield ok("export", f"{base.config['architectures'][0]} as {', '.join(quantizations)}{made}")
