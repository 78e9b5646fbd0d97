"""Faults that the first-step probe can plant in Forge's layers (forge/training/kernels), each for a while.

They change what stands around an operation and not the operation, so they are the same on a CPU and on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch


@contextmanager
def planted(fault: str, layers: Any) -> Iterator[None]:
    """Plant one of :data:`FAULTS`. ``layers``: the trainer's :class:`forge.training.kernels.install.ForgeLayers`."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, then: Callable[..., Any]) -> None:
            """Call ``then(original, *arguments)`` in place of ``owner.name``."""
            original = getattr(owner, name)

            def changed(*arguments: Any, **named: Any) -> Any:
                return then(original, *arguments, **named)

            is_static = isinstance(owner, type) and isinstance(owner.__dict__.get(name), staticmethod)
            stack.enter_context(patch.object(owner, name, staticmethod(changed) if is_static else changed))

        FAULTS[fault](put, layers)
        yield


Put = Callable[[Any, str, Callable[..., Any]], None]


def _mask_of_the_step_before(put: Put, layers: Any) -> None:
    first: list[int] = []

    def begin(real: Any, lengths: Any, keys: Any, seed: int, step: int, *more: Any) -> None:
        first.append(step)
        real(lengths, keys, seed, first[0], *more)

    put(layers, "begin", begin)


def _mask_of_another_module(put: Put, layers: Any) -> None:
    for layer in layers.layers:
        first = next(key for group in layer.groups for key in group._keys())
        for group in layer.groups:
            put(group, "_keys", lambda real, first=first: [first] * len(real()))


def _scale_forgotten(put: Put, layers: Any) -> None:
    for group in _groups(layers):
        group.adapted = [(index, replace(adapter, scale=1.0)) for index, adapter in group.adapted]


def _keep_rate_forgotten(put: Put, _: Any) -> None:
    from forge.training.kernels import ops

    def times_keep_rate(real: Any, *arguments: Any) -> Any:
        return [result * (1 - arguments[-1]) for result in real(*arguments)]

    def added(real: Any, dx: Any, *arguments: Any) -> Any:
        return dx.add_((real(dx.clone(), *arguments) - dx) * (1 - arguments[-1]))

    put(ops, "lora_down", times_keep_rate)
    put(ops, "lora_grad_a", times_keep_rate)
    put(ops, "lora_add_grad_x_", added)


def _bias_dropped(put: Put, layers: Any) -> None:
    for layer in layers.layers:
        put(layer.attention, "_joined_bias", lambda real, x: None)


def _tile_border_off_by_one(put: Put, _: Any) -> None:
    from forge.training.kernels import layer

    def tiles(real: Any, *arguments: Any) -> Any:
        return [slice(max(0, tile.start - 1), tile.stop) for tile in real(*arguments)]

    put(layer, "_tiles", tiles)


def _documents_exchanged(put: Put, _: Any) -> None:
    from forge.training.kernels import dropout

    def keys(real: Any, documents: Any) -> Any:
        if len(documents) > 1:
            (a, length), (b, other_length), *others = documents
            documents = [(b, length), (a, other_length), *others]
        return real(documents)

    put(dropout, "_keys", keys)


def _recomputed_with_another_mask(put: Put, _: Any) -> None:
    from forge.training.kernels.layer import LayerFunction

    def backward(real: Any, ctx: Any, grad: Any) -> Any:
        if ctx.kept is None and ctx.batch.rows is not None:
            ctx.batch = replace(ctx.batch, rows=ctx.batch.rows + 1)
        return real(ctx, grad)

    put(LayerFunction, "backward", backward)


def _log_sum_exp_of_a_neighbour(put: Put, _: Any) -> None:
    from forge.training.kernels import layer

    def backward(real: Any, grad: Any, q: Any, k: Any, v: Any, kept: Any, documents: Any, scale: float) -> Any:
        rest = kept.rest
        if isinstance(rest[0], tuple):  # one document at a time: (..., tokens), of that document
            shifted = [(_as_long(rest[i - 1][0], own[0].shape[-1]), *own[1:]) for i, own in enumerate(rest)]
        else:  # all at once: (heads, tokens)
            shifted = [rest[0].roll(documents.lengths[0], -1), *rest[1:]]
        return real(grad, q, k, v, replace(kept, rest=tuple(shifted)), documents, scale)

    put(layer, "attend_backward", backward)


def _activations_of_another_layer(put: Put, _: Any) -> None:
    from forge.training.kernels.layer import LayerFunction

    before: list[Any] = []

    def forward(real: Any, ctx: Any, hidden: Any, batch: Any, layer: Any, keep: bool, *adapters: Any) -> Any:
        result = real(ctx, hidden, batch, layer, keep, *adapters)
        if before and before[0].batch is batch:
            for name in ("x", "output", "kept"):
                own, other = getattr(ctx, name), getattr(before[0], name)
                setattr(ctx, name, other)
                setattr(before[0], name, own)
        before[:] = [] if before and before[0].batch is batch else [ctx]
        return result

    put(LayerFunction, "forward", forward)


def _host_memory_in_the_wrong_order(put: Put, _: Any) -> None:
    from forge.training.kernels.host_memory import HostMemory

    def put_before_the_layer_before(real: Any, host: Any, tensor: Any) -> None:
        real(host, tensor)
        if len(host._stack) % 4 == 0:  # two tensors a layer
            host._stack[-4:] = [*host._stack[-2:], *host._stack[-4:-2]]

    put(HostMemory, "put", put_before_the_layer_before)


def _as_long(tensor: Any, length: int) -> Any:
    """Its last dimension repeated or cut to ``length``."""
    times = -(-length // tensor.shape[-1])
    return tensor.repeat(*[1] * (tensor.dim() - 1), times)[..., :length].contiguous()


def _groups(layers: Any) -> list[Any]:
    return [group for layer in layers.layers for group in layer.groups]


FAULTS: dict[str, Callable[[Put, Any], None]] = {
    "mask-of-the-step-before": _mask_of_the_step_before,
    "mask-of-another-module": _mask_of_another_module,
    "scale-forgotten": _scale_forgotten,
    "keep-rate-forgotten": _keep_rate_forgotten,
    "bias-dropped": _bias_dropped,
    "tile-border-off-by-one": _tile_border_off_by_one,
    "documents-exchanged": _documents_exchanged,
    "recomputed-with-another-mask": _recomputed_with_another_mask,
    "log-sum-exp-of-a-neighbour": _log_sum_exp_of_a_neighbour,
    "activations-of-another-layer": _activations_of_another_layer,
    "host-memory-in-the-wrong-order": _host_memory_in_the_wrong_order,
}
