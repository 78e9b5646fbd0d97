"""What config, plan and backend ask of one another."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from forge.training.backends import Backend, load_backend, load_plan
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
    module = load_backend(backend)
    try:
        module.refuse(workload, plan)
    except ConfigurationError as error:
        yield failure("backend", error)
    is_4_bit = workload.model.quantization == "nf4"
    if module.CASTS_ADAPTER_TO_BFLOAT16 and workload.model.dtype == "float16" and is_4_bit:
        yield warning(
            "model.dtype",
            "TRL keeps a QLoRA adapter in bfloat16, whose gradients float16's scaler cannot handle",
            "use bfloat16 on Ampere or newer",
        )
    if not (training.evaluate_every_steps or training.save_every_steps or training.save_every_minutes):
        yield warning(
            "training",
            "no save_every_steps, save_every_minutes or evaluate_every_steps: an interrupted run begins anew",
            "set training.save_every_minutes for a run of hours",
        )
    for tracker in workload.report_to:
        names = _TRACKERS.get(tracker)
        if names and not any(find_spec(name) for name in names):
            yield failure(
                "report_to",
                MachineError(f"the tracker {tracker} is not installed", remedy="install it, or --set report_to=[]"),
            )
