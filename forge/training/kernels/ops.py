"""The operations: Triton for tensors on a GPU, else plain torch. Shapes and rounding: reference.py.

With TRITON_INTERPRET=1 Triton's interpreter computes tensors on a CPU, slowly, as tests do. float64 is computed by the
reference everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from forge.training.kernels import reference


def lora_down(
    x: Tensor, adapters: Sequence[Tensor], modules: Sequence[int], rows: Tensor | None, p: float
) -> list[Tensor]:
    """(mask_i * x / (1 - p)) @ A_i^T for one to three adapters, (tokens, rank_i) in x's dtype."""
    return cast(list[Tensor], _lora(x).lora_down(x, adapters, modules, rows, p))


def lora_grad_a(
    x: Tensor, grads: Sequence[Tensor], modules: Sequence[int], rows: Tensor | None, p: float
) -> list[Tensor]:
    """d_i^T @ (mask_i * x / (1 - p)) for one to three adapters, float32 (rank_i, in)."""
    return cast(list[Tensor], _lora(x).lora_grad_a(x, grads, modules, rows, p))


def lora_add_grad_x_(
    dx: Tensor,
    grads: Sequence[Tensor],
    adapters: Sequence[Tensor],
    modules: Sequence[int],
    rows: Tensor | None,
    p: float,
) -> Tensor:
    """In place: dx += sum of mask_i * (d_i @ A_i) / (1 - p) for one to three adapters. Returns dx."""
    return cast(Tensor, _lora(dx).lora_add_grad_x_(dx, grads, adapters, modules, rows, p))


def swiglu(e: Tensor, g: Tensor) -> Tensor:
    """silu(e) * g, of any one shape."""
    return cast(Tensor, _elementwise(e).swiglu(e, g))


def swiglu_backward_(dh: Tensor, e: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place: dh becomes h, e becomes its gradient, g becomes its gradient. Returns the three."""
    return cast(tuple[Tensor, Tensor, Tensor], _elementwise(e).swiglu_backward_(dh, e, g))


def swiglu_lora_down(
    e: Tensor, g: Tensor, adapter: Tensor, module: int, rows: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """h = silu(e) * g, and the down projection's (mask * h / (1 - p)) @ A^T, in one pass."""
    return cast(tuple[Tensor, Tensor], _lora(e).swiglu_lora_down(e, g, adapter, module, rows, p))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and rstd (tokens,) in float32, for x (tokens, width) or, per head, (tokens * heads, head_dim)."""
    return cast(tuple[Tensor, Tensor], _elementwise(x).rms_norm(x, weight, eps))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """s = x + residual, its norm y, and rstd."""
    return cast(tuple[Tensor, Tensor, Tensor], _elementwise(x).add_rms_norm(x, residual, weight, eps))


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None = None) -> Tensor:
    """Gradient of x, plus ``add``. x is what was normed: with a residual, the sum."""
    return cast(Tensor, _elementwise(x).rms_norm_backward(dy, x, weight, rstd, add))


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
    """Rotary position embedding in place on q (tokens, heads_q, dim) and k (tokens, heads_k, dim).

    The stride of tokens is free, so q and k may be views of one buffer; channels lie side by side. cos and sin are
    (tokens, dim) or (tokens, dim / 2): only the first half of the columns is read.
    """
    return cast(tuple[Tensor, Tensor], _elementwise(q).rope_(q, k, cos, sin, backward))


def dequantize_nf4(packed: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
    """The matrix behind bitsandbytes' weight data and QuantState, equal to the bit to ``dequantize_4bit``.

    Raises ValueError where the state is not NF4.
    """
    if state.quant_type != "nf4":
        raise ValueError(f"the weight is quantised as {state.quant_type}; this reads nf4")
    return cast(Tensor, _elementwise(packed).dequantize_nf4(packed, state, out))


def _has_triton_compute(x: Tensor) -> bool:
    return x.dtype != torch.float64 and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def _lora(x: Tensor) -> ModuleType:
    """Which module computes the LoRA products on this tensor."""
    if not _has_triton_compute(x):
        return reference
    from forge.training.kernels import gpu

    return gpu


def _elementwise(x: Tensor) -> ModuleType:
    """Which module computes everything else on this tensor."""
    if not _has_triton_compute(x):
        return reference
    from forge.training.kernels import gpu_elementwise

    return gpu_elementwise
