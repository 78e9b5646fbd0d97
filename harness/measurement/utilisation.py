"""Floating-point operations that a model's training needs, and what share of a ceiling a run reaches.

Model FLOPs as PaLM counts them (Chowdhery et al. 2022, appendix B), for a frozen base: a matrix of n
weights costs 2 n a token forwards and 2 n backwards, towards the inputs only; the adapter's own
matrices 6 n. Causal attention costs 2 T^2 (heads x head size) a layer forwards and twice that
backwards. Recomputation is not counted: it is the stack's choice, not the model's need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def model_flops(shape: Mapping[str, Any], num_adapter_parameters: int, tokens: int, tokens_squared: int) -> float:
    """FLOPs of training on ``tokens``. ``tokens_squared``: the sum over documents of their tokens squared.

    ``shape``: ``RunRecord.model_shape``. Raises ``KeyError`` for a size that it lacks.
    """
    hidden, layers, vocabulary = shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"]
    head = shape.get("head_dim") or hidden // shape["num_attention_heads"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * shape["intermediate_size"]
    matrices = layers * layer + hidden * vocabulary  # the embedding is a lookup
    attention = 3 * 2 * layers * queries * tokens_squared
    return float((4 * matrices + 6 * num_adapter_parameters) * tokens + attention)


def model_flops_per_second(
    record: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], num_warmup_steps: int
) -> float:
    """Model FLOPs over the summed time of a run's measured steps."""
    measured = list(steps)[num_warmup_steps:]
    flops = sum(
        model_flops(
            record["model_shape"], record["trainable"]["num_parameters"], line["tokens"], line["tokens_squared"]
        )
        for line in measured
    )
    return flops / sum(float(line["seconds"]) for line in measured)
