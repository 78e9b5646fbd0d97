"""How an arm's process is started: its interpreter, its environment, its command line.

All arms get the same environment but for ``PYTHONPATH``, which would put another arm's packages before
those of the legacy interpreter.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from forge.training.backends import Backend
from forge.training.system.command import STEP_OF_RUN
from forge.training.system.environment import ROOT
from forge.training.system.errors import MachineError
from harness.measurement.results import RunSpec

EVALUATOR: Backend = "trl"  # whose interpreter judges every arm's adapter: one evaluator, and today's

_PATH_KEYS = ("model.path", "data.documents", "data.train", "data.validation")

# Inherited, these would change speed, memory or rounding without anybody noticing.
_NEVER_INHERITED = (
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING", "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"),
    *("CUDA_DEVICE_MAX_CONNECTIONS", "MKL_NUM_THREADS", "TORCH_LOGS", "ACCELERATE_MIXED_PRECISION"),
    *("UNSLOTH_COMPILE_DISABLE", "UNSLOTH_PADDING_CHOICE", "UNSLOTH_RETURN_LOGITS", "UNSLOTH_GC_KEEP_LAYERS"),
    *("UNSLOTH_CE_LOSS_TARGET_GB", "PYTHONSAFEPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONINSPECT", "COLUMNS"),
    *("PYTHONDONTWRITEBYTECODE", "PYTHONOPTIMIZE", "PYTHONDEVMODE", "PYTHONMALLOC", "PYTHONPROFILEIMPORTTIME"),
)


def settings() -> dict[str, str]:
    """The environment variables that every arm is given, whatever the gate itself was started with.

    Expandable segments: Unsloth switches them on for itself at import; reserved memory can only be
    compared if the others have them too. Threads: tokenising and pinned copies gain nothing above 8.
    """
    return {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_MODULE_LOADING": "LAZY",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML counts
        "OMP_NUM_THREADS": str(min(8, len(os.sched_getaffinity(0)))),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "NO_COLOR": "1",
    }


def environment(backend: Backend) -> dict[str, str]:
    """The whole environment of an arm's process."""
    removed = {*_NEVER_INHERITED} | ({"PYTHONPATH"} if backend == "legacy" else set())
    inherited = {name: value for name, value in os.environ.items() if name not in removed}
    return {**inherited, **settings(), STEP_OF_RUN: "1"}  # a measured run writes no page


def interpreter(backend: Backend) -> str:
    """The arm's Python, absolute. Raises :class:`MachineError` where there is none.

    legacy: ``$FORGE_LEGACY_PYTHON``, else ``.venv-legacy``; the others: ``$FORGE_GPU_PYTHON``, else this one.
    """
    variable = "FORGE_LEGACY_PYTHON" if backend == "legacy" else "FORGE_GPU_PYTHON"
    named = os.environ.get(variable)
    if named:
        program = shutil.which(named)
        if program is None:
            raise MachineError(f"{variable}={named} is not a program", remedy="name a Python interpreter, or unset it")
        return os.path.abspath(program)  # not resolved: a virtual environment is known by its link's place
    if backend != "legacy":
        return sys.executable
    own = ROOT / ".venv-legacy" / "bin" / "python"
    if not own.is_file():
        raise MachineError(
            "the legacy backend has no interpreter here",
            remedy="`make legacy-env` makes .venv-legacy; FORGE_LEGACY_PYTHON names one that is elsewhere",
        )
    return str(own)


def work_arguments(spec: RunSpec) -> tuple[str, ...]:
    """``WORKLOAD --backend B [--set ...] [--plan ...]`` as `train` and the probes take it; paths absolute."""
    workload = str(Path(spec.workload).absolute()) if Path(spec.workload).is_file() else spec.workload
    settings = [part for setting in spec.overrides for part in ("--set", _absolute(setting))]
    settings += [part for setting in spec.plan_overrides for part in ("--plan", setting)]
    return (workload, "--backend", spec.backend, *settings)


def train_command(spec: RunSpec, run_dir: Path) -> list[str]:
    """The training run of ``spec`` that leaves its record in ``run_dir``; started in the repository's root."""
    module = ["forge.training"]
    if spec.float32_adapter:
        module = ["harness.parity.probes.float32_adapter", *(f"--rounding={name}" for name in spec.rounding)]
    command = [interpreter(spec.backend), "-m", *module, "train", *work_arguments(spec)]
    return [
        *command,
        "-o",
        str(run_dir),
        "--force",
        "--no-check",
        "--on-oom",
        "stop",
    ]  # another layout is another measurement


def evaluate_command(run_dir: Path) -> list[str]:
    """The neutral evaluation of a run that ended, in a process without Unsloth; leaves ``evaluation.json`` there."""
    command = [interpreter(EVALUATOR), "-m", "forge.training", "evaluate", str(run_dir)]
    return [*command, "--subjects", "base,adapter", "--force"]


def _absolute(setting: str) -> str:
    """Paths in overrides are relative to where the gate was started, and its children start in the root."""
    key, _, value = setting.partition("=")
    is_path = key.strip() in _PATH_KEYS and Path(value).exists()
    return f"{key}={Path(value).absolute()}" if is_path else setting
