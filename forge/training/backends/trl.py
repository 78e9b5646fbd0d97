"""Today's TRL at honest settings: fused loss head, SDPA attention, PEFT's own adapters."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from forge.training.backends.job import StepObserver, TrainingJob
from forge.training.backends.sft_config import make_sft_config
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload
from forge.training.models.base import load_causal_model
from forge.training.system.errors import ConfigurationError, MachineError

DEFAULT_PLAN: Mapping[str, Any] = {"gradient_checkpointing": "full", "padding": "longest", "grouping": "length"}
NEEDS_GPU = False
PACKAGES: tuple[str, ...] = ()
PINNED_BY: str | None = None
LOSS_COUNTS_FIRST_LABELS = False
CASTS_ADAPTER_TO_BFLOAT16 = True


def refuse(workload: Workload, plan: Plan) -> None:
    """Raise :class:`ConfigurationError` for parts of a plan that only Unsloth, or only Forge's layers, carry out."""
    refuse_without_kernels(plan)
    by_stack = plan.kernels == "stack"
    only_unsloths = {
        "gradient_checkpointing": by_stack and plan.gradient_checkpointing == "offload",
        "mlp_tile_tokens": by_stack and plan.mlp_tile_tokens is not None,
        "loss_chunk_gib": plan.loss_chunk_gib is not None,
    }
    named = [f"plan.{key}={getattr(plan, key)}" for key, is_set in only_unsloths.items() if is_set]
    if named:
        raise ConfigurationError(
            f"TRL cannot carry out {', '.join(named)}: only the backend unsloth can",
            remedy="leave it out of the plan, or train with --backend unsloth",
        )


def refuse_without_kernels(plan: Plan) -> None:
    """Raise :class:`ConfigurationError` for what only Forge's layers carry out in a plan without them."""
    asked = {"kept_activations_gib": plan.kept_activations_gib is not None, "dequantize_once": plan.dequantize_once}
    named = [f"plan.{key}" for key, is_set in asked.items() if is_set]
    if plan.kernels == "stack" and named:
        raise ConfigurationError(
            f"{' and '.join(named)}: only Forge's layers can", remedy="add --plan kernels=forge, or leave it out"
        )


def prepare(plan: Plan) -> None:
    """Raise :class:`MachineError` in a process that Unsloth has patched; switch telemetry off."""
    if "unsloth" in sys.modules:
        raise MachineError("unsloth is imported in this process and has rewritten trl", remedy="start a fresh process")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def build(job: TrainingJob, observer: StepObserver) -> Any:
    """The trainer for ``job``."""
    import torch
    from trl import SFTConfig, SFTTrainer

    from forge.training.backends.trainer import forge_trainer

    trainer_class = SFTTrainer if torch.cuda.is_available() else _with_models_own_loss(SFTTrainer)
    config = make_sft_config(SFTConfig, job, use_cpu=not torch.cuda.is_available())
    return forge_trainer(trainer_class)(job, observer, load_model(job), config, peft_config=lora_config(job))


def _with_models_own_loss(base: Any) -> Any:
    """SFTTrainer for a CPU: TRL 1.15's loss head is a Triton kernel, which needs a GPU.

    The model's own loss is the same mean over the step's trained tokens, from full logits.
    """
    from transformers import Trainer

    class CpuTrainer(base):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return Trainer.compute_loss(self, *args, **kwargs)

    return CpuTrainer


def load_model(job: TrainingJob) -> Any:
    """The frozen base: 16 or 32 bits, or NF4. Raises :class:`MachineError` for NF4 without a GPU."""
    import torch

    has_gpu = torch.cuda.is_available()
    nf4 = job.workload.model.quantization == "nf4"
    if nf4 and not has_gpu:
        raise MachineError(
            "model.quantization=nf4 needs a CUDA GPU and this machine shows none",
            remedy="train on a GPU, or set model.quantization=none for a small model",
        )
    device_map = {"": 0} if has_gpu else None
    return load_causal_model(job.base_dir, job.workload.model.dtype, nf4=nf4, device_map=device_map)


def lora_arguments(job: TrainingJob) -> dict[str, Any]:
    """What the config says of the run's adapter, in PEFT's words."""
    lora = job.workload.lora
    return {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "use_rslora": lora.use_rslora,
        "bias": "none",
    }


def lora_config(job: TrainingJob) -> Any:
    """PEFT's configuration of the run's adapter."""
    from peft import LoraConfig

    return LoraConfig(**lora_arguments(job), task_type="CAUSAL_LM")
