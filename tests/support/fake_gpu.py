"""A pytest plugin (``-p tests.support.fake_gpu``) for tests of the gate: this machine seems to have an idle GPU.

Only NVML's answer is made up, before anything asks for it; the gate then runs as it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from forge.training.system import environment

GPU: dict[str, Any] = {
    **{"name": "NVIDIA Test", "num_gpus": 1, "driver": "1", "driver_cuda": "13.0", "compute_capability": "9.0"},
    **{"memory_total_bytes": 140 << 30, "max_sm_clock_mhz": 1980, "max_memory_clock_mhz": 3201},
    **{"power_limit_watts": 700.0, "num_other_processes": 0, "memory_used_bytes": 1 << 30},
    **{"memory_free_bytes": 139 << 30, "sm_clock_mhz": 1980, "memory_clock_mhz": 3201, "power_watts": 400.0},
    **{"temperature_celsius": 50, "throttle_reasons": []},
}


def describe_gpu() -> dict[str, Any]:
    """The GPU with the memory that ``ARM_USED`` names a file of: what a running arm says it takes."""
    file = Path(os.environ.get("ARM_USED", ""))
    used = int(file.read_text() or 0) if file.is_file() else 0
    return {**GPU, "memory_used_bytes": GPU["memory_used_bytes"] + used}


environment.describe_gpu = describe_gpu
