"""The TRL pipeline that Forge replaced, at its own pins and in its own layout. Runs in an interpreter of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge.training.backends import trl as modern
from forge.training.backends.job import StepObserver, TrainingJob
from forge.training.backends.sft_config import make_sft_config
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload
from forge.training.system.environment import package_version
from forge.training.system.errors import ConfigurationError, MachineError

PINS = {
    "trl": "0.26.2",
    "transformers": "4.57.3",
    "peft": "0.18.0",
    "accelerate": "1.12.0",
    "datasets": "4.4.2",
    "bitsandbytes": "0.49.0",
}
# Fixed: the claims' bars are set against this layout.
DEFAULT_PLAN: Mapping[str, Any] = {"micro_batch": 1, "gradient_checkpointing": "full", "padding": "longest"}
NEEDS_GPU = True
PACKAGES: tuple[str, ...] = ()
PINNED_BY: str | None = "requirements-legacy.txt"
LOSS_COUNTS_FIRST_LABELS = True
CASTS_ADAPTER_TO_BFLOAT16 = True


def refuse(workload: Workload, plan: Plan) -> None:
    """What today's TRL cannot do either, batches without padding, and Forge's layers."""
    modern.refuse(workload, plan)
    if plan.padding == "none":
        raise ConfigurationError("legacy cannot carry out plan.padding=none", remedy="--plan padding=longest")
    if plan.kernels == "forge" or plan.micro_batch_tokens is not None:
        raise ConfigurationError(
            "legacy cannot carry out plan.kernels=forge or plan.micro_batch_tokens",
            remedy="it is the old pipeline as it was; train with --backend trl or unsloth",
        )


def prepare(plan: Plan) -> None:
    """Raise :class:`MachineError` for any other version than the pinned one: a baseline that drifts proves nothing."""
    modern.prepare(plan)
    installed = {name: package_version(name) or "not installed" for name in PINS}
    wrong = [f"  {name}: {installed[name]}, pinned {pin}" for name, pin in PINS.items() if installed[name] != pin]
    if wrong:
        raise MachineError(
            "this interpreter is not the legacy stack:\n" + "\n".join(wrong),
            remedy=f"install {PINNED_BY} into an environment of its own and train with its python",
        )


def build(job: TrainingJob, observer: StepObserver) -> Any:
    """The trainer for ``job``."""
    import torch
    from trl import SFTConfig, SFTTrainer

    from forge.training.backends.trainer import forge_trainer

    config = make_sft_config(SFTConfig, job, use_cpu=not torch.cuda.is_available())
    model = modern.load_model(job)
    return forge_trainer(SFTTrainer)(job, observer, model, config, peft_config=modern.lora_config(job))
