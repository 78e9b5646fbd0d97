"""Every operation in plain torch: what the Triton kernels are tested against, and what runs on a CPU.

Any floating dtype; 16-bit inputs are computed in float32, with one rounding at the end (two where it is said).
x: (tokens, in). A: (rank, in), rounded to x's dtype before the product. d: (tokens, rank). ``rows``: row keys of
:func:`forge.training.kernels.dropout.step_keys`, None where p is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from forge.training.kernels.dropout import keep_mask


def lora_down(
    x: Tensor, adapters: Sequence[Tensor], modules: Sequence[int], rows: Tensor | None, p: float
) -> list[Tensor]:
    """(mask_i * x / (1 - p)) @ A_i^T for each adapter, (tokens, rank_i) in x's dtype."""
    pairs = zip(adapters, modules, strict=True)
    return [((_dropped(x, m, rows, p) @ _wide(a.to(x.dtype)).T) / (1 - p)).to(x.dtype) for a, m in pairs]


def lora_grad_a(
    x: Tensor, grads: Sequence[Tensor], modules: Sequence[int], rows: Tensor | None, p: float
) -> list[Tensor]:
    """d_i^T @ (mask_i * x / (1 - p)) for each adapter, (rank_i, in) in float32 (float64 for float64)."""
    pairs = zip(grads, modules, strict=True)
    return [(_wide(d).T @ _dropped(x, m, rows, p)) / (1 - p) for d, m in pairs]


def lora_add_grad_x_(
    dx: Tensor,
    grads: Sequence[Tensor],
    adapters: Sequence[Tensor],
    modules: Sequence[int],
    rows: Tensor | None,
    p: float,
) -> Tensor:
    """In place: dx += sum of mask_i * (d_i @ A_i) / (1 - p), rounded once. Returns dx."""
    total = torch.zeros_like(dx, dtype=_wide_dtype(dx))
    for d, a, module in zip(grads, adapters, modules, strict=True):
        total += _dropped(_wide(d) @ _wide(a.to(dx.dtype)), module, rows, p)
    return dx.copy_(total.div_(1 - p).add_(dx))


def swiglu(e: Tensor, g: Tensor) -> Tensor:
    """silu(e) * g."""
    return (F.silu(_wide(e)) * _wide(g)).to(e.dtype)


def swiglu_backward_(dh: Tensor, e: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place: dh becomes h, e becomes its gradient, g becomes its gradient. Returns the three."""
    dh_, e_, g_ = _wide(dh), _wide(e), _wide(g)
    sigmoid = e_.sigmoid()
    silu = e_ * sigmoid
    h, de, dg = silu * g_, dh_ * g_ * (sigmoid + silu * (1 - sigmoid)), dh_ * silu
    return dh.copy_(h), e.copy_(de), g.copy_(dg)


def swiglu_lora_down(
    e: Tensor, g: Tensor, adapter: Tensor, module: int, rows: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """h = silu(e) * g in e's dtype, and the down projection's (mask * h / (1 - p)) @ A^T."""
    h = swiglu(e, g)
    return h, lora_down(h, [adapter], [module], rows, p)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y as Llama and Qwen have it (x * rstd rounded to x's dtype, then times weight), and rstd (tokens,) in float32."""
    x_ = _wide(x)
    rstd = torch.rsqrt(x_.square().mean(-1) + eps)
    y = _wide((x_ * rstd[:, None]).to(x.dtype)) * _wide(weight)
    return y.to(x.dtype), rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """s = x + residual rounded to x's dtype, and :func:`rms_norm` of s: (s, y, rstd)."""
    s = (_wide(x) + _wide(residual)).to(x.dtype)
    return s, *rms_norm(s, weight, eps)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None = None) -> Tensor:
    """Gradient of x, plus ``add`` (the residual's gradient); rounded once. The weight is frozen."""
    normed = _wide(x) * rstd[:, None]
    dw = _wide(dy) * _wide(weight)
    dx = rstd[:, None] * (dw - normed * (dw * normed).mean(-1, keepdim=True))
    return (dx if add is None else dx + _wide(add)).to(x.dtype)


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (rotate-half) in place on q (tokens, heads_q, dim) and k (tokens, heads_k, dim).

    cos and sin are (tokens, dim) or (tokens, dim / 2), in float32 or the model's dtype: of dim columns the first half
    is read, the second repeats it. ``backward`` turns the other way. Returns q and k.
    """
    half = q.shape[-1] // 2
    for t in (q, k):
        a, b = _wide(t[..., :half]), _wide(t[..., half:])
        c, s = (table[:, None, :half].to(a.dtype) for table in (cos, sin))
        s = -s if backward else s
        t.copy_(torch.cat([a * c - b * s, b * c + a * s], -1))
    return q, k


def dequantize_nf4(packed: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
    """The matrix behind bitsandbytes' 4-bit weight data and its QuantState, to the bit as ``dequantize_4bit`` has it.

    The high half of a byte comes first. Where the absmax is quantised itself (``state2``), it is
    code2[absmax] * absmax2 + offset in float32. Into ``out`` (the state's shape and dtype) where one is given.
    """
    absmax = state.absmax
    if state.state2 is not None:
        nested = state.state2
        absmax2 = nested.absmax.float().repeat_interleave(nested.blocksize)[: absmax.numel()]
        absmax = nested.code.float()[absmax.int().flatten()] * absmax2 + state.offset
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device) if out is None else out
    data = packed.view(torch.uint8).flatten()
    nibbles = torch.stack([data >> 4, data & 15], 1).flatten()[: out.numel()].int()
    scale = absmax.float().repeat_interleave(state.blocksize)[: out.numel()]
    return out.copy_((state.code.float()[nibbles] * scale).view(out.shape))


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))


def _dropped(x: Tensor, module: int, rows: Tensor | None, p: float) -> Tensor:
    """x without its dropped elements, not yet scaled."""
    if p == 0:
        return _wide(x)
    if rows is None:
        raise ValueError("dropout needs the row keys of its tokens")
    return _wide(x).masked_fill(~keep_mask(rows, module, x.shape[-1], p), 0.0)
