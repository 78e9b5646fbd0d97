"""The backends, and the one list of them: command line, records and report derive theirs from it.

A backend is a module of this package with what :class:`BackendModule` asks. To add one: write the module, and add its
name to :data:`Backend` and to the modules that are type-checked below it (docs/adding.md).

Imported by ``--help``: nothing heavy at the top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

from forge.training.system.errors import ConfigurationError

if TYPE_CHECKING:
    from forge.training.backends.job import StepObserver, TrainingJob
    from forge.training.config.plan import Plan
    from forge.training.config.workload import Workload

Backend = Literal["legacy", "trl", "unsloth"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


class BackendModule(Protocol):
    """What a backend's module has. Nothing imports torch or transformers before :meth:`prepare`."""

    DEFAULT_PLAN: Mapping[str, Any]
    """Fields of :class:`~forge.training.config.plan.Plan` that fit any machine, where they are not Plan's own."""
    NEEDS_GPU: bool
    """Whether it trains on a CUDA GPU only."""
    PACKAGES: tuple[str, ...]
    """What it needs beside the packages that every backend needs, by name."""
    PINNED_BY: str | None
    """The requirements file whose versions it must have to the last digit; ``None``: other versions may work."""
    LOSS_COUNTS_FIRST_LABELS: bool
    """Whether a step's loss is divided by all labels, also by those that no token predicts.

    transformers 4 does (``get_batch_samples``); the step log has the loss per trained token whatever the backend.
    """
    CASTS_ADAPTER_TO_BFLOAT16: bool
    """Whether the adapter of a 4-bit base is trained in bfloat16 whatever ``model.dtype`` says."""

    def refuse(self, workload: Workload, plan: Plan, /) -> None:
        """Raise :class:`ConfigurationError` for what the backend cannot do. ``train`` and ``check`` both ask this."""

    def prepare(self, plan: Plan, /) -> None:
        """Make this process ready. Raises :class:`MachineError` where the backend cannot run here."""

    def build(self, job: TrainingJob, observer: StepObserver, /) -> Any:
        """The trainer, ready to train: an instance of :func:`.trainer.forge_trainer`'s class."""


if TYPE_CHECKING:
    from forge.training.backends import legacy, trl, unsloth

    _CHECKED: tuple[BackendModule, ...] = (legacy, trl, unsloth)


def load_backend(name: Backend) -> BackendModule:
    """The backend's module, imported only now."""
    return cast(BackendModule, import_module(f"{__name__}.{name}"))


def choose_backend(name: Literal["auto", Backend]) -> Backend:
    """``auto`` is unsloth where it is installed and a CUDA GPU answers, else trl. Imports no torch."""
    if name != "auto":
        return name
    from forge.training.system.environment import has_cuda_gpu

    return "unsloth" if find_spec("unsloth") is not None and has_cuda_gpu() else "trl"


def load_plan(workload: Workload, backend: Backend, overrides: Sequence[str] = ()) -> Plan:
    """The plan for this backend from the file of plans beside the config, else a default that fits anywhere.

    ``overrides`` are ``key=value``. Raises :class:`ConfigurationError`.
    """
    from pydantic import ValidationError

    from forge.training.config.overrides import apply_overrides, key_paths, listed, unusable_text, validation_errors
    from forge.training.config.plan import Plan
    from forge.training.config.workload import Workload

    content = {**load_backend(backend).DEFAULT_PLAN, **read_plans(workload).get(backend, {})}
    errors = apply_overrides(content, overrides, "--plan") + list(unusable_text(content))
    try:
        plan = Plan.model_validate(content)
    except ValidationError as invalid:
        keys = {path.rpartition(".")[2]: f"{path} of the config (--set {path}=...)" for path in key_paths(Workload)}
        errors += validation_errors(Plan, invalid, "plan.", other_names=keys)
    if errors:
        known = ", ".join(Plan.model_fields)
        raise ConfigurationError(f"the plan is wrong\n{listed(errors)}", remedy=f"its keys are {known}")
    effective = workload.training.effective_batch
    if effective % plan.micro_batch:
        raise ConfigurationError(
            f"plan.micro_batch={plan.micro_batch} does not divide training.effective_batch={effective}",
            remedy=f"take one of {[n for n in range(1, effective + 1) if effective % n == 0]}",
        )
    return plan


def read_plans(workload: Workload) -> dict[str, dict[str, Any]]:
    """What the file of plans beside the config gives each backend; empty where there is no such file.

    It belongs to the file: the config's ``name`` plays no part. Raises :class:`ConfigurationError`.
    """
    path = workload.plans_path
    if path is None or not path.exists():
        return {}
    from forge.training.config.overrides import shown
    from forge.training.config.yaml import load_yaml

    if not path.is_file():
        raise ConfigurationError(f"{path} is no regular file", remedy="it holds the plans of the config beside it")
    plans = load_yaml(path)
    unknown = sorted(plans.keys() - set(BACKENDS))
    if unknown:
        raise ConfigurationError(f"{path}: no backend {shown(unknown[0])}", remedy=f"one of {', '.join(BACKENDS)}")
    for backend, own in plans.items():
        if not isinstance(own, dict | None):
            raise ConfigurationError(
                f"{path}: {backend} is no mapping of keys to values", remedy="for example: trl: {micro_batch: 2}"
            )
    return {backend: own or {} for backend, own in plans.items()}


def describe_plan_source(workload: Workload, backend: Backend, overrides: Sequence[str] = ()) -> str:
    """Where :func:`load_plan` took its plan from, for a person."""
    plans, path = read_plans(workload), workload.plans_path
    if backend in plans and path is not None:
        source = path.name
    elif plans and path is not None:
        source = f"{backend}'s default: {path.name} has none for it"
    else:
        source = f"{backend}'s default"
    return source + (f", with --plan {' '.join(overrides)}" if overrides else "")
