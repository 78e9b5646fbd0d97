"""The GPU's peak in matrix products: ``python -m harness.perf.probes.matmul_peak``.

A training run's FLOPs are compared with it. It is not a data sheet's figure but the best of a few large bfloat16
products of random values (zeros run faster) on this GPU as it is now.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from forge.training.system.environment import describe_gpu
from forge.training.system.errors import MachineError
from harness.measurement.probe_main import probe_main

# (rows, inner, columns): square ones, and a 7B model's MLP with 4,096 and 16,384 tokens
SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (4096, 3584, 18944), (16384, 3584, 18944), (16384, 18944, 3584))


def measure_peak(seconds_per_shape: float = 0.5) -> dict[str, Any]:
    """TFLOP/s of each shape and the best of them. Raises :class:`MachineError` without a CUDA GPU.

    A product of (m, k) and (k, n) is 2 m k n floating-point operations. Times are medians of CUDA events.
    """
    import torch

    if not torch.cuda.is_available():
        raise MachineError("the peak is a GPU's and this machine shows none", remedy="run it on a CUDA GPU")
    shapes: list[dict[str, Any]] = []
    for m, k, n in SHAPES:
        left = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        right = torch.randn(k, n, device="cuda", dtype=torch.bfloat16)
        for _ in range(5):
            left @ right
        torch.cuda.synchronize()
        times: list[float] = []
        while sum(times) < seconds_per_shape * 1000:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            left @ right
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        milliseconds = statistics.median(times)
        shapes.append({"shape": [m, k, n], "tflops": 2 * m * k * n / milliseconds / 1e9, "num_products": len(times)})
    best = max(shape["tflops"] for shape in shapes)
    return {"tflops": best, "dtype": "bfloat16", "shapes": shapes, "gpu": describe_gpu(), "torch": torch.__version__}


def main() -> int:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(prog="harness.perf.probes.matmul_peak", description=__doc__.splitlines()[0])
    return probe_main(parser, lambda _: measure_peak())


if __name__ == "__main__":
    sys.exit(main())
