"""GPU, memory, disk and llama.cpp against what the config needs."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forge.training.backends import Backend, load_backend
from forge.training.checks.finding import Finding, failure, ok, warning
from forge.training.checks.model import is_made
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload
from forge.training.export.disk_space import peak_disk_bytes
from forge.training.llamacpp.install import COMMIT, VERSION, load_llama_cpp
from forge.training.models.weights import ModelWeights
from forge.training.planner.memory import CONTEXT_BYTES, MemoryModel
from forge.training.planner.sizes import Sizes
from forge.training.system.command import shown_path
from forge.training.system.environment import available_ram_bytes, is_wsl
from forge.training.system.errors import CheckError, DiskError, GpuMemoryError, MachineError
from forge.training.system.files import cache_dir, existing_folder
from forge.training.train.checkpoint import KEPT, size_bytes

_GIB = 2**30
_ALARMING = ("hardware slowdown", "thermal, software", "thermal, hardware", "power brake")
_MOST_OF_FREE_MEMORY = 0.85  # of the free memory; a plan with little beside the floor is a tight one


def check_gpu(workload: Workload, backend: Backend, gpu: dict[str, Any] | None) -> Iterator[Finding]:
    """The GPU and its driver. Raises :class:`MachineError` where the work needs CUDA and there is none."""
    if gpu is None:
        reasons = [f"the {backend} backend"] if load_backend(backend).NEEDS_GPU else []
        reasons += ["model.quantization=nf4"] if workload.model.quantization == "nf4" else []
        reasons += [f"optimizer.name={workload.optimizer.name}"] if workload.optimizer.is_8bit else []
        if reasons:
            raise MachineError(
                f"{', '.join(reasons)} need{'s' * (len(reasons) == 1)} a CUDA GPU and none is visible on this machine",
                remedy="train on a machine with a GPU; `smoke` and similar configs train on a CPU",
            )
        yield ok("GPU", f"none: {backend} trains on the CPU")
        return
    free, total = gpu["memory_free_bytes"] or 0, gpu["memory_total_bytes"] or 0
    yield ok("GPU", f"{gpu['name']}, driver {gpu['driver']}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free")
    if gpu["num_other_processes"]:
        yield warning(
            "GPU",
            f"{gpu['num_other_processes']} other processes use it: less memory is free and times are not reliable",
            "end them, or choose another GPU with CUDA_VISIBLE_DEVICES",
        )
    slowed = [reason for reason in gpu["throttle_reasons"] or () if reason in _ALARMING]
    if slowed:
        yield warning("GPU", f"it is slowed down: {', '.join(slowed)}", "look at its cooling and power")
    capability = gpu["compute_capability"]
    if workload.model.dtype == "bfloat16" and capability and float(capability) < 8.0:
        message = f"{gpu['name']} (compute capability {capability}) has no bfloat16: that came with Ampere, 8.0"
        yield failure("GPU", MachineError(message, remedy="--set model.dtype=float16 --backend unsloth"))
    yield from _check_cuda_build(gpu)


def _check_cuda_build(gpu: dict[str, Any]) -> Iterator[Finding]:
    """PyTorch's build against the driver, read from its version.py: importing it takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return
    path = Path(spec.origin).parent / "version.py"
    match = re.search(r"^cuda\b[^=\n]*=\s*(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    build = match[1].strip().strip("'\"") if match else "None"
    if build == "None":
        yield failure(
            "PyTorch", MachineError("this PyTorch is built without CUDA", remedy="install requirements-gpu.txt's torch")
        )
    elif gpu["driver_cuda"] and int(build.split(".")[0]) > int(gpu["driver_cuda"].split(".")[0]):
        yield failure(
            "PyTorch",
            MachineError(
                f"PyTorch is built for CUDA {build}, the driver {gpu['driver']} knows CUDA {gpu['driver_cuda']}",
                remedy="update the NVIDIA driver (under WSL2: the one in Windows), or take an older CUDA build",
            ),
        )
    else:
        yield ok("PyTorch", f"built for CUDA {build}, the driver knows {gpu['driver_cuda']}")


def check_memory(workload: Workload, base: ModelWeights, gpu: dict[str, Any] | None) -> Iterator[Finding]:
    """What must be in memory whatever the plan, against what is free. Raises :class:`GpuMemoryError`."""
    try:
        floor = Sizes.of(workload, base.config).floor_bytes
    except KeyError as missing:
        yield warning("memory", f"not known before the run: the base's config.json lacks {missing}")
        return
    if gpu is None:
        free, total, place = available_ram_bytes(), None, "memory"
    else:
        free, total, place = gpu["memory_free_bytes"], gpu["memory_total_bytes"], "GPU memory"
    if free is None:
        return
    message = f"weights, adapter and optimizer need {floor / _GIB:.2f} GiB, {free / _GIB:.2f} GiB of {place} are free"
    remedy = "a smaller base, model.quantization=nf4, a lower lora.rank or an 8-bit optimizer"
    if floor > (total or free):
        kind = GpuMemoryError if gpu else MachineError
        raise kind(message, remedy=remedy)
    if floor > free * _MOST_OF_FREE_MEMORY:
        yield warning("memory", f"{message}: nothing is left for activations", "free some, or " + remedy)
    else:
        yield ok("memory", f"{message}; activations come on top")


def check_layout(workload: Workload, plan: Plan, base: ModelWeights, gpu: dict[str, Any] | None) -> Iterator[Finding]:
    """What the longest micro-batch that the config allows takes in a plan of Forge's layers, against the card.

    Computed, not measured; the stack's own layers have no model of it.
    """
    if gpu is None or plan.kernels != "forge" or not gpu["memory_total_bytes"]:
        return
    try:
        sizes = Sizes.of(workload, base.config)
    except KeyError:
        return  # check_memory said so
    longest = workload.data.max_length
    tokens = max(longest, plan.micro_batch_tokens or longest * plan.micro_batch)
    peak = MemoryModel.assumed(sizes, None, plan, is_on_host=False).peak_bytes(plan, [tokens])
    message = f"{tokens:,} tokens at a time, the most that the config allows, take about {peak / _GIB:.1f} GiB"
    if peak + CONTEXT_BYTES > gpu["memory_total_bytes"]:
        remedy = "`forge plan` finds the layout that fits, or lower data.max_length"
        yield warning("layout", f"{message} of {gpu['memory_total_bytes'] / _GIB:.1f}", remedy)
    else:
        yield ok("layout", message)


def check_disk(workload: Workload, base: ModelWeights, directory: Path) -> Iterator[Finding]:
    """Disk space for the run and its export beside ``directory``, and for the base where it must be made yet."""
    adapter = _adapter_bytes(workload, base)
    export = peak_disk_bytes(
        base, workload.export.quantizations, adapter_bytes=adapter, writes_merged=True, keeps_merged=False
    )
    checkpoints = (KEPT + 1) * size_bytes(adapter // 4, workload.optimizer)  # one more is being written
    needed = {directory: adapter + checkpoints + export}
    if not is_made(base):
        needed[cache_dir()] = base.num_bytes
    by_device: dict[int, list[tuple[Path, int]]] = {}
    for place, num_bytes in needed.items():
        folder = existing_folder(place)
        by_device.setdefault(folder.stat().st_dev, []).append((folder, num_bytes))
    what = "run and export" if is_made(base) else "base, run and export"
    for rows in by_device.values():
        place, num_bytes = rows[0][0], sum(row[1] for row in rows)
        free = shutil.disk_usage(place).free
        message = f"{what} need {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {shown_path(place)}"
        if free < num_bytes:
            yield failure("disk", DiskError(message, remedy="free space, or ask for fewer export.quantizations"))
        else:
            yield ok("disk", message)
    if is_wsl() and directory.absolute().is_relative_to("/mnt"):
        yield warning("disk", f"{directory} lies on a Windows drive, which WSL2 reads slowly", "work below your home")


def _adapter_bytes(workload: Workload, base: ModelWeights) -> int:
    shapes = [
        tensor.shape
        for name, tensor in base.tensors.items()
        if name.removesuffix(".weight").rpartition(".")[2] in workload.lora.targets and len(tensor.shape) == 2
    ]
    return 4 * workload.lora.rank * sum(map(sum, shapes)) if shapes else math.ceil(base.num_bytes / 100)


def check_wsl(gpu: dict[str, Any] | None) -> Iterator[Finding]:
    """What differs in Linux inside Windows."""
    if is_wsl() and gpu is not None:
        yield warning(
            "WSL2",
            "Windows shares the GPU's memory, and moves it to the host unannounced when it is full: steps become slow",
            "close programs that use the GPU; in the NVIDIA control panel set 'CUDA - Sysmem Fallback Policy' to"
            " 'Prefer No Sysmem Fallback'",
        )


def check_llama_cpp() -> Iterator[Finding]:
    """Raises :class:`MachineError` where the export could not work."""
    try:
        load_llama_cpp()
    except (CheckError, MachineError) as error:
        message = f"llama.cpp: {error.message}"
        raise MachineError(message, remedy="run `make setup`; training works without it") from error
    yield ok("llama.cpp", f"llama-cpp-python {VERSION}, converter of commit {COMMIT}")
