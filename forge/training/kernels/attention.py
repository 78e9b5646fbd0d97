"""Causal attention over documents that lie end to end, forwards and backwards, with what the backward needs in hand.

PyTorch's own kernels, called below autograd: a layer keeps the output and the log-sum-exp, computes queries, keys and
values again, and goes backwards without a second forward pass of the attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Documents:
    """The documents of a micro-batch, laid end to end.

    ``lengths`` in tokens; ``borders`` int32 of shape (documents + 1,), the first token of each and the end, on the
    device. ``cudnn``: cuDNN's kernels, one document at a time. They are the faster ones for long documents on Hopper,
    and plan each new length anew.
    """

    lengths: tuple[int, ...]
    borders: Tensor
    cudnn: bool

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device, cudnn: bool = False) -> Documents:
        borders = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        borders[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        return Documents(tuple(lengths), borders.to(device, non_blocking=True), cudnn and device.type == "cuda")

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)


@dataclass(frozen=True)
class Attended:
    """What the backward needs beside queries, keys and values.

    ``output`` (tokens, heads, head_dim); ``rest`` per kernel call: log-sum-exp and what else the kernel asks back.
    """

    output: Tensor
    rest: tuple[Any, ...]


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Attended:
    """Causal attention within each document. q (tokens, heads, head_dim); k, v (tokens, key heads, head_dim)."""
    if documents.cudnn:
        return _by_document(_cudnn, q, k, v, documents, scale)
    if q.is_cuda and q.dtype != torch.float32:
        borders, longest = documents.borders, documents.longest
        output, lse, seed, offset, _ = aten._flash_attention_forward(
            q, k, v, borders, borders, longest, longest, 0.0, True, False, scale=scale
        )
        return Attended(output, (lse, seed, offset))
    return _by_document(_plain, q, k, v, documents, scale)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Attended, documents: Documents, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, shaped like them. ``grad`` is that of the output."""
    if documents.cudnn:
        return _backward_by_document(_cudnn_backward, grad, q, k, v, kept, documents, scale)
    if q.is_cuda and q.dtype != torch.float32:
        borders, longest = documents.borders, documents.longest
        lse, seed, offset = kept.rest
        dq, dk, dv = aten._flash_attention_backward(
            grad, q, k, v, kept.output, lse, borders, borders, longest, longest, 0.0, True, seed, offset, scale=scale
        )
        return dq, dk, dv
    return _backward_by_document(_plain_backward, grad, q, k, v, kept, documents, scale)


def _by_document(forward: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Attended:
    output, rest, start = torch.empty_like(q, memory_format=torch.contiguous_format), [], 0
    for length in documents.lengths:
        part = slice(start, start + length)
        own, *kept = forward(q[part], k[part], v[part], scale)
        output[part] = own
        rest.append(tuple(kept))
        start += length
    return Attended(output, tuple(rest))


def _backward_by_document(
    backward: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Attended, documents: Documents, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    start = 0
    for length, rest in zip(documents.lengths, kept.rest, strict=True):
        part = slice(start, start + length)
        own = backward(grad[part], q[part], k[part], v[part], kept.output[part], rest, scale)
        for whole, piece in zip(gradients, own, strict=True):
            whole[part] = piece
        start += length
    return gradients


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """(tokens, heads, head_dim) as the views (1, heads, tokens, head_dim) that PyTorch's attention takes."""
    return [tensor.transpose(0, 1).unsqueeze(0) for tensor in tensors]


def _tokens_first(tensor: Tensor) -> Tensor:
    return tensor.squeeze(0).transpose(0, 1)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Any, ...]:
    out = aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), None, True, 0.0, True, False, scale=scale)
    return _tokens_first(out[0]), *out[1:8]


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, rest: tuple[Any, ...], scale: float
) -> list[Tensor]:
    lse, borders_q, borders_k, longest_q, longest_k, seed, offset = rest
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        *_heads_first(grad, q, k, v, output),
        lse,
        seed,
        offset,
        None,
        borders_q,
        borders_k,
        longest_q,
        longest_k,
        0.0,
        True,
        scale=scale,
    )
    return [_tokens_first(gradient) for gradient in gradients]


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's kernel for a CPU; on a GPU in float32, which no fused kernel takes, the plain mathematics."""
    groups = q.shape[1] // k.shape[1]
    queries, keys, values = _heads_first(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    if not q.is_cuda:
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, 0.0, True, scale=scale)
        return _tokens_first(output), lse
    scores = _scores(queries, keys, scale)
    return _tokens_first(scores.softmax(-1) @ values), scores.logsumexp(-1)


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, rest: tuple[Any, ...], scale: float
) -> list[Tensor]:
    (lse,) = rest
    groups = q.shape[1] // k.shape[1]
    grads, queries, keys, values, outputs = _heads_first(
        grad, q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), output
    )
    if not q.is_cuda:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads, queries, keys, values, outputs, lse, 0.0, True, scale=scale
        )
    else:
        weights = (_scores(queries, keys, scale) - lse.unsqueeze(-1)).exp()
        dv = weights.transpose(-1, -2) @ grads
        inner = weights * (grads @ values.transpose(-1, -2) - (grads * outputs).sum(-1, keepdim=True)) * scale
        dq, dk = inner @ keys, inner.transpose(-1, -2) @ queries
    shape = (*k.shape[:2], groups, k.shape[2])
    return [_tokens_first(dq), *(_tokens_first(d).reshape(shape).sum(2) for d in (dk, dv))]


def _scores(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    future = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=queries.device).triu(1)
    return (queries @ keys.transpose(-1, -2) * scale).masked_fill(future, float("-inf"))
