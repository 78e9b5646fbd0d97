"""What workload, plan and backend ask of one another."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from forge.training.backends import Backend, load_plan
from forge.training.checks.finding import Finding, failure, ok, warning
from forge.training.config.workload import Workload
from forge.training.system.errors import ConfigurationError, MachineError

_TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "trackio": ("trackio",),
    "clearml": ("clearml",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
}


def check_configuration(workload: Workload, backend: Backend) -> Iterator[Finding]:
    """The plan, what the backend cannot do, and the trackers. Raises :class:`ConfigurationError`."""
    plan = load_plan(workload, backend)
    training = workload.training
    yield ok(
        "plan",
        f"{backend}: {plan.micro_batch} x {plan.accumulation(workload)} examples a step, padding {plan.padding}, "
        f"checkpointing {plan.gradient_checkpointing}",
    )
    if backend == "unsloth" and workload.model.dtype == "float32":
        yield failure(
            "model.dtype",
            ConfigurationError(
                "unsloth trains in bfloat16 or float16, the workload says float32",
                remedy="add --set model.dtype=bfloat16, or train with --backend trl",
            ),
        )
    if backend != "unsloth" and plan.gradient_checkpointing == "offload":
        yield failure(
            "plan",
            ConfigurationError(
                "plan.gradient_checkpointing=offload is Unsloth's; TRL knows none and full", remedy="set it to full"
            ),
        )
    if backend != "unsloth" and workload.model.dtype == "float16" and workload.model.quantization == "nf4":
        yield warning(
            "model.dtype",
            "TRL keeps a QLoRA adapter in bfloat16, whose gradients float16's scaler cannot handle",
            "use bfloat16 on Ampere or newer",
        )
    if not (training.evaluate_every_steps or training.save_every_steps):
        yield warning(
            "training",
            "neither evaluate_every_steps nor save_every_steps is set: an interrupted run starts again",
            "set training.save_every_steps for a run of hours",
        )
    for tracker in workload.report_to:
        names = _TRACKERS.get(tracker)
        if names and not any(find_spec(name) for name in names):
            yield failure(
                "report_to",
                MachineError(f"the tracker {tracker} is not installed", remedy="install it, or --set report_to=[]"),
            )
