"""What runs are compared on: that they did the same work, its metrics, and the model FLOPs it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from forge.training.system.errors import CheckError
from harness.measurement.results import Outcome

Metric = Literal[
    "measured_seconds",
    "seconds_per_document",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "device_used_bytes",
    "last_train_loss",
]

_SAME_IN_RECORD = (
    *("workload_sha256", "seed", "num_steps"),
    *("inputs.base_sha256", "inputs.tokenizer_sha256", "inputs.train_examples_sha256"),
    *("trainable.names_sha256", "trainable.num_parameters"),
)


class WorkMismatch(CheckError):
    """Two runs did not do the same work, so no ratio of theirs means anything. Exit code 8."""


def check_same_work(outcome_a: Outcome, outcome_b: Outcome) -> None:
    """Raise :class:`WorkMismatch` naming every value that differs, of both sides, unless both did the same work.

    The same: workload, seed, number of steps, base weights, tokenizer, examples, names, shapes and number of
    trainable parameters, and at every step the labels as they reached the model, the documents, their tokens
    without padding and the trained ones. A value that a side lacks is a difference too, and so is one that both lack.
    """
    differing = []
    for name in _SAME_IN_RECORD:
        a, b = _value(outcome_a.record, name), _value(outcome_b.record, name)
        if a != b or a is None:
            differing.append(f"  {name}: {a} | {b}")
    a_steps, b_steps = _per_step(outcome_a), _per_step(outcome_b)
    for name in a_steps:
        differing += _differing_steps(name, a_steps[name], b_steps[name])
    if differing:
        sides = [f"{outcome.spec.label()} [{outcome.run_id}]" for outcome in (outcome_a, outcome_b)]
        raise WorkMismatch(
            f"not the same work: {sides[0]} | {sides[1]}\n" + "\n".join(differing),
            remedy="give both arms one workload, data set and base; what was measured of them cannot be compared",
        )


def _per_step(outcome: Outcome) -> dict[str, list[Any]]:
    steps = {"batch_digests": list(_value(outcome.record, "batch_digests") or [])}
    for name in ("documents", "tokens", "trained_tokens"):
        steps[name] = [line.get(name) for line in training_steps(outcome)]
    return steps


def _differing_steps(name: str, a: list[Any], b: list[Any]) -> list[str]:
    if not a or len(a) != len(b):
        return [f"  {name}: {len(a)} steps | {len(b)} steps"]
    steps = [i for i, (left, right) in enumerate(zip(a, b, strict=True)) if left != right or left is None]
    further = f" (and {len(steps) - 1} further steps)" if len(steps) > 1 else ""
    return [f"  {name}, step {i + 1}: {a[i]} | {b[i]}{further}" for i in steps[:1]]


def _value(record: dict[str, Any] | None, name: str) -> Any:
    node: Any = record
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def training_steps(outcome: Outcome) -> list[dict[str, Any]]:
    """The step log's lines of optimizer steps, in order; its other lines are evaluations."""
    return [line for line in outcome.steps if "seconds" in line]


def measure(outcome: Outcome, metric: str, *, num_warmup_steps: int) -> float:
    """One figure of one run, a :data:`Metric`; lower is better in all. Raises :class:`CheckError` where it is missing.

    ``measured_seconds``: the sum over all steps after the first ``num_warmup_steps``, so that one long
    document counts as long as it takes. ``peak_*``: of the whole process, loading included.
    ``device_used_bytes``: what NVML saw at the peak less what was in use before. ``last_train_loss`` in nats.
    """
    value: float | None = None
    if metric in ("measured_seconds", "seconds_per_document"):
        if steps := training_steps(outcome)[num_warmup_steps:]:
            value = sum(line["seconds"] for line in steps)
            value /= 1 if metric == "measured_seconds" else sum(line["documents"] for line in steps)
    elif metric in ("peak_allocated_bytes", "peak_reserved_bytes"):
        value = max((phase[metric] for phase in _value(outcome.record, "memory") or []), default=None)
    elif metric == "device_used_bytes":
        before, peak = outcome.monitor.device_used_before_bytes, outcome.monitor.device_used_peak_bytes
        value = None if before is None or peak is None else peak - before
    elif metric == "last_train_loss":
        value = _value(outcome.record, "losses.last_train_loss")
    else:
        raise ValueError(f"no metric {metric!r}")
    if value is None:
        raise CheckError(
            f"{metric} was not measured in run {outcome.run_id} ({outcome.spec.label()}, {outcome.status})",
            remedy="more steps than warm-up steps, and for memory a GPU, are needed",
        )
    return float(value)


def model_flops(shape: Mapping[str, Any], num_adapter_parameters: int, tokens: int, tokens_squared: int) -> float:
    """FLOPs of training on ``tokens``. ``tokens_squared``: the sum over documents of their tokens squared.

    As PaLM counts them (Chowdhery et al. 2022, appendix B), for a frozen base. Per token a matrix of n weights costs
    2 n forwards and 2 n backwards, towards the inputs only, and the adapter's own matrices 6 n. Causal attention costs
    2 T^2 (heads x head size) per layer forwards and twice that backwards. Recomputation is not counted: it is the
    backend's choice, not the model's need.

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
    measured, num_adapter = steps[num_warmup_steps:], record["trainable"]["num_parameters"]
    flops = sum(
        model_flops(record["model_shape"], num_adapter, line["tokens"], line["tokens_squared"]) for line in measured
    )
    return flops / sum(float(line["seconds"]) for line in measured)
