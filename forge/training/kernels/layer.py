"""A decoder layer of Llama, Qwen2 or Qwen3, forwards and backwards by hand.

Kept for the backward pass is either everything, or the layer's input with the attention's output and log-sum-exp. In
the second case the backward computes queries, keys, values and the MLP's inner products again, never the attention
and never the down projection. Rows longer than a tile go through the MLP tile by tile. Dropout's masks are a function
of the document and the position (dropout.py), so all of these are the same mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forge.training.kernels import ops
from forge.training.kernels.attention import Attended, Documents, attend, attend_backward
from forge.training.kernels.host_memory import HostMemory
from forge.training.kernels.projections import Gradients, Group


@dataclass
class MicroBatch:
    """One micro-batch on its way through all layers.

    ``rows``: row keys of the dropout, int32 (tokens,), or None without dropout. ``cos``, ``sin`` (tokens, head_dim).
    ``num_kept``: of how many layers everything is kept, counted from the last. ``host``: where the others put what they
    keep; None: on the device.
    """

    documents: Documents
    rows: Tensor | None
    num_kept: int
    tile_tokens: int
    host: HostMemory | None
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin."""
        assert self.cos is not None
        assert self.sin is not None
        return self.cos, self.sin


@dataclass(frozen=True)
class Shape:
    """Of one layer. ``eps`` of its norms, ``scale`` of its attention."""

    num_heads: int
    num_key_heads: int
    head_dim: int
    eps: float
    scale: float


@dataclass
class Queries:
    """Queries, keys and values of a layer's input x, with what their backward needs."""

    normed: Tensor
    rstd: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    downs: list[Tensor]
    head_norms: tuple[tuple[Tensor, Tensor], ...]


@dataclass
class Inner:
    """The MLP's inner products of one tile."""

    e: Tensor
    g: Tensor
    downs: list[Tensor]


class Layer:
    """The weights of one decoder layer and its two passes."""

    def __init__(
        self,
        shape: Shape,
        input_norm: Tensor,
        post_norm: Tensor,
        head_norms: tuple[Tensor, Tensor] | None,
        attention: Group,
        output: Group,
        inner: Group,
        down: Group,
    ) -> None:
        self.shape, self.input_norm, self.post_norm, self.head_norms = shape, input_norm, post_norm, head_norms
        self.attention, self.output, self.inner, self.down = attention, output, inner, down
        self.groups = (attention, output, inner, down)
        self.parameters = [parameter for group in self.groups for parameter in group.parameters()]

    def queries(self, x: Tensor, batch: MicroBatch) -> Queries:
        """Norm, projections, norms per head where there are any, rotation."""
        shape = self.shape
        normed, rstd = ops.rms_norm(x, self.input_norm, shape.eps)
        (q, k, v), downs = self.attention.forward(normed, batch.rows)
        q, k = q.unflatten(1, (shape.num_heads, -1)), k.unflatten(1, (shape.num_key_heads, -1))
        head_norms: tuple[tuple[Tensor, Tensor], ...] = ()
        if self.head_norms is not None:
            raw = [t.reshape(-1, shape.head_dim) for t in (q, k)]
            results = [ops.rms_norm(t, w, shape.eps) for t, w in zip(raw, self.head_norms, strict=True)]
            head_norms = tuple((t, r) for t, (_, r) in zip(raw, results, strict=True))
            q, k = (result.view(t.shape) for (result, _), t in zip(results, (q, k), strict=True))
        ops.rope_(q, k, *batch.tables)
        return Queries(normed, rstd, q, k, v.unflatten(1, (shape.num_key_heads, -1)), downs, head_norms)

    def after_attention(self, x: Tensor, attended: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Any]:
        """x plus the output projection, its norm, rstd, and what the projection's backward needs."""
        (projected,), downs = self.output.forward(attended.flatten(1), rows)
        return *ops.add_rms_norm(projected, x, self.post_norm, self.shape.eps), downs

    def mlp(self, normed: Tensor, rows: Tensor | None) -> tuple[Tensor, Inner]:
        """The MLP's output for one tile."""
        (e, g), downs = self.inner.forward(normed, rows)
        h = ops.swiglu(e, g)
        (y,), _ = self.down.forward(h, rows)
        return y, Inner(e, g, downs)

    def mlp_backward(
        self, dy: Tensor, normed: Tensor, inner: Inner, rows: Tensor | None, gradients: Gradients
    ) -> Tensor:
        """The gradient of ``normed``. Overwrites what ``inner`` holds."""
        through_b = self.down.through_b([dy])
        dh = self.down.input_gradient([dy], through_b, rows)
        h, de, dg = ops.swiglu_backward_(dh, inner.e, inner.g)
        self.down.adapter_gradients([dy], through_b, h, self.down.down(h, rows), rows, gradients)
        return self.inner.backward([de, dg], normed, inner.downs, rows, gradients)

    def attention_backward(
        self, d_attended: Tensor, queries: Queries, attended: Attended, batch: MicroBatch, gradients: Gradients
    ) -> Tensor:
        """The gradient of the normed input."""
        shape = self.shape
        dq, dk, dv = attend_backward(
            d_attended, queries.q, queries.k, queries.v, attended, batch.documents, shape.scale
        )
        ops.rope_(dq, dk, *batch.tables, backward=True)
        if self.head_norms is not None:
            dq, dk = (
                ops.rms_norm_backward(d.reshape(-1, shape.head_dim), raw, w, rstd).view(d.shape)
                for d, (raw, rstd), w in zip((dq, dk), queries.head_norms, self.head_norms, strict=True)
            )
        grads = [d.reshape(d.shape[0], -1) for d in (dq, dk, dv)]
        return self.attention.backward(grads, queries.normed, queries.downs, batch.rows, gradients)


@dataclass
class Kept:
    """What a layer whose activations are kept holds beside its input and the attention's output."""

    queries: Queries
    total: Tensor
    rstd: Tensor
    normed: Tensor
    output_downs: list[Tensor]
    inner: list[Inner]


class LayerFunction(torch.autograd.Function):  # type: ignore[misc]
    """(hidden, micro-batch, layer, whether everything is kept, the layer's adapters) -> hidden."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, batch: MicroBatch, layer: Layer, keep: bool, *adapters: Tensor) -> Tensor:
        x = hidden.detach().reshape(-1, hidden.shape[-1])
        ctx.batch, ctx.layer, ctx.host, ctx.kept = batch, layer, None, None
        with torch.autocast(x.device.type, enabled=False):
            queries = layer.queries(x, batch)
            attended = attend(queries.q, queries.k, queries.v, batch.documents, layer.shape.scale)
            if not keep:
                del queries
            total, normed, rstd, output_downs = layer.after_attention(x, attended.output, batch.rows)
            y = torch.empty_like(total) if len(_tiles(batch, total)) > 1 else None
            inner = []
            for tile in _tiles(batch, total):
                piece, own = layer.mlp(normed[tile], _rows(batch, tile))
                if keep:
                    inner.append(own)
                del own
                if y is None:
                    y = piece.add_(total)
                else:
                    torch.add(piece, total[tile], out=y[tile])
        assert y is not None
        output: Tensor | None = attended.output
        if keep:
            ctx.kept = Kept(queries, total, rstd, normed, output_downs, inner)
        elif batch.host is not None:
            ctx.host = batch.host
            batch.host.put(x)
            batch.host.put(attended.output)
            output = None
        ctx.rest = attended.rest
        ctx.shape = hidden.shape
        ctx.x, ctx.output = (None, None) if ctx.host is not None else (x, output)
        return y.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        batch, layer, kept, gradients = ctx.batch, ctx.layer, ctx.kept, Gradients()
        output, x = (ctx.host.take(), ctx.host.take()) if ctx.host is not None else (ctx.output, ctx.x)
        attended = Attended(output, ctx.rest)
        dy = grad.reshape(-1, grad.shape[-1])
        ctx.x = ctx.output = ctx.kept = None
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            if kept is None:
                total, normed, rstd, output_downs = layer.after_attention(x, output, batch.rows)
            else:
                total, normed, rstd, output_downs = kept.total, kept.normed, kept.rstd, kept.output_downs
            tiles = _tiles(batch, dy)
            d_total = torch.empty_like(total) if len(tiles) > 1 else None
            for i, tile in enumerate(tiles):
                rows = _rows(batch, tile)
                if kept is None:
                    inner = Inner(*_split(layer.inner.forward(normed[tile], rows)))
                else:
                    inner, kept.inner[i] = kept.inner[i], None
                d_normed = layer.mlp_backward(dy[tile], normed[tile], inner, rows, gradients)
                del inner
                piece = ops.rms_norm_backward(d_normed, total[tile], layer.post_norm, rstd[tile], dy[tile])
                del d_normed
                if d_total is None:
                    d_total = piece
                else:
                    d_total[tile] = piece
            del total, normed, rstd, dy, grad
            assert d_total is not None
            d_output = layer.output.backward([d_total], output.flatten(1), output_downs, batch.rows, gradients)
            queries = layer.queries(x, batch) if kept is None else kept.queries
            d_normed = layer.attention_backward(d_output.view(output.shape), queries, attended, batch, gradients)
            dx = ops.rms_norm_backward(d_normed, x, layer.input_norm, queries.rstd, d_total)
        return dx.view(ctx.shape), None, None, None, *(gradients.of(p) for p in layer.parameters)


def _split(result: tuple[list[Tensor], list[Tensor]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    (e, g), downs = result
    return e, g, downs


def _tiles(batch: MicroBatch, rows: Tensor) -> Sequence[slice]:
    num_tokens = rows.shape[0]
    return [slice(i, min(i + batch.tile_tokens, num_tokens)) for i in range(0, num_tokens, batch.tile_tokens)]


def _rows(batch: MicroBatch, tile: slice) -> Tensor | None:
    return None if batch.rows is None else batch.rows[tile]
