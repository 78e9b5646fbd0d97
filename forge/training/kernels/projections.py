"""Linear layers that read the same input, each with or without a LoRA adapter: forwards and backwards by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from forge.training.kernels import ops
from forge.training.kernels.dropout import module_key


@dataclass(frozen=True)
class Adapter:
    """``a`` (rank, in) and ``b`` (out, rank), trained; ``scale`` is alpha / rank, or alpha / sqrt(rank) for rsLoRA."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    dropout: float
    key: int


@dataclass(frozen=True)
class Projection:
    """y = x W^T + bias + scale * (mask * x / (1 - p)) A^T B^T. ``weight`` (out, in), frozen; packed where it is NF4."""

    weight: Tensor
    quantization: Any
    bias: Tensor | None
    out_features: int
    adapter: Adapter | None

    @staticmethod
    def of(module: Any, name: str) -> Projection:
        """From a torch linear layer, a bitsandbytes one, or PEFT's wrapper of either."""
        base = getattr(module, "base_layer", module)
        weight, bias = base.weight, base.bias
        adapter = None
        if hasattr(module, "lora_A"):
            (active,) = module.active_adapters
            rate = getattr(module.lora_dropout[active], "p", 0.0)
            a, b = module.lora_A[active].weight, module.lora_B[active].weight
            adapter = Adapter(a, b, float(module.scaling[active]), float(rate), module_key(name))
        return Projection(weight, getattr(weight, "quant_state", None), bias, base.out_features, adapter)

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight (out, in) in ``dtype``; NF4 is dequantised, into ``out`` where it is given."""
        if self.quantization is None:
            weight = self.weight.detach().to(dtype)
            return weight if out is None else out.copy_(weight)
        weight = ops.dequantize_nf4(self.weight.detach(), self.quantization, out)
        return weight.to(dtype)


@dataclass
class Gradients:
    """Sums of the adapters' gradients over tiles, float32, by parameter."""

    sums: dict[torch.nn.Parameter, Tensor] = field(default_factory=dict)

    def add(self, parameter: torch.nn.Parameter, gradient: Tensor, scale: float) -> None:
        """Add ``scale`` times ``gradient``."""
        own = self.sums.get(parameter)
        if own is None:
            self.sums[parameter] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True).mul_(
                scale
            )
        else:
            own.add_(gradient, alpha=scale)

    def of(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """The sum in the parameter's dtype."""
        own = self.sums.pop(parameter, None)
        return None if own is None else own.to(parameter.dtype)


class Group:
    """Projections of one input. ``joined``: their base products are one, and their outputs views of one tensor."""

    def __init__(self, projections: Sequence[Projection], joined: bool = False) -> None:
        self.projections = list(projections)
        self.joined = joined and len(self.projections) > 1
        self.adapted = [(i, p.adapter) for i, p in enumerate(self.projections) if p.adapter is not None]
        self.widths = [p.out_features for p in self.projections]
        rates = {adapter.dropout for _, adapter in self.adapted}
        self.dropout = rates.pop() if rates else 0.0
        self._held: list[Tensor] | None = None
        self._bias: Tensor | None = None

    def hold_dense(self, dtype: torch.dtype) -> int:
        """Dequantise the weights once and for all: the same bits, no dequantisation in a step. Returns their bytes."""
        self._held = self._dense(dtype)
        return sum(weight.numel() * weight.element_size() for weight in self._held)

    def drop_dense(self) -> None:
        """Dequantise in every pass again."""
        self._held = None

    def parameters(self) -> list[torch.nn.Parameter]:
        """Every A and B."""
        return [parameter for _, adapter in self.adapted for parameter in (adapter.a, adapter.b)]

    def forward(self, x: Tensor, rows: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs (tokens, out_i) of x (tokens, in), and x A^T of each adapter, which the backward needs."""
        weights = self._weights(x.dtype)
        if self.joined:
            outputs = list(F.linear(x, weights[0], self._joined_bias(x)).split(self.widths, 1))
        else:
            outputs = [F.linear(x, w, _as(p.bias, x)) for w, p in zip(weights, self.projections, strict=True)]
        del weights
        downs = self.down(x, rows)
        for (i, adapter), down in zip(self.adapted, downs, strict=True):
            outputs[i].addmm_(down, adapter.b.detach().to(x.dtype).t(), alpha=adapter.scale)
        return outputs, downs

    def down(self, x: Tensor, rows: Tensor | None) -> list[Tensor]:
        """(mask * x / (1 - p)) A^T of each adapter, (tokens, rank)."""
        if not self.adapted:
            return []
        return ops.lora_down(x, self._a(x.dtype), self._keys(), *self._mask(rows))

    def backward(
        self, grads: Sequence[Tensor], x: Tensor, downs: Sequence[Tensor], rows: Tensor | None, gradients: Gradients
    ) -> Tensor:
        """The gradient of x; those of the adapters are added to ``gradients``. ``grads``: of each output."""
        inner = self.through_b(grads)
        dx = self.input_gradient(grads, inner, rows)
        self.adapter_gradients(grads, inner, x, downs, rows, gradients)
        return dx

    def through_b(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """scale * grad_i B_i of each adapter, (tokens, rank)."""
        pairs = [(grads[i], adapter) for i, adapter in self.adapted]
        return [(grad @ adapter.b.detach().to(grad.dtype)).mul_(adapter.scale) for grad, adapter in pairs]

    def input_gradient(self, grads: Sequence[Tensor], inner: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        """The gradient of x, (tokens, in): sum of grad_i W_i and of mask_i * (inner_i A_i) / (1 - p)."""
        weights = self._weights(grads[0].dtype)
        if self.joined:
            dx = torch.cat(list(grads), 1) @ weights[0]
        else:
            dx = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                dx.addmm_(grad, weight)
        if self.adapted:
            ops.lora_add_grad_x_(dx, inner, self._a(dx.dtype), self._keys(), *self._mask(rows))
        return dx

    def adapter_gradients(
        self,
        grads: Sequence[Tensor],
        inner: Sequence[Tensor],
        x: Tensor,
        downs: Sequence[Tensor],
        rows: Tensor | None,
        gradients: Gradients,
    ) -> None:
        """Add those of every A and B to ``gradients``. ``inner``: of :meth:`through_b`."""
        if not self.adapted:
            return
        for (i, adapter), down in zip(self.adapted, downs, strict=True):
            gradients.add(adapter.b, grads[i].t() @ down, adapter.scale)
        of_a = ops.lora_grad_a(x, inner, self._keys(), *self._mask(rows))
        for (_, adapter), gradient in zip(self.adapted, of_a, strict=True):
            gradients.add(adapter.a, gradient, 1.0)

    def _weights(self, dtype: torch.dtype) -> list[Tensor]:
        return self._held if self._held is not None else self._dense(dtype)

    def _dense(self, dtype: torch.dtype) -> list[Tensor]:
        if not self.joined:
            return [projection.dense(dtype) for projection in self.projections]
        first = self.projections[0]
        width = first.weight.shape[1] if first.quantization is None else first.quantization.shape[1]
        whole = torch.empty((sum(self.widths), width), dtype=dtype, device=first.weight.device)
        for projection, part in zip(self.projections, whole.split(self.widths), strict=True):
            projection.dense(dtype, part)
        return [whole]

    def _joined_bias(self, x: Tensor) -> Tensor | None:
        if self._bias is None and any(p.bias is not None for p in self.projections):
            parts = [p.bias if p.bias is not None else x.new_zeros(p.out_features) for p in self.projections]
            self._bias = torch.cat([part.detach().to(x.dtype) for part in parts])
        return self._bias

    def _a(self, dtype: torch.dtype) -> list[Tensor]:
        return [adapter.a.detach().to(dtype) for _, adapter in self.adapted]

    def _keys(self) -> list[int]:
        return [adapter.key for _, adapter in self.adapted]

    def _mask(self, rows: Tensor | None) -> tuple[Tensor | None, float]:
        return (None, 0.0) if rows is None or self.dropout == 0 else (rows, self.dropout)


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.detach().to(x.dtype)
