"""The kernels are imported under Triton's interpreter, whatever was imported before."""

from __future__ import annotations

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")
    from triton.runtime.interpreter import InterpretedFunction

    from forge.training.kernels import gpu, gpu_elementwise

for kernel in (gpu._lora_down, gpu_elementwise._rms_norm):
    if not isinstance(kernel, InterpretedFunction):
        raise pytest.UsageError("forge.training.kernels.gpu was imported before tests/training/kernels/conftest.py")
