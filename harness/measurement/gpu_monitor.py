"""What the gate's own process sees of the GPU during a run, by NVML and without CUDA."""

from __future__ import annotations

import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge.training.system.environment import describe_gpu
from forge.training.system.errors import MachineError
from harness.measurement.results import Monitor

ReadGpu = Callable[[], dict[str, Any] | None]  # describe_gpu() or its like; None without a GPU

SAMPLES_PER_SECOND = 5
FREE_BELOW_BYTES = 2 << 30  # an idle device reports some hundred MiB of its own
# A process that ends gives its memory back a little later than its exit code.
PATIENCE_SECONDS = 15.0
# What slows a run for reasons outside of it. The power cap is none: large GPUs reach it at full load. A bit that is
# set for a moment is none either: in two samples of a hundred, it costs a run less than the noise between two runs.
DISTURBING_REASONS = {"hardware slowdown", "thermal, software", "thermal, hardware", "power brake"}
MOST_DISTURBED_SHARE = 0.02


def machine_id() -> str:
    """16 hex digits that tell this machine, boot and choice of GPUs from another; they name nothing."""
    parts = [*_gpu_uuids(), os.environ.get("CUDA_VISIBLE_DEVICES", "")]
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts.append(boot.read_text(encoding="ascii").strip() if boot.is_file() else "")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _gpu_uuids() -> list[str]:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            return [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no package, no driver, no permission: NVML's errors are not a closed set
        return []


def wait_until_free(read_gpu: ReadGpu, patience_seconds: float = PATIENCE_SECONDS) -> dict[str, Any] | None:
    """The GPU's state once nobody else uses it, ``None`` without a GPU. Raises :class:`MachineError`."""
    deadline = time.monotonic() + patience_seconds
    while True:
        state = read_gpu()
        problem = None if state is None else _in_use(state)
        if problem is None:
            return state
        if time.monotonic() >= deadline:
            raise MachineError(
                f"the GPU is not free: {problem}; what is measured beside others proves nothing",
                remedy="end the other program (nvidia-smi lists it), then run the same again: it resumes here",
            )
        time.sleep(min(1.0, patience_seconds))


def _in_use(state: dict[str, Any]) -> str | None:
    others, used = state.get("num_other_processes") or 0, state.get("memory_used_bytes") or 0
    if others:
        return f"{others} other process{'es' * (others > 1)} on it"
    if used > FREE_BELOW_BYTES:
        return f"{used / 2**30:.1f} GiB of its memory are in use before the start (at most {FREE_BELOW_BYTES >> 30})"
    return None


class GpuMonitor:
    """Reads the GPU in a thread while the block runs; then :meth:`summary`.

    Foreign processes are counted and not looked up, because in a container NVML's process numbers are the
    host's: a training run is one process on the GPU, so all but one are others'.
    """

    def __init__(self, read_gpu: ReadGpu = describe_gpu, *, before: dict[str, Any] | None = None) -> None:
        self._read_gpu = read_gpu
        self._before = before
        self._samples: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="gpu-monitor", daemon=True)

    def __enter__(self) -> GpuMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _sample(self) -> None:
        is_over = False
        while not is_over:  # a run that is over at once has been looked at once
            sample = self._read_gpu()
            if sample is not None:
                self._samples.append(sample)
            is_over = self._stop.wait(1 / SAMPLES_PER_SECOND)

    def summary(self) -> Monitor:
        """Clocks and power while the GPU was not idle; everything else over all samples."""
        samples = list(self._samples)
        busy = [s for s in samples if "idle" not in (s.get("throttle_reasons") or [])] or samples
        reasons = {reason for s in samples for reason in s.get("throttle_reasons") or []}
        disturbed = [s for s in busy if DISTURBING_REASONS & set(s.get("throttle_reasons") or [])]
        clocks, used = _values(busy, "sm_clock_mhz"), _values(samples, "memory_used_bytes")
        temperatures, power = _values(samples, "temperature_celsius"), _values(busy, "power_watts")
        others = _values(samples, "num_other_processes")
        return Monitor(
            num_samples=len(samples),
            device_used_before_bytes=(self._before or {}).get("memory_used_bytes"),
            device_used_peak_bytes=int(max(used)) if used else None,
            sm_clock_mhz_median=statistics.median(clocks) if clocks else None,
            sm_clock_mhz_min=min(clocks) if clocks else None,
            temperature_celsius_max=max(temperatures) if temperatures else None,
            power_watts_median=statistics.median(power) if power else None,
            throttle_reasons=sorted(reasons - {"idle"}),
            disturbed_share=len(disturbed) / len(busy) if busy else None,
            num_foreign_processes_max=max(0, int(max(others)) - 1) if others else None,
        )


def _values(samples: list[dict[str, Any]], name: str) -> list[float]:
    return [float(sample[name]) for sample in samples if sample.get(name) is not None]
