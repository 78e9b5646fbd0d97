"""Running out of memory outside training, told apart: the GPU's is exit code 5, the machine's own 4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from forge.training.system.errors import ForgeError, GpuMemoryError, MachineError

# As PyTorch, CUDA and cuBLAS say it; then as PyTorch's CPU allocator and the operating system do.
_GPU = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_HOST = ("can't allocate memory", "Cannot allocate memory")


@contextmanager
def memory_errors(doing: str) -> Iterator[None]:
    """Turn running out of memory inside the block into :class:`GpuMemoryError` or :class:`MachineError`."""
    try:
        yield
    except ForgeError:
        raise
    except Exception as error:
        text = str(error)
        said = (text.splitlines() or [type(error).__name__])[0][:300]
        if any(words in text for words in _GPU):
            raise GpuMemoryError(
                f"out of GPU memory during {doing}: {said}",
                remedy="free the GPU, or do it on the CPU with an empty CUDA_VISIBLE_DEVICES",
            ) from error
        if isinstance(error, MemoryError) or any(words in text for words in _HOST):
            raise MachineError(
                f"out of memory during {doing}: {said}",
                remedy="free memory, or do it on a larger machine: the run directory and the base are all it needs",
            ) from error
        raise
