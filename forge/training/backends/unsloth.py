"""Unsloth's FastLanguageModel. Importing it rewrites transformers, trl and peft for the process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from forge.training.backends.job import StepObserver, TrainingJob
from forge.training.backends.sft_config import make_sft_config
from forge.training.backends.trl import lora_arguments, refuse_without_kernels
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload
from forge.training.system.errors import ConfigurationError, MachineError
from forge.training.system.files import cache_dir

DEFAULT_PLAN: Mapping[str, Any] = {
    "gradient_checkpointing": "offload",
    "padding": "none",
    "attention": "mixed",
    "grouping": "tokens",
    "mlp_tile_tokens": 8192,
    "loss_chunk_gib": 1.0,
}
NEEDS_GPU = True
PACKAGES: tuple[str, ...] = ("unsloth", "unsloth_zoo", "triton", "bitsandbytes")
PINNED_BY: str | None = None
LOSS_COUNTS_FIRST_LABELS = False
CASTS_ADAPTER_TO_BFLOAT16 = False


def refuse(workload: Workload, plan: Plan) -> None:
    """Raise :class:`ConfigurationError` for float32, and for what only Forge's layers carry out."""
    refuse_without_kernels(plan)
    if workload.model.dtype == "float32":
        raise ConfigurationError(
            "unsloth trains in bfloat16 or float16, the config says model.dtype=float32",
            remedy="add --set model.dtype=bfloat16, or train with --backend trl",
        )


def prepare(plan: Plan) -> None:
    """Import Unsloth before anything it patches. Raises :class:`MachineError` where it cannot run."""
    early = {"transformers", "trl", "peft"} & set(sys.modules)
    if early:
        raise MachineError(f"{', '.join(sorted(early))} was imported before unsloth", remedy="start a fresh process")
    if find_spec("unsloth") is None:
        raise MachineError(
            "unsloth is not installed",
            remedy="install requirements-gpu.txt on a machine with a CUDA GPU, or train with --backend trl",
        )
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # else it asks the hub for a counter at every load
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth_compiled"))  # else: in the cwd
    if plan.loss_chunk_gib is not None:
        # read at import; without it the chunk follows the memory that is free, up to 4 GiB
        os.environ["UNSLOTH_CE_LOSS_TARGET_GB"] = str(plan.loss_chunk_gib)
    try:
        import unsloth  # noqa: F401
    except Exception as error:
        raise MachineError(
            f"unsloth does not import here: {type(error).__name__}: {str(error).splitlines()[0]:.300}",
            remedy="see `check CONFIG --backend unsloth`; train with --backend trl meanwhile",
        ) from error


def build(job: TrainingJob, observer: StepObserver) -> Any:
    """The trainer for ``job``. Raises :class:`MachineError` if Unsloth silently left the plan's path."""
    import torch
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    from forge.training.backends.trainer import forge_trainer

    workload, plan = job.workload, job.plan
    checkpointing: Any = {"none": False, "full": True, "offload": "unsloth"}[plan.gradient_checkpointing]
    if plan.kernels == "forge":
        checkpointing = False  # Forge's layers decide what is kept
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(job.base_dir),  # absolute: a relative one is taken for a hub name
        max_seq_length=workload.data.max_length,
        dtype=getattr(torch, workload.model.dtype),
        load_in_4bit=workload.model.quantization == "nf4",
        use_exact_model_name=True,  # else it swaps in its own pre-quantised weights
        use_gradient_checkpointing=checkpointing,
        random_state=workload.training.seed,
        fix_tokenizer=False,
        trust_remote_code=False,
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        **lora_arguments(job),
        use_gradient_checkpointing=checkpointing,
        random_state=workload.training.seed,
    )
    if plan.mlp_tile_tokens is not None and plan.kernels == "stack":
        tile_mlps(model, plan.mlp_tile_tokens)
    config = make_sft_config(SFTConfig, job, max_length=workload.data.max_length)
    trainer = forge_trainer(SFTTrainer)(job, observer, model, config)
    if plan.padding == "none" and not getattr(trainer.data_collator, "padding_free", False):
        raise MachineError(
            "unsloth turned padding-free batches off although the plan asks for them",
            remedy="set plan.padding=longest, or look at unsloth's message above",
        )
    return trainer


def tile_mlps(model: Any, tile_tokens: int) -> None:
    """Take micro-batches longer than ``tile_tokens`` through every MLP a tile at a time while training.

    An MLP's activations are its width over the hidden size (5.3 times in Qwen2-7B) as large as
    what it reads, several of them at once; tiled, they are bounded by the tile. Unsloth Zoo's
    ``TiledMLP`` computes each tile again in the backward pass, under the forward's random state, so
    dropout's masks are the same. Its own switch tiles every batch, short ones too, and pays for it.
    """
    from unsloth_zoo.tiled_mlp import TiledMLP

    def tiled(mlp: Any, whole: Any) -> Any:
        def forward(hidden: Any) -> Any:
            num_tokens = hidden.shape[0] * hidden.shape[1]
            if not mlp.training or num_tokens <= tile_tokens:
                return whole(hidden)
            return TiledMLP.apply(whole, mlp, hidden, True, num_tokens // tile_tokens, tile_tokens)

        return forward

    mlps = [module for name, module in model.named_modules() if name.endswith(".mlp")]
    if not mlps:
        raise MachineError("plan.mlp_tile_tokens: this model has no .mlp module to tile", remedy="leave it out")
    for mlp in mlps:
        mlp.forward = tiled(mlp, mlp.forward)
