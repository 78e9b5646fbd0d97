"""The model under test, loaded by transformers and PEFT alone, in 16-bit weights or wider.

A process that has imported Unsloth is refused: that import rewrites the model classes, and the
judge must not run on the code it judges.
"""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.training.adapter.adapter_config import read_adapter_config
from forge.training.models.base import load_causal_model
from forge.training.models.weights import ModelWeights
from forge.training.system.environment import available_ram_bytes
from forge.training.system.errors import ConfigurationError, MachineError

_HOST_MARGIN = 1.15  # of the weights, for what loading needs beside them


@dataclass(frozen=True)
class Placement:
    """Where and how precisely to compute. ``device_map`` is transformers'; ``note`` says what is unusual."""

    device: str
    dtype: str
    device_map: Any
    max_memory: dict[Any, int] | None = None
    note: str | None = None


@dataclass(frozen=True)
class NeutralModel:
    """``causal``: transformers' causal language model, LoRA layers inside it where there is an adapter."""

    causal: Any
    device: str


def refuse_unsloth() -> None:
    """Raise :class:`MachineError` in a process that Unsloth has patched; keep everything else off the network."""
    if "unsloth" in sys.modules:
        raise MachineError(
            "unsloth is imported in this process and has rewritten transformers",
            remedy="evaluate in a fresh process: forge evaluate RUN",
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def choose_placement(base: ModelWeights, longest: int, device: str | None = None) -> Placement:
    """CUDA in bfloat16 where there is a GPU, else the CPU in float32, each only where it fits.

    ``longest``: tokens of the longest document. Layers that a GPU cannot hold wait in host memory.
    Raises :class:`MachineError` where nothing fits, :class:`ConfigurationError` for an unknown device.
    """
    import torch

    if device not in (None, "cpu", "cuda"):
        raise ConfigurationError(f"unknown device {device!r}", remedy="use cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("device cuda was asked for and none is visible on this machine", remedy="use --device cpu")
    host_bytes = available_ram_bytes() or 1 << 62
    if device != "cpu" and torch.cuda.is_available():
        free_bytes = torch.cuda.mem_get_info()[0]
        weights_bytes, working_bytes = 2 * base.num_parameters, _working_bytes(base.config, longest)
        if weights_bytes + working_bytes <= free_bytes:
            return Placement("cuda", "bfloat16", {"": 0})
        left_bytes = free_bytes - working_bytes
        if left_bytes > 0 and weights_bytes - left_bytes < host_bytes / _HOST_MARGIN:
            note = f"{(weights_bytes - left_bytes) / 2**30:.1f} GiB of the weights stay in host memory, which is slower"
            return Placement("cuda", "bfloat16", "auto", {0: left_bytes, "cpu": int(host_bytes / _HOST_MARGIN)}, note)
    if 4 * base.num_parameters * _HOST_MARGIN <= host_bytes:
        return Placement("cpu", "float32", None)
    if 2 * base.num_parameters * _HOST_MARGIN <= host_bytes:
        return Placement("cpu", "bfloat16", None, note="bfloat16 on the CPU: float32 does not fit into memory")
    needed, free = 2 * base.num_parameters / 2**30, host_bytes / 2**30
    raise MachineError(
        f"the model's {needed:.1f} GiB at 16 bits do not fit: {free:.1f} GiB are free",
        remedy="free memory, or evaluate on a larger machine: the run directory and the base are all it needs",
    )


def _working_bytes(config: dict[str, Any], longest: int) -> int:
    """What one document needs beside the weights: a layer's activations, 1,024 rows of logits, CUDA's own."""
    activations = longest * (4 * int(config.get("intermediate_size", 0)) + 8 * int(config.get("hidden_size", 0))) * 2
    logits = 3 * min(longest, 1024) * int(config.get("vocab_size", 0)) * 4
    return activations + logits + (1 << 30)


def load_model(directory: Path, placement: Placement, *, nf4_dtype: str | None = None) -> NeutralModel:
    """Load a base or merged model for inference. ``nf4_dtype``: quantise to NF4, computing in that type."""
    from transformers.utils.logging import disable_progress_bar

    if nf4_dtype is not None and placement.device != "cuda":
        raise MachineError("adapter-nf4 needs a CUDA GPU", remedy="leave it out of --subjects")
    disable_progress_bar()
    model = load_causal_model(
        directory,
        nf4_dtype or placement.dtype,
        nf4=nf4_dtype is not None,
        device_map=placement.device_map,
        max_memory=placement.max_memory,
    )
    return NeutralModel(model.eval(), placement.device)


def with_adapter(model: NeutralModel, adapter_dir: Path, placement: Placement) -> NeutralModel:
    """Put an adapter into a loaded base, which is changed by it. LoRA's factors compute in float32.

    PEFT gets the checked fields of the adapter's configuration and none of the others.
    """
    from peft import LoraConfig, PeftModel

    spread: dict[str, Any] = {}
    if placement.max_memory is not None:
        spread = {"device_map": "auto", "max_memory": placement.max_memory}
    config = LoraConfig(task_type="CAUSAL_LM", inference_mode=True, **read_adapter_config(adapter_dir).for_peft())
    adapted = PeftModel.from_pretrained(model.causal, str(adapter_dir), is_trainable=False, config=config, **spread)
    return NeutralModel(adapted.get_base_model().eval(), model.device)


def release_memory() -> None:
    """Give back what models that nobody holds any more have taken."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
