"""Provenance: on what a run was made. JSON-able, without paths, host names or user names.

Nothing here fails: what cannot be found out is ``None``.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from forge import __version__

ROOT = Path(__file__).resolve().parents[3]

PACKAGES = (
    *("torch", "triton", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes"),
    *("unsloth", "unsloth_zoo", "xformers", "torchao", "tokenizers", "safetensors", "llama_cpp_python", "numpy"),
)

# Settings that change speed, memory or rounding. Those whose value can be a path are left out.
_SETTINGS = (
    *("OMP_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    *("CUDA_LAUNCH_BLOCKING", "NVIDIA_TF32_OVERRIDE", "TORCHDYNAMO_DISABLE", "PYTHONHASHSEED"),
    *("UNSLOTH_COMPILE_DISABLE", "UNSLOTH_PADDING_CHOICE", "UNSLOTH_RETURN_LOGITS", "UNSLOTH_GC_KEEP_LAYERS"),
)

# nvml.h, nvmlClocksEventReasons; "idle" and application settings are no cause for concern and stay in.
_THROTTLE_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
    0x100: "display clocks",
}


def describe_environment(*, with_torch: bool) -> dict[str, Any]:
    """Machine, checkout, package versions, GPU and driver; CUDA and cuDNN only ``with_torch``, which imports it."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "is_wsl": is_wsl(),
        "cpu": {
            "model": _cpu_model(),
            "num_cores": os.cpu_count(),
            "num_usable_cores": _or_none(lambda: len(os.sched_getaffinity(0))),
        },
        "ram_bytes": ram_bytes(),
        "git": _git_state(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "gpu": describe_gpu(),
        "torch": _describe_torch() if with_torch else None,
    }


def describe_versions() -> str:
    """Forge with its commit, torch and transformers, a line each. Imports none of them."""
    state = _git_state()
    commit = f" (commit {state['commit'][:10]}{', with changes' if state['is_dirty'] else ''})" if state else ""
    others = "".join(f"{name} {package_version(name) or 'not installed'}\n" for name in ("torch", "transformers"))
    return f"forge {__version__}{commit}\n{others}"


def package_version(name: str) -> str | None:
    """The installed version of a distribution, ``None`` if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_wsl() -> bool:
    """Whether this is Linux inside Windows (WSL2)."""
    return "microsoft" in platform.release().lower()


def ram_bytes() -> int | None:
    """Memory this process may use: the machine's, or the control group's limit where that is lower."""
    total = _or_none(lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = _or_none(lambda: int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(filter(None, (total, limit)), default=None)


def available_ram_bytes() -> int | None:
    """Memory that could be taken now without swapping: Linux's MemAvailable."""
    text = _or_none(lambda: Path("/proc/meminfo").read_text(encoding="ascii")) or ""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def describe_gpu() -> dict[str, Any] | None:
    """The first GPU that this process may use, by NVML and without CUDA; ``None`` if there is none."""
    with _gpu() as (nvml, device):
        if device is None:
            return None
        memory = _or_none(lambda: nvml.nvmlDeviceGetMemoryInfo(device))
        driver_cuda = _or_none(nvml.nvmlSystemGetCudaDriverVersion_v2)
        capability = _or_none(lambda: nvml.nvmlDeviceGetCudaComputeCapability(device))
        reasons = _or_none(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(device))
        sm, mem = nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM
        return {
            "name": _or_none(lambda: nvml.nvmlDeviceGetName(device)),
            "num_gpus": _or_none(nvml.nvmlDeviceGetCount),
            "driver": _or_none(nvml.nvmlSystemGetDriverVersion),
            "driver_cuda": f"{driver_cuda // 1000}.{driver_cuda % 1000 // 10}" if driver_cuda else None,
            "compute_capability": f"{capability[0]}.{capability[1]}" if capability else None,
            "memory_total_bytes": int(memory.total) if memory else None,
            "max_sm_clock_mhz": _or_none(lambda: nvml.nvmlDeviceGetMaxClockInfo(device, sm)),
            "max_memory_clock_mhz": _or_none(lambda: nvml.nvmlDeviceGetMaxClockInfo(device, mem)),
            "power_limit_watts": _or_none(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000),
            # inside a container this one can be counted: its id differs there
            "num_other_processes": _or_none(
                lambda: sum(p.pid != os.getpid() for p in nvml.nvmlDeviceGetComputeRunningProcesses(device))
            ),
            "memory_used_bytes": int(memory.used) if memory else None,
            "memory_free_bytes": int(memory.free) if memory else None,
            "sm_clock_mhz": _or_none(lambda: nvml.nvmlDeviceGetClockInfo(device, sm)),
            "memory_clock_mhz": _or_none(lambda: nvml.nvmlDeviceGetClockInfo(device, mem)),
            "power_watts": _or_none(lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1000),
            "temperature_celsius": _or_none(lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)),
            "throttle_reasons": None
            if reasons is None
            else [text for bit, text in _THROTTLE_REASONS.items() if reasons & bit],
        }


def has_cuda_gpu() -> bool:
    """Whether NVML shows a GPU that this process may use. Imports no torch."""
    return describe_gpu() is not None


@contextmanager
def _gpu() -> Iterator[tuple[Any, Any]]:
    """NVML and the device's handle, which is ``None`` where there is no usable GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: NVML's errors are not a closed set
        yield None, None
        return
    try:
        yield pynvml, _or_none(lambda: _first_visible(pynvml))
    finally:
        _or_none(pynvml.nvmlShutdown)


def _first_visible(nvml: Any) -> Any:
    """NVML counts all GPUs; CUDA's first is the first that CUDA_VISIBLE_DEVICES names."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(0)
    first = visible.split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    return nvml.nvmlDeviceGetHandleByIndex(int(first))  # "" and "-1" hide all: ValueError, NVMLError


def _describe_torch() -> dict[str, Any] | None:
    try:
        import torch
    except Exception:  # a broken CUDA set-up raises OSError, ImportError, RuntimeError
        return None
    cuda = bool(_or_none(torch.cuda.is_available))
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": _or_none(torch.backends.cudnn.version) if cuda else None,
        "is_cuda_available": cuda,
        "num_threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _cpu_model() -> str | None:
    text = _or_none(lambda: Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")) or ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or None


def _git_state() -> dict[str, Any] | None:
    """Commit of Forge's own checkout, ``None`` where Forge is installed without one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    if not (ROOT / ".git").exists():  # else a repository around it would answer
        return None
    commit = _or_none(lambda: git("rev-parse", "HEAD"))
    if commit is None:
        return None
    status = _or_none(lambda: git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": commit, "is_dirty": None if status is None else bool(status)}


def _or_none(question: Callable[[], Any]) -> Any:
    """The answer, or ``None``: provenance must never be the reason why a run fails."""
    try:
        return question()
    except Exception:
        return None
