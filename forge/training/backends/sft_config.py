"""Every field of SFTConfig, passed explicitly to every backend.

Importing Unsloth replaces ``trl.SFTConfig`` by a class whose defaults differ in silence (seed
3407, 8-bit AdamW, weight decay, ...), and defaults move between TRL's releases. So the
constructor is given every field it knows: what the config and the plan say, and TRL's own default,
read from TRL's own class, for the rest.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from forge.training.backends.job import TrainingJob


def sft_fields(job: TrainingJob) -> dict[str, Any]:
    """The fields that the config and the plan decide, by their names in TRL 1.15."""
    workload, plan = job.workload, job.plan
    optimizer, training = workload.optimizer, workload.training
    recomputes = plan.gradient_checkpointing != "none" and plan.kernels == "stack"  # Forge's layers do it themselves
    offloads = plan.gradient_checkpointing == "offload"
    evaluates = training.evaluate_every_steps is not None and job.validation is not None
    return {
        "output_dir": str(job.run_dir.absolute() / "checkpoints"),
        "per_device_train_batch_size": plan.micro_batch,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": job.accumulation,
        "max_steps": job.num_steps,
        "num_train_epochs": 1.0,  # the sampler's stream already holds every epoch
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": optimizer.schedule,
        "warmup_steps": math.ceil(optimizer.warmup_ratio * job.num_steps),
        "optim": optimizer.name,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "adam_epsilon": optimizer.adam_epsilon,
        "max_grad_norm": optimizer.max_grad_norm,
        "label_smoothing_factor": 0.0,
        "bf16": workload.model.dtype == "bfloat16",
        "fp16": workload.model.dtype == "float16",
        "seed": training.seed,
        "data_seed": training.seed,
        "full_determinism": False,
        "gradient_checkpointing": recomputes,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if recomputes and not offloads else None,
        "use_cache": False,
        "max_length": None,  # examples are cut or divided when they are made
        "packing": False,
        "padding_free": plan.padding == "none",
        "pad_to_multiple_of": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "completion_only_loss": False,  # the labels say what is trained
        "assistant_only_loss": False,
        "loss_type": "nll",
        "average_tokens_across_devices": True,
        "dataloader_num_workers": 0,
        "dataloader_drop_last": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_first_step": False,
        "logging_nan_inf_filter": False,  # True shows a NaN step as a loss of zero
        "log_level": "error",
        "disable_tqdm": True,
        "report_to": list(workload.report_to) or "none",
        "run_name": Path(os.path.realpath(job.run_dir)).name,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": training.evaluate_every_steps if evaluates else None,
        "eval_on_start": False,
        "prediction_loss_only": True,
        "save_strategy": "steps" if training.save_every_steps else "no",
        "save_steps": training.save_every_steps or 500,
        "save_total_limit": None,  # retention is train/checkpoint.py's: it never deletes the last good one
        "save_only_model": False,
        "load_best_model_at_end": False,  # the best adapter is kept by train/callbacks.py
        "push_to_hub": False,
        "hub_token": None,
        "neftune_noise_alpha": None,
        "torch_compile": False,
        "torch_empty_cache_steps": None,
        "auto_find_batch_size": False,
        "skip_memory_metrics": True,
    }


def make_sft_config(config_class: Any, job: TrainingJob, **changes: Any) -> Any:
    """Build ``config_class`` with every field given. ``changes`` are a backend's own fields.

    A field that this release does not know is left out only if it is one of ours that a newer
    release introduced; ``changes`` must be known (``TypeError`` otherwise).
    """
    original = next(c for c in config_class.__mro__ if c.__name__ == "SFTConfig" and c.__module__.startswith("trl."))
    values = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(original)
        if f.init
    }
    ours = {name: value for name, value in sft_fields(job).items() if name in values}
    unknown = set(changes) - {f.name for f in dataclasses.fields(config_class)}
    if unknown:
        raise TypeError(f"SFTConfig has no field {sorted(unknown)}")
    values |= ours | changes
    return config_class(**{name: value for name, value in values.items() if value is not dataclasses.MISSING})
