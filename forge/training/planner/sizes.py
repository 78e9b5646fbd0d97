"""What a base and its adapter are made of, in elements and bytes: all that memory and time are computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge.training.config.workload import Workload

_NF4_BITS = 4.127  # with double-quantised constants: Dettmers et al. 2023, section 3


@dataclass(frozen=True)
class Sizes:
    """Of a decoder of Llama's kind. ``itemsize``: bytes of an activation; ``num_linear``: weights of all its layers."""

    num_layers: int
    hidden: int
    inner: int
    queries: int  # width of all query heads
    keys: int  # width of all key heads
    num_heads: int
    vocabulary: int
    itemsize: int
    num_linear: int
    num_down: int  # of those, weights of the MLPs' last products, which no recomputation repeats
    num_embedding: int
    num_adapter: int
    is_nf4: bool
    optimizer_bytes: float  # of state per parameter

    @classmethod
    def of(cls, workload: Workload, config: Mapping[str, Any]) -> Sizes:
        """From a config and the base's ``config.json``. Raises ``KeyError`` where that lacks a size."""
        hidden, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
        head = config.get("head_dim") or hidden // config["num_attention_heads"]
        # as many key-value heads as query heads where the configuration does not say: transformers' default
        keys = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head
        queries = config["num_attention_heads"] * head
        shapes = {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
        rank = workload.lora.rank
        return cls(
            num_layers=layers,
            hidden=hidden,
            inner=inner,
            queries=queries,
            keys=keys,
            num_heads=config["num_attention_heads"],
            vocabulary=config["vocab_size"],
            itemsize=4 if workload.model.dtype == "float32" else 2,
            num_linear=layers * sum(a * b for a, b in shapes.values()),
            num_down=layers * inner * hidden,
            num_embedding=(1 if config.get("tie_word_embeddings") else 2) * config["vocab_size"] * hidden,
            num_adapter=layers
            * sum(rank * (a + b) for name, (a, b) in shapes.items() if name in workload.lora.targets),
            is_nf4=workload.model.quantization == "nf4",
            optimizer_bytes=workload.optimizer.state_bytes_per_parameter,
        )

    @property
    def weights_bytes(self) -> int:
        """Of the frozen base: linear layers in 4 bits under NF4, embedding and head in 16 or 32."""
        bits = _NF4_BITS if self.is_nf4 else 8 * self.itemsize
        return int(self.num_linear * bits / 8 + self.num_embedding * self.itemsize)

    @property
    def floor_bytes(self) -> int:
        """What weights, adapter, its gradients and optimizer state take whatever the plan.

        Activations and the CUDA context are not in it.
        """
        return int(self.weights_bytes + self.num_adapter * (4 + 4 + self.optimizer_bytes))

    @property
    def kept_bytes(self) -> int:
        """Per token and layer whose activations are kept, beside :attr:`passed_bytes`.

        Two norms' outputs, queries, keys, values, the sum after attention and the MLP's inner products.
        """
        return int((3 * self.hidden + self.queries + 2 * self.keys + 2 * self.inner) * self.itemsize)

    @property
    def passed_bytes(self) -> int:
        """Per token and layer, whatever the layer recomputes: its input and its attention's output."""
        return (self.hidden + self.queries) * self.itemsize

    @property
    def dense_bytes(self) -> int:
        """Of the 4-bit weights held in 16 bits too."""
        return self.num_linear * self.itemsize if self.is_nf4 else 0
