"""Forge's layers in place of a model's own: for which models, and the check that both compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from forge.training.kernels.attention import Documents, attend, attend_backward
from forge.training.kernels.dropout import step_keys
from forge.training.kernels.host_memory import HostMemory
from forge.training.kernels.layer import Layer, LayerFunction, MicroBatch, Shape
from forge.training.kernels.projections import Group, Projection
from forge.training.system.errors import MachineError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Relative norm of the difference of all gradients together, and as a multiple of it that of one matrix. Two bfloat16
# stacks differ by 7% on 28 layers of random 7B weights, the queries' matrices by 10%; a forgotten factor by more.
CHECK_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.04, torch.bfloat16: 0.15}
CHECK_TOLERANCE_ONE = 2


def why_not(model: Any) -> str | None:
    """Why these layers cannot stand in for the model's own; None where they can."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        return f"the architecture {config.model_type} is none of {', '.join(MODEL_TYPES)}"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its MLP has {config.hidden_act} in place of silu"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "some of its layers have a sliding window"
    if config.model_type == "mistral" and getattr(config, "sliding_window", None):
        return "its layers have a sliding window"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention has dropout"
    for layer in decoder_layers(model):
        for name in (*ATTENTION, *MLP):
            module = getattr(layer.self_attn if name in ATTENTION else layer.mlp, name)
            reason = _why_not_linear(module)
            if reason is not None:
                return f"{name}: {reason}"
    return None


def _why_not_linear(module: Any) -> str | None:
    base = getattr(module, "base_layer", module)
    state = getattr(base.weight, "quant_state", None)
    if state is not None and state.quant_type != "nf4":
        return f"its weight is quantised as {state.quant_type}"
    if not base.weight.is_floating_point() and state is None:
        return f"its weight is {base.weight.dtype}"
    if hasattr(module, "lora_A"):
        if len(module.active_adapters) != 1:
            return "it has several adapters"
        (active,) = module.active_adapters
        if module.lora_variant.get(active) is not None:
            return "its adapter is a variant of LoRA"
        if module.lora_B[active].bias is not None:
            return "its adapter has a bias"
    return None


def decoder_layers(model: Any) -> list[Any]:
    """The model's decoder layers, in order."""
    (layers,) = [m for name, m in model.named_modules() if name == "layers" or name.endswith("model.layers")]
    return list(layers)


class ForgeLayers:
    """A model's decoder layers by Forge. Between :meth:`begin` and :meth:`end` they take the model's place.

    ``keep_gib``: None keeps the activations of all layers; else as many layers keep theirs as fit.
    """

    def __init__(
        self,
        model: Any,
        *,
        tile_tokens: int | None,
        keep_gib: float | None,
        offload: bool,
        dequantize_once: bool,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._dtype = model, dtype
        modules = decoder_layers(model)
        self.device = next(model.parameters()).device
        self.layers = [make_layer(model.config, module, i) for i, module in enumerate(modules)]
        self._batch: MicroBatch | None = None
        self._positions: Tensor | None = None
        self._num_bytes_kept = kept_bytes_per_token(model.config, dtype.itemsize)
        self.configure(tile_tokens=tile_tokens, keep_gib=keep_gib, offload=offload, dequantize_once=dequantize_once)
        for i, module in enumerate(modules):
            module.forward = self._stand_in(module.forward, i)

    def configure(
        self, *, tile_tokens: int | None, keep_gib: float | None, offload: bool, dequantize_once: bool
    ) -> None:
        """Lay the passes that follow out otherwise: the same mathematics."""
        self._tile_tokens, self._keep_gib = tile_tokens, keep_gib
        self._host = HostMemory(self.device) if offload else None
        for group in (group for layer in self.layers for group in layer.groups):
            group.hold_dense(self._dtype) if dequantize_once else group.drop_dense()

    def begin(self, lengths: Sequence[int], keys: Tensor | None, seed: int, step: int, cudnn: bool = False) -> None:
        """The next forward pass is of documents of these lengths, end to end (or rows of that width, padded).

        ``keys``: token keys of the dropout (dropout.py), int32 (tokens,); None: without dropout.
        """
        if self._host is not None:
            self._host.clear()
        num_tokens = sum(lengths)
        rows = None if keys is None else step_keys(keys.to(self.device, non_blocking=True), seed, step)
        positions = torch.cat([torch.arange(length) for length in lengths])
        self._positions = positions.to(self.device, non_blocking=True)
        self._batch = MicroBatch(
            Documents.of(lengths, self.device, cudnn),
            rows,
            self.num_kept(num_tokens),
            self._tile_tokens or num_tokens,
            self._host,
        )

    def plan_attention(self, lengths: Sequence[int], dtype: torch.dtype) -> None:
        """Have cuDNN plan its kernels for documents of these lengths: in a step each costs some tenths of a second."""
        shape = self.layers[0].shape
        for length in lengths:
            documents = Documents.of([length], self.device, cudnn=True)
            q = torch.zeros(length, shape.num_heads, shape.head_dim, dtype=dtype, device=self.device)
            k, v = (q.new_zeros(length, shape.num_key_heads, shape.head_dim) for _ in range(2))
            attend_backward(q, q, k, v, attend(q, k, v, documents, shape.scale), documents, shape.scale)

    def num_kept(self, num_tokens: int) -> int:
        """Of how many layers a micro-batch of so many tokens keeps all activations."""
        if self._keep_gib is None:
            return len(self.layers)
        return min(len(self.layers), int(self._keep_gib * 2**30 / (self._num_bytes_kept * num_tokens)))

    def end(self) -> None:
        """The model's own layers again: evaluation, sample answers."""
        self._batch = None

    def _stand_in(self, own: Callable[..., Any], index: int) -> Callable[..., Any]:
        returns_tuple = "unsloth" in getattr(own, "__module__", "") or "unsloth" in type(self._model).forward.__module__

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            batch = self._batch
            if batch is None or not torch.is_grad_enabled():
                return own(hidden_states, *args, **kwargs)
            if index == 0:
                batch.cos, batch.sin = self._tables(hidden_states, kwargs["position_embeddings"])
            layer, keep = self.layers[index], index >= len(self.layers) - batch.num_kept
            output = LayerFunction.apply(hidden_states, batch, layer, keep, *layer.parameters)
            return (output,) if returns_tuple else output

        return forward

    def _tables(self, hidden: Tensor, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin of every token, from a table by position (Unsloth) or by token (transformers)."""
        num_tokens = hidden.shape[0] * hidden.shape[1]
        if embeddings[0].dim() == 2:
            assert self._positions is not None
            cos, sin = (table.to(self.device)[self._positions] for table in embeddings)
        else:
            shape = (hidden.shape[0], *embeddings[0].shape[1:])
            cos, sin = (table.expand(shape).reshape(num_tokens, -1) for table in embeddings)
        return cos, sin


def make_layer(config: Any, module: Any, index: int) -> Layer:
    """One layer's weights, by their names in transformers."""
    attention, mlp = module.self_attn, module.mlp

    def group(owner: Any, names: Sequence[str], joined: bool = False) -> Group:
        kind = "self_attn" if owner is attention else "mlp"
        named = [(getattr(owner, name), f"model.layers.{index}.{kind}.{name}") for name in names]
        return Group([Projection.of(linear, name) for linear, name in named], joined)

    head_dim = attention.head_dim
    heads = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
    shape = Shape(config.num_attention_heads, config.num_key_value_heads, head_dim, config.rms_norm_eps, head_dim**-0.5)
    return Layer(
        shape,
        module.input_layernorm.weight.detach(),
        module.post_attention_layernorm.weight.detach(),
        None if heads is None else (heads[0].detach(), heads[1].detach()),
        group(attention, ATTENTION[:3], joined=True),
        group(attention, ATTENTION[3:]),
        group(mlp, MLP[:2]),
        group(mlp, MLP[2:]),
    )


def kept_bytes_per_token(config: Any, itemsize: int) -> int:
    """Of a layer whose activations are kept, beside its input and its attention's output, which every layer keeps.

    Two norms' outputs, queries, keys, values, the sum after attention and the MLP's inner products.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return int((3 * config.hidden_size + heads * head_dim + 2 * config.intermediate_size) * itemsize)


@contextmanager
def _no_dropout(model: Any) -> Iterator[None]:
    modules = [m for name, m in model.named_modules() if ".lora_dropout." in name and hasattr(m, "p")]
    before = [module.p for module in modules]
    for module in modules:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in zip(modules, before, strict=True):
            module.p = p


def compare_with_own(model: Any, layers: ForgeLayers, take_step: Callable[[], Any], length: int) -> float:
    """The relative difference of all gradients between Forge's layers and the model's own, on a few tokens.

    ``take_step`` takes one document of ``length`` tokens forwards and backwards. B is filled meanwhile: with the zeros
    that a run begins with, A would have no gradient. Raises :class:`MachineError` where the difference is more than
    rounding.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    before = [p.detach().clone() for _, p in trained]
    generator = torch.Generator().manual_seed(1)
    try:
        with torch.no_grad():
            for name, p in trained:
                if ".lora_B." in name:
                    p.copy_(torch.empty(p.shape).uniform_(-0.02, 0.02, generator=generator))
        gradients = []
        with _no_dropout(model):
            for by_forge in (False, True):
                model.zero_grad(set_to_none=True)
                if by_forge:
                    layers.begin([length], None, 0, 0)
                take_step()
                layers.end()
                gradients.append([p.grad for _, p in trained])
                model.zero_grad(set_to_none=True)
    finally:
        with torch.no_grad():
            for (_, p), value in zip(trained, before, strict=True):
                p.copy_(value)
    missing = [name for (name, _), *pair in zip(trained, *gradients, strict=True) if None in pair]
    if missing:
        raise MachineError(f"kernels=forge: {missing[0]} has no gradient", remedy="train with --plan kernels=stack")
    own = torch.stack([gradient.float().norm() for gradient in gradients[0]])
    apart = torch.stack([(b.float() - a.float()).norm() for a, b in zip(*gradients, strict=True)])
    each = apart / own.clamp(min=1e-12)
    total = float(apart.norm() / own.norm())
    index = int(each.nan_to_num(nan=float("inf")).argmax())
    limit = CHECK_TOLERANCE[next(p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)]
    if not (total <= limit and float(each[index]) <= CHECK_TOLERANCE_ONE * limit):
        raise MachineError(
            f"kernels=forge does not compute what the stack computes: gradients differ by {total:.1%}, that of "
            f"{trained[index][0]} by {float(each[index]):.1%}, on {length} tokens "
            f"(limits {limit:.1%} and {CHECK_TOLERANCE_ONE * limit:.1%})",
            remedy="train with --plan kernels=stack, and report the model's config",
        )
    return total
