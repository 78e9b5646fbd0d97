"""Dropout and the LoRA products in Triton: those of reference.py, for bfloat16, float16 and float32.

Deterministic: no atomics; sums that are split over programs are written as float32 parts and added in a fixed order.
Nothing is autotuned, and what differs from call to call (tokens, module keys, alignment of row keys) is not
specialised, so the kernels of a run are compiled once. Row offsets are 64 bit.
"""

# ruff: noqa: N803 - constants of a kernel are written large, as everywhere in Triton
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

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
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Programs that fill a large GPU three to four times over; a small one has them in more rounds.
_ENOUGH_PROGRAMS = 512

_KEYS = ["module0", "module1", "module2"]


# Dropout


@triton.jit
def _scramble(x):
    x = x ^ (x >> 16)
    x = tl.mul(x, _MULTIPLIER_1, sanitize_overflow=False)
    x = x ^ (x >> 15)
    return tl.mul(x, _MULTIPLIER_2, sanitize_overflow=False)


@triton.jit
def _mix32(x):
    x = _scramble(x)
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
    # h >= 2 t, unsigned, is (h >> 1) >= t with one operation less
    return _scramble(_add32(rows[:, None], columns[None, :])) >= threshold.to(tl.uint32) << 1


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
def _dot(a, b, acc):
    if _IS_INTERPRETED:  # the interpreter would multiply bfloat16 as the integers that it keeps it in
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load_a(a, ranks, cols, rank, width, dtype: tl.constexpr):
    """A tile of A, (ranks, cols), zero outside."""
    inside = (ranks < rank)[:, None] & (cols < width)[None, :]
    return tl.load(a + ranks[:, None] * width + cols[None, :], mask=inside, other=0.0).to(dtype)


@triton.jit
def _project(acc, x, a, row_keys, words, module, threshold, P: tl.constexpr):
    if P:
        x = tl.where(_keep(row_keys, words, module, threshold), x, 0.0)
    return _dot(x, tl.trans(a), acc)


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
    return _dot(tl.trans(tile), x, acc)


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
        product = _dot(tile, _load_a(a, ranks, cols, rank, width, dtype), product)
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
    check_contiguous(g)
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
    check_contiguous(x, *adapters)
    tokens, width = x.shape
    ranks = [a.shape[0] for a in adapters]
    if not _fit_together(ranks):
        return [_down(x, g, h, [a], [m], rows, p)[0] for a, m in zip(adapters, modules, strict=True)]
    padded = _padded_rank(ranks)
    bm, bk = 64, 32 if len(ranks) * padded > 128 or x.element_size() == 4 else 64
    row_blocks = triton.cdiv(tokens, bm)
    splits, split = _split(width, row_blocks, max(bk, 512), bk)
    dtype = x.dtype if splits == 1 else torch.float32
    outs = [torch.empty((splits, tokens, rank), dtype=dtype, device=x.device) for rank in ranks]
    keys, is_dropped = _row_keys(rows, x, p)
    _lora_down[(row_blocks, splits)](
        x, x if g is None else g, x if h is None else h, *_three(adapters), *_three(outs), keys, tokens, width, split,
        *_three(ranks), *_three(modules), dropout.threshold(p), 1 / (1 - p),
        len(ranks), g is not None, is_dropped, padded, bm, bk, num_warps=8, num_stages=2 if padded > 128 else 3,
    )  # fmt: skip
    return _summed(outs, x.dtype)


def lora_grad_a(
    x: Tensor, grads: Sequence[Tensor], modules: Sequence[int], rows: Tensor | None, p: float
) -> list[Tensor]:
    check_contiguous(x, *grads)
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
        len(ranks), is_dropped, padded, bm, bk, num_warps=4 if padded <= 64 else 8, num_stages=2 if padded > 128 else 3,
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
    check_contiguous(dx, *grads, *adapters)
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
    check_contiguous(rows)
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


def check_contiguous(*tensors: Tensor) -> None:
    """Raises ValueError where one is not."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(
                f"the kernels read contiguous tensors; this one is {tuple(tensor.shape)}, {tensor.stride()}"
            )
