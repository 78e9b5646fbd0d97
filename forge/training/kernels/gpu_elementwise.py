"""What is done element by element or row by row, in Triton: SwiGLU, RMSNorm, RoPE, NF4. Computed in float32."""

# ruff: noqa: N803 - constants of a kernel are written large, as everywhere in Triton
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from forge.training.kernels.gpu import check_contiguous

# SwiGLU


@triton.jit(do_not_specialize=["size"])
def _swiglu(e, g, h, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    e_ = tl.load(e + offsets, mask=inside, other=0.0).to(tl.float32)
    g_ = tl.load(g + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + offsets, (e_ * tl.sigmoid(e_) * g_).to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _swiglu_backward(dh, e, g, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    dh_ = tl.load(dh + offsets, mask=inside, other=0.0).to(tl.float32)
    e_ = tl.load(e + offsets, mask=inside, other=0.0).to(tl.float32)
    g_ = tl.load(g + offsets, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(e_)
    silu = e_ * sigmoid
    dtype: tl.constexpr = dh.dtype.element_ty
    tl.store(dh + offsets, (silu * g_).to(dtype), mask=inside)
    tl.store(e + offsets, (dh_ * g_ * (sigmoid + silu * (1.0 - sigmoid))).to(dtype), mask=inside)
    tl.store(g + offsets, (dh_ * silu).to(dtype), mask=inside)


def swiglu(e: Tensor, g: Tensor) -> Tensor:
    check_contiguous(e, g)
    h = torch.empty_like(e)
    block = 2048
    _swiglu[(triton.cdiv(e.numel(), block),)](e, g, h, e.numel(), block, num_warps=8)
    return h


def swiglu_backward_(dh: Tensor, e: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_contiguous(dh, e, g)
    block = 2048
    _swiglu_backward[(triton.cdiv(e.numel(), block),)](dh, e, g, e.numel(), block, num_warps=8)
    return dh, e, g


# RMSNorm


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["rstd"])
def _rms_norm(x, residual, total, weight, y, rstd, tokens, width, eps,
              ADD: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    cols = tl.arange(0, BLOCK)
    inside = (rows < tokens)[:, None] & (cols < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * width + cols[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    x_ = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        rounded = (x_ + tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(total + offsets, rounded, mask=inside)
        x_ = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x_ * x_, 1) / width + eps)
    tl.store(rstd + rows, scale, mask=rows < tokens)
    w = tl.load(weight + cols, mask=cols < width, other=0.0).to(tl.float32)
    normed = (x_ * scale[:, None]).to(dtype).to(tl.float32)
    tl.store(y + offsets, (normed * w[None, :]).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["rstd"])
def _rms_norm_backward(dy, x, weight, rstd, add, dx, tokens, width,
                       ADD: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    cols = tl.arange(0, BLOCK)
    inside = (rows < tokens)[:, None] & (cols < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * width + cols[None, :]
    scale = tl.load(rstd + rows, mask=rows < tokens, other=0.0)[:, None]
    w = tl.load(weight + cols, mask=cols < width, other=0.0).to(tl.float32)
    normed = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) * scale
    dw = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32) * w[None, :]
    grad = scale * (dw - normed * (tl.sum(dw * normed, 1) / width)[:, None])
    if ADD:
        grad += tl.load(add + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + offsets, grad.to(dx.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _, y, rstd = _norm(x, None, weight, eps)
    return y, rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _norm(x, residual, weight, eps)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None = None) -> Tensor:
    check_contiguous(dy, x, rstd, *([] if add is None else [add]))
    tokens, width = x.shape
    dx = torch.empty_like(x)
    block, rows, warps = _norm_blocks(width)
    _rms_norm_backward[(triton.cdiv(tokens, rows),)](
        dy, x, weight, rstd, x if add is None else add, dx, tokens, width, add is not None, rows, block, num_warps=warps
    )
    return dx


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    check_contiguous(x, *([] if residual is None else [residual]))
    tokens, width = x.shape
    y, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    rstd = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block, rows, warps = _norm_blocks(width)
    _rms_norm[(triton.cdiv(tokens, rows),)](
        x, x if residual is None else residual, total, weight, y, rstd, tokens, width, eps,
        residual is not None, rows, block, num_warps=warps,
    )  # fmt: skip
    return total, y, rstd


def _norm_blocks(width: int) -> tuple[int, int, int]:
    """Columns and rows of a program, and its warps: several rows where they are narrow (norms per head)."""
    block = int(triton.next_power_of_2(width))
    return block, max(1, 2048 // block), 4 if block <= 2048 else 8


# RoPE


@triton.jit
def _rotate(t, cos, sin, heads, head_stride, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    head, col = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (head < heads)[:, None] & (col < HALF)[None, :]
    first = t + head[:, None] * head_stride + col[None, :]
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(first + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(first, (a * cos - b * sin).to(t.dtype.element_ty), mask=inside)
    tl.store(first + HALF, (b * cos + a * sin).to(t.dtype.element_ty), mask=inside)


@triton.jit
def _rope(q, k, cos, sin, heads_q, heads_k, q_stride, q_head, k_stride, k_head, cos_stride, sin_stride,
          BACKWARD: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
          HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    c = tl.load(cos + token * cos_stride + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_stride + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        s = -s
    _rotate(q + token * q_stride, c, s, heads_q, q_head, HALF, BLOCK, HEADS_Q)
    _rotate(k + token * k_stride, c, s, heads_k, k_head, HALF, BLOCK, HEADS_K)


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
    if any(t.stride(-1) != 1 for t in (q, k, cos, sin)):
        raise ValueError("rope_ needs the channels of q, k, cos and sin side by side")
    half = q.shape[-1] // 2
    _rope[(q.shape[0],)](
        q, k, cos, sin, q.shape[1], k.shape[1], q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        cos.stride(0), sin.stride(0), backward, half, triton.next_power_of_2(half),
        triton.next_power_of_2(q.shape[1]), triton.next_power_of_2(k.shape[1]),
    )  # fmt: skip
    return q, k


# NF4


@triton.jit
def _dequantize_nf4(packed, absmax, code, code2, absmax2, offset, out, size,
                    NESTED: tl.constexpr, BLOCKSIZE2: tl.constexpr, HALF: tl.constexpr, BB: tl.constexpr):  # fmt: skip
    """BB blocks of HALF bytes, each with one absmax. Launched without fused multiply-add: each result is rounded."""
    blocks = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    inside = blocks * (2 * HALF) < size
    scale = tl.load(absmax + blocks, mask=inside, other=0)
    if NESTED:
        outer = tl.load(absmax2 + blocks // BLOCKSIZE2, mask=inside, other=0.0)
        scale = tl.load(code2 + scale.to(tl.int32), mask=inside, other=0.0) * outer + tl.load(offset)
    places = blocks[:, None] * HALF + tl.arange(0, HALF)[None, :]
    data = tl.load(packed + places, mask=places * 2 < size, other=0).to(tl.int32)
    high = tl.load(code + (data >> 4)) * scale[:, None]
    low = tl.load(code + (data & 15)) * scale[:, None]
    values = tl.interleave(high, low).to(out.dtype.element_ty)
    to = blocks[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + to, values, mask=to < size)


def dequantize_nf4(packed: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device) if out is None else out
    data, nested, half = packed.view(torch.uint8), state.state2, state.blocksize // 2
    check_contiguous(data, out)
    absmax2, code2, offset, blocksize2 = state.absmax, state.code, state.absmax, 1
    if nested is not None:
        absmax2, code2, offset, blocksize2 = nested.absmax, nested.code, state.offset, nested.blocksize
    blocks = max(1, 1024 // half)
    _dequantize_nf4[(triton.cdiv(out.numel(), blocks * half * 2),)](
        data, state.absmax, state.code, code2, absmax2, offset, out, out.numel(),
        nested is not None, blocksize2, half, blocks, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
