"""Every operation of reference.py in Triton, for bfloat16, float16 and float32.

Deterministic: no atomics; sums that are split over programs are written as float32 parts and added in a fixed order.
Nothing is autotuned, and what differs from call to call (tokens, module keys, alignment of row keys) is not specialised,
so the kernels of a run are compiled once. Row offsets are 64 bit.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-any-return"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from forge.training.kernels import dropout

_MULTIPLIER_1 = tl.constexpr(dropout.MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(dropout.MULTIPLIER_2)
_ODD = tl.constexpr(dropout.ODD)

# Programs that fill a large GPU three to four times over; a small one has them in more rounds.
_ENOUGH_PROGRAMS = 512

_KEYS = ["module0", "module1", "module2"]


# Dropout


@triton.jit
def _mix32(x):
    x = x ^ (x >> 16)
    x = tl.mul(x, _MULTIPLIER_1, sanitize_overflow=False)
    x = x ^ (x >> 15)
    x = tl.mul(x, _MULTIPLIER_2, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def _add32(x, y):
    return tl.add(x, y, sanitize_overflow=False)


@triton.jit
def _channel_words(channels):
    """The part of a column key that all modules share."""
    return _mix32(tl.mul(channels.to(tl.uint32), _ODD, sanitize_overflow=False))


@triton.jit
def _keep(rows, channel_words, module, threshold):
    """As dropout.keep_mask: bool (rows, channels)."""
    columns = _mix32(_add32(channel_words, module.to(tl.uint32)))
    hashes = _mix32(_add32(rows[:, None], columns[None, :]))
    return (hashes >> 1).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["word", "num_tokens"], do_not_specialize_on_alignment=["keys"])
def _step_keys(keys, out, word, num_tokens, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_tokens
    key = tl.load(keys + offsets, mask=inside, other=0).to(tl.uint32, bitcast=True)
    mixed = _mix32(_add32(key, word.to(tl.uint32)))
    tl.store(out + offsets, mixed.to(tl.int32, bitcast=True), mask=inside)


def step_keys(keys: Tensor, word: int) -> Tensor:
    """One launch of what dropout.step_keys does; ``word`` as a signed 32-bit integer."""
    out = torch.empty_like(keys)
    block = 1024
    _step_keys[(triton.cdiv(keys.numel(), block),)](keys, out, word, keys.numel(), block)
    return out


# LoRA


@triton.jit
def _load_a(a, ranks, cols, rank, width, dtype: tl.constexpr):
    """A tile of A, (ranks, cols), zero outside."""
    inside = (ranks < rank)[:, None] & (cols < width)[None, :]
    return tl.load(a + ranks[:, None] * width + cols[None, :], mask=inside, other=0.0).to(dtype)


@triton.jit
def _project(acc, x, a, row_keys, words, module, threshold, P: tl.constexpr):
    if P:
        x = tl.where(_keep(row_keys, words, module, threshold), x, 0.0)
    return tl.dot(x, tl.trans(a), acc, input_precision="ieee")


@triton.jit
def _store_d(out, acc, rows, ranks, tokens, rank):
    inside = (rows < tokens)[:, None] & (ranks < rank)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * rank + ranks[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["tokens", "split", "threshold", "scale", *_KEYS],
    do_not_specialize_on_alignment=["row_keys", "out0", "out1", "out2"],
)
def _lora_down(
    x, g, h, a0, a1, a2, out0, out1, out2, row_keys, tokens, width, split,
    rank0, rank1, rank2, module0, module1, module2, threshold, scale,
    N: tl.constexpr, SWIGLU: tl.constexpr, P: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of BM tokens, channels from ``split`` to ``split`` (program 1). With SWIGLU, x is e, and h is written."""
    pk = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.arange(0, R)
    keys = tl.zeros((BM,), tl.uint32)
    if P:
        keys = tl.load(row_keys + rows, mask=rows < tokens, other=0).to(tl.uint32, bitcast=True)
    acc0 = tl.zeros((BM, R), tl.float32)
    acc1 = tl.zeros((BM, R), tl.float32)
    acc2 = tl.zeros((BM, R), tl.float32)
    end = tl.minimum(pk * split + split, width)
    for start in range(pk * split, end, BK):
        cols = start + tl.arange(0, BK)
        inside = (rows < tokens)[:, None] & (cols < width)[None, :]
        offsets = rows.to(tl.int64)[:, None] * width + cols[None, :]
        tile = tl.load(x + offsets, mask=inside, other=0.0)
        if SWIGLU:
            e = tile.to(tl.float32)
            product = e * tl.sigmoid(e) * tl.load(g + offsets, mask=inside, other=0.0).to(tl.float32)
            tile = product.to(x.dtype.element_ty)
            tl.store(h + offsets, tile, mask=inside)
        words = _channel_words(cols)
        dtype: tl.constexpr = x.dtype.element_ty
        a = _load_a(a0, ranks, cols, rank0, width, dtype)
        acc0 = _project(acc0, tile, a, keys, words, module0, threshold, P)
        if N > 1:
            a = _load_a(a1, ranks, cols, rank1, width, dtype)
            acc1 = _project(acc1, tile, a, keys, words, module1, threshold, P)
        if N > 2:
            a = _load_a(a2, ranks, cols, rank2, width, dtype)
            acc2 = _project(acc2, tile, a, keys, words, module2, threshold, P)
    part = pk.to(tl.int64) * tokens
    _store_d(out0 + part * rank0, acc0 * scale, rows, ranks, tokens, rank0)
    if N > 1:
        _store_d(out1 + part * rank1, acc1 * scale, rows, ranks, tokens, rank1)
    if N > 2:
        _store_d(out2 + part * rank2, acc2 * scale, rows, ranks, tokens, rank2)


@triton.jit
def _accumulate(acc, x, d, rows, end, ranks, rank, row_keys, words, module, threshold, P: tl.constexpr):
    if P:
        x = tl.where(_keep(row_keys, words, module, threshold), x, 0.0)
    inside = (rows < end)[:, None] & (ranks < rank)[None, :]
    tile = tl.load(d + rows.to(tl.int64)[:, None] * rank + ranks[None, :], mask=inside, other=0.0).to(x.dtype)
    return tl.dot(tl.trans(tile), x, acc, input_precision="ieee")


@triton.jit
def _store_a(out, acc, ranks, cols, rank, width):
    inside = (ranks < rank)[:, None] & (cols < width)[None, :]
    tl.store(out + ranks[:, None] * width + cols[None, :], acc, mask=inside)


@triton.jit(
    do_not_specialize=["tokens", "split", "threshold", "scale", *_KEYS],
    do_not_specialize_on_alignment=["row_keys", "d0", "d1", "d2"],
)
def _lora_grad_a(
    x, d0, d1, d2, out0, out1, out2, row_keys, tokens, width, split,
    rank0, rank1, rank2, module0, module1, module2, threshold, scale,
    N: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Channels of BK, tokens from ``split`` to ``split`` (program 1)."""
    pm = tl.program_id(1)
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    ranks = tl.arange(0, R)
    words = _channel_words(cols)
    acc0 = tl.zeros((R, BK), tl.float32)
    acc1 = tl.zeros((R, BK), tl.float32)
    acc2 = tl.zeros((R, BK), tl.float32)
    end = tl.minimum(pm * split + split, tokens)
    for start in range(pm * split, end, BM):
        rows = start + tl.arange(0, BM)
        inside = (rows < end)[:, None] & (cols < width)[None, :]
        tile = tl.load(x + rows.to(tl.int64)[:, None] * width + cols[None, :], mask=inside, other=0.0)
        keys = tl.zeros((BM,), tl.uint32)
        if P:
            keys = tl.load(row_keys + rows, mask=rows < end, other=0).to(tl.uint32, bitcast=True)
        acc0 = _accumulate(acc0, tile, d0, rows, end, ranks, rank0, keys, words, module0, threshold, P)
        if N > 1:
            acc1 = _accumulate(acc1, tile, d1, rows, end, ranks, rank1, keys, words, module1, threshold, P)
        if N > 2:
            acc2 = _accumulate(acc2, tile, d2, rows, end, ranks, rank2, keys, words, module2, threshold, P)
    part = pm.to(tl.int64) * width
    _store_a(out0 + part * rank0, acc0 * scale, ranks, cols, rank0, width)
    if N > 1:
        _store_a(out1 + part * rank1, acc1 * scale, ranks, cols, rank1, width)
    if N > 2:
        _store_a(out2 + part * rank2, acc2 * scale, ranks, cols, rank2, width)


@triton.jit
def _sum_one(parts, out, splits, size, offsets):
    total = tl.zeros(offsets.shape, tl.float32)
    for part in range(splits):
        total += tl.load(parts + part * size + offsets, mask=offsets < size, other=0.0)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=offsets < size)


@triton.jit(
    do_not_specialize=["splits", "size0", "size1", "size2"],
    do_not_specialize_on_alignment=["parts0", "parts1", "parts2", "out0", "out1", "out2"],
)
def _sum_parts(parts0, parts1, parts2, out0, out1, out2, splits, size0, size1, size2, BLOCK: tl.constexpr):
    """Parts (splits, size) in the order of their numbers; program 1 is the adapter."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    if which == 0:
        _sum_one(parts0, out0, splits, size0, offsets)
    elif which == 1:
        _sum_one(parts1, out1, splits, size1, offsets)
    else:
        _sum_one(parts2, out2, splits, size2, offsets)


@triton.jit
def _back(total, d, a, rows, cols, tokens, width, rank, row_keys, words, module, threshold, dtype: tl.constexpr,
          P: tl.constexpr, R: tl.constexpr, RB: tl.constexpr):  # fmt: skip
    """total + mask * (d @ A), RB ranks at a time."""
    product = tl.zeros(total.shape, tl.float32)
    for r in tl.static_range(0, R, RB):
        ranks = r + tl.arange(0, RB)
        inside = (rows < tokens)[:, None] & (ranks < rank)[None, :]
        tile = tl.load(d + rows.to(tl.int64)[:, None] * rank + ranks[None, :], mask=inside, other=0.0).to(dtype)
        product = tl.dot(tile, _load_a(a, ranks, cols, rank, width, dtype), product, input_precision="ieee")
    if P:
        product = tl.where(_keep(row_keys, words, module, threshold), product, 0.0)
    return total + product


@triton.jit(
    do_not_specialize=["tokens", "threshold", "scale", *_KEYS],
    do_not_specialize_on_alignment=["row_keys", "d0", "d1", "d2"],
)
def _lora_add_grad_x(
    dx, d0, d1, d2, a0, a1, a2, row_keys, tokens, width,
    rank0, rank1, rank2, module0, module1, module2, threshold, scale,
    N: tl.constexpr, P: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    words = _channel_words(cols)
    keys = tl.zeros((BM,), tl.uint32)
    if P:
        keys = tl.load(row_keys + rows, mask=rows < tokens, other=0).to(tl.uint32, bitcast=True)
    dtype: tl.constexpr = dx.dtype.element_ty
    total = tl.zeros((BM, BK), tl.float32)
    total = _back(total, d0, a0, rows, cols, tokens, width, rank0, keys, words, module0, threshold, dtype, P, R, RB)
    if N > 1:
        total = _back(total, d1, a1, rows, cols, tokens, width, rank1, keys, words, module1, threshold, dtype, P, R, RB)
    if N > 2:
        total = _back(total, d2, a2, rows, cols, tokens, width, rank2, keys, words, module2, threshold, dtype, P, R, RB)
    inside = (rows < tokens)[:, None] & (cols < width)[None, :]
    place = dx + rows.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(place, (total * scale + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(dtype), mask=inside)


def lora_down(
    x: Tensor, adapters: Sequence[Tensor], modules: Sequence[int], rows: Tensor | None, p: float
) -> list[Tensor]:
    return _down(x, None, None, adapters, modules, rows, p)


def swiglu_lora_down(
    e: Tensor, g: Tensor, adapter: Tensor, module: int, rows: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    h = torch.empty_like(e)
    _check_contiguous(g)
    return h, _down(e, g, h, [adapter], [module], rows, p)[0]


def _down(
    x: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    adapters: Sequence[Tensor],
    modules: Sequence[int],
    rows: Tensor | None,
    p: float,
) -> list[Tensor]:
    _check_contiguous(x, *adapters)
    tokens, width = x.shape
    ranks = [a.shape[0] for a in adapters]
    if not _fit_together(ranks):
        return [_down(x, g, h, [a], [m], rows, p)[0] for a, m in zip(adapters, modules, strict=True)]
    padded = _padded_rank(ranks)
    bm, bk = 64, 32 if padded > 64 or x.element_size() == 4 else 64
    row_blocks = triton.cdiv(tokens, bm)
    splits, split = _split(width, row_blocks, max(bk, 512), bk)
    dtype = x.dtype if splits == 1 else torch.float32
    outs = [torch.empty((splits, tokens, rank), dtype=dtype, device=x.device) for rank in ranks]
    keys, is_dropped = _row_keys(rows, x, p)
    _lora_down[(row_blocks, splits)](
        x, x if g is None else g, x if h is None else h, *_three(adapters), *_three(outs), keys, tokens, width, split,
        *_three(ranks), *_three(modules), dropout.threshold(p), 1 / (1 - p),
        len(ranks), g is not None, is_dropped, padded, bm, bk, num_warps=4 if padded <= 64 else 8, num_stages=3,
    )  # fmt: skip
    return _summed(outs, x.dtype)


def lora_grad_a(
    x: Tensor, grads: Sequence[Tensor], modules: Sequence[int], rows: Tensor | None, p: float
) -> list[Tensor]:
    _check_contiguous(x, *grads)
    tokens, width = x.shape
    ranks = [d.shape[1] for d in grads]
    if not _fit_together(ranks):
        return [lora_grad_a(x, [d], [m], rows, p)[0] for d, m in zip(grads, modules, strict=True)]
    padded = _padded_rank(ranks)
    bm, bk = 32 if padded > 64 or x.element_size() == 4 else 64, 64
    column_blocks = triton.cdiv(width, bk)
    splits, split = _split(tokens, column_blocks, max(bm, 256), bm)
    outs = [torch.empty((splits, rank, width), dtype=torch.float32, device=x.device) for rank in ranks]
    keys, is_dropped = _row_keys(rows, x, p)
    _lora_grad_a[(column_blocks, splits)](
        x, *_three(grads), *_three(outs), keys, tokens, width, split,
        *_three(ranks), *_three(modules), dropout.threshold(p), 1 / (1 - p),
        len(ranks), is_dropped, padded, bm, bk, num_warps=4 if padded <= 64 else 8, num_stages=3,
    )  # fmt: skip
    return _summed(outs, torch.float32)


def lora_add_grad_x_(
    dx: Tensor,
    grads: Sequence[Tensor],
    adapters: Sequence[Tensor],
    modules: Sequence[int],
    rows: Tensor | None,
    p: float,
) -> Tensor:
    _check_contiguous(dx, *grads, *adapters)
    tokens, width = dx.shape
    ranks = [d.shape[1] for d in grads]
    padded = _padded_rank(ranks)
    bm, bk = 64, 128 if dx.element_size() == 2 else 64
    keys, is_dropped = _row_keys(rows, dx, p)
    _lora_add_grad_x[(triton.cdiv(tokens, bm), triton.cdiv(width, bk))](
        dx, *_three(grads), *_three(adapters), keys, tokens, width,
        *_three(ranks), *_three(modules), dropout.threshold(p), 1 / (1 - p),
        len(ranks), is_dropped, padded, min(padded, 32 if dx.element_size() == 4 else 64), bm, bk,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    return dx


def _three(values: Sequence[Any]) -> list[Any]:
    """A kernel has three places for adapters; those that are not used hold the first again."""
    return [*values, *[values[0]] * (3 - len(values))]


def _padded_rank(ranks: Sequence[int]) -> int:
    """The matrix units take at least 16, and powers of two."""
    return max(16, int(triton.next_power_of_2(max(ranks))))


def _fit_together(ranks: Sequence[int]) -> bool:
    """Whether the sums of all adapters fit into the registers of one program; otherwise x is read once for each."""
    return len(ranks) == 1 or len(ranks) * _padded_rank(ranks) <= 192


def _split(length: int, programs: int, least: int, block: int) -> tuple[int, int]:
    """Into how many parts a sum over ``length`` is split, and a part's length, a multiple of ``block``."""
    parts = max(1, min(triton.cdiv(length, least), triton.cdiv(_ENOUGH_PROGRAMS, max(1, programs))))
    split = triton.cdiv(triton.cdiv(length, parts), block) * block
    return max(1, triton.cdiv(length, max(1, split))), max(block, split)


def _row_keys(rows: Tensor | None, x: Tensor, p: float) -> tuple[Tensor, bool]:
    if p == 0:
        return x, False
    if rows is None:
        raise ValueError("dropout needs the row keys of its tokens")
    _check_contiguous(rows)
    return rows, True


def _summed(outs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    splits = outs[0].shape[0]
    if splits == 1:
        return [out[0] for out in outs]
    sums = [torch.empty(out.shape[1:], dtype=dtype, device=out.device) for out in outs]
    sizes, block = [total.numel() for total in sums], 512
    grid = (triton.cdiv(max(sizes), block), len(outs))
    _sum_parts[grid](*_three(outs), *_three(sums), splits, *_three(sizes), block)
    return sums


def _check_contiguous(*tensors: Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(
                f"the kernels read contiguous tensors; this one is {tuple(tensor.shape)}, {tensor.stride()}"
            )


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
    _check_contiguous(e, g)
    h = torch.empty_like(e)
    block = 2048
    _swiglu[(triton.cdiv(e.numel(), block),)](e, g, h, e.numel(), block, num_warps=8)
    return h


def swiglu_backward_(dh: Tensor, e: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_contiguous(dh, e, g)
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
    _check_contiguous(dy, x, rstd, *([] if add is None else [add]))
    tokens, width = x.shape
    dx = torch.empty_like(x)
    block, rows, warps = _norm_blocks(width)
    _rms_norm_backward[(triton.cdiv(tokens, rows),)](
        dy, x, weight, rstd, x if add is None else add, dx, tokens, width, add is not None, rows, block, num_warps=warps
    )
    return dx


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check_contiguous(x, *([] if residual is None else [residual]))
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
    """BB blocks of HALF bytes, each with one absmax. Products and sums are rounded one by one (no fused multiply-add)."""
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
    _check_contiguous(data, out)
    absmax2, code2, offset, blocksize2 = state.absmax, state.code, state.absmax, 1
    if nested is not None:
        absmax2, code2, offset, blocksize2 = nested.absmax, nested.code, state.offset, nested.blocksize
    blocks = max(1, 1024 // half)
    _dequantize_nf4[(triton.cdiv(out.numel(), blocks * half * 2),)](
        data, state.absmax, state.code, code2, absmax2, offset, out, out.numel(),
        nested is not None, blocksize2, half, blocks, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
