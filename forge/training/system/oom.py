"""Running out of memory: the one list of its phrases, the error it becomes, and how a run continues with less.

GPU memory ends a command with exit code 5, the machine's own with 4, in every command alike.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NoReturn

from forge.training.system.command import restore_stdout
from forge.training.system.errors import ForgeError, GpuMemoryError, MachineError

# As PyTorch, CUDA, cuBLAS and bitsandbytes say it; the last is the name of PyTorch's own error.
GPU_PHRASES = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Error out of memory",
    "OutOfMemoryError",
)
# As PyTorch's CPU allocator and the operating system say it.
HOST_PHRASES = ("can't allocate memory", "Cannot allocate memory")
_MEMORY_ERROR = re.compile(r"^(\w+\.)*_?(Array)?MemoryError\b", re.MULTILINE)  # Python's and NumPy's, in a traceback


def memory_that_ran_out(evidence: BaseException | str) -> Literal["GPU", "host"] | None:
    """Which memory ran out, by an error or by the text of a log; ``None``: the cause is another."""
    text = evidence if isinstance(evidence, str) else "".join(traceback.format_exception_only(evidence))
    if any(phrase in text for phrase in GPU_PHRASES):
        return "GPU"
    is_host = isinstance(evidence, MemoryError) or any(phrase in text for phrase in HOST_PHRASES)
    return "host" if is_host or _MEMORY_ERROR.search(text) else None


def as_memory_error(error: BaseException, doing: str, gpu_remedy: str) -> GpuMemoryError | MachineError | None:
    """``error`` as the user's where memory ran out during ``doing``, else ``None``."""
    memory = memory_that_ran_out(error)
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:300]
    if memory == "GPU":
        return GpuMemoryError(f"out of GPU memory during {doing}: {first_line}", remedy=gpu_remedy)
    if memory == "host":
        return MachineError(
            f"out of memory during {doing}: {first_line}",
            remedy="free memory, or do it on a larger machine: the run directory and the base are all it needs",
        )
    return None


@contextmanager
def memory_errors(doing: str) -> Iterator[None]:
    """Turn running out of memory inside the block into :class:`GpuMemoryError` or :class:`MachineError`."""
    try:
        yield
    except ForgeError:
        raise
    except Exception as error:
        remedy = "free the GPU, or do it on the CPU with an empty CUDA_VISIBLE_DEVICES"
        memory_error = as_memory_error(error, doing, remedy)
        if memory_error is None:
            raise
        raise memory_error from error


def smaller_micro_batch(micro_batch: int, effective_batch: int) -> int | None:
    """The largest micro-batch of at most half the size that divides the effective batch; ``None`` at one."""
    return next((size for size in range(micro_batch // 2, 0, -1) if effective_batch % size == 0), None)


def restart(*more: str) -> NoReturn:
    """Replace this process, GPU memory and all, by its own command with ``more`` arguments, which resumes the run."""
    restore_stdout()
    again = [argument for argument in sys.orig_argv[1:] if argument != "--force"]  # what it replaced is gone
    os.execv(sys.executable, [sys.executable, *again, *more])
