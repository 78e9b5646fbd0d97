"""The stack being replaced, exactly as its owner pins it. Runs in an interpreter of its own."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from forge.training.backends import trl as modern
from forge.training.backends.job import TrainingJob
from forge.training.config.plan import Plan
from forge.training.system.errors import ConfigurationError, MachineError

PINS = {
    "trl": "0.26.2",
    "transformers": "4.57.3",
    "peft": "0.18.0",
    "accelerate": "1.12.0",
    "datasets": "4.4.2",
    "bitsandbytes": "0.49.0",
}
# Its first layout, fixed: the bar is set against it.
DEFAULT_PLAN = {"micro_batch": 1, "gradient_checkpointing": "full", "padding": "longest"}


def prepare(plan: Plan) -> None:
    """Refuse any other version than the pinned one: a baseline that drifts proves nothing."""
    modern.prepare(plan)
    wrong = []
    for name, wanted in PINS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        if found != wanted:
            wrong.append(f"  {name}: {found}, pinned {wanted}")
    if wrong:
        raise MachineError(
            "this interpreter is not the legacy stack:\n" + "\n".join(wrong),
            remedy="install requirements-legacy.txt into an environment of its own and train with its python",
        )


def build(job: TrainingJob) -> Any:
    """The trainer for ``job``, in the owner's layout. Raises :class:`ConfigurationError` for another plan."""
    from trl import SFTConfig, SFTTrainer

    from forge.training.backends.trainer import forge_trainer

    if job.plan.gradient_checkpointing == "offload" or job.plan.padding == "none":
        raise ConfigurationError(
            "the legacy stack knows neither offloaded checkpointing nor padding-free batches",
            remedy="set plan.gradient_checkpointing=full and plan.padding=longest",
        )
    config = modern.make_config(SFTConfig, job)
    return forge_trainer(SFTTrainer)(job, modern.load_model(job), config, peft_config=modern.lora_config(job))
