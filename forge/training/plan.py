"""Plan: how a backend lays a workload out on this machine. Never changes a step's mathematics.

A plan decides how the examples of one optimizer step are put into micro-batches, what is kept
for the backward pass and how padding is avoided. Which examples a step holds, and the weight of
every token in its loss, are the workload's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forge.training.errors import ConfigurationError
from forge.training.workload import WORKLOADS, Workload
from forge.training.yaml_strict import load_yaml, parse_scalar

Backend = Literal["legacy", "trl", "unsloth"]
BACKEND_NAMES: tuple[Backend, ...] = ("legacy", "trl", "unsloth")


class Plan(BaseModel):
    """``padding="none"`` flattens a micro-batch into one row with masked borders (padding-free).

    ``attention="flash"`` leaves cuDNN's kernels out, which PyTorch prefers on Hopper: cuDNN plans
    every new length anew, on an H200 about 0.15 s a document, more than the document's training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    micro_batch: Annotated[int, Field(gt=0)] = 1  # examples
    gradient_checkpointing: Literal["none", "full", "offload"] = "full"  # offload: to pinned host memory
    padding: Literal["longest", "none"] = "longest"
    attention: Literal["default", "flash"] = "default"
    group_by_length: bool = False  # within an optimizer step only

    def accumulation(self, workload: Workload) -> int:
        """Micro-batches an optimizer step."""
        return workload.training.effective_batch // self.micro_batch


_DEFAULTS: dict[str, dict[str, Any]] = {
    # its owner's layout, fixed: the bar is set against it
    "legacy": {"micro_batch": 1, "gradient_checkpointing": "full", "padding": "longest"},
    "trl": {"gradient_checkpointing": "full", "padding": "longest", "group_by_length": True},
    "unsloth": {"gradient_checkpointing": "offload", "padding": "none", "attention": "flash", "group_by_length": True},
}


def load_plan(workload: Workload, backend: Backend, overrides: list[str] | tuple[str, ...] = ()) -> Plan:
    """The plan of ``workloads/NAME.plans.yaml`` for this backend, else a default that fits anywhere.

    ``overrides`` are ``key=value``. Raises :class:`ConfigurationError`.
    """
    content = dict(_DEFAULTS[backend])
    path = WORKLOADS / f"{workload.name}.plans.yaml"
    if path.is_file():
        plans = load_yaml(path)
        content.update(plans.get(backend) or {})
    for override in overrides:
        key, _, value = override.partition("=")
        content[key.strip()] = parse_scalar(value)
    try:
        plan = Plan.model_validate(content)
    except ValidationError as invalid:
        lines = [f"  - plan.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in invalid.errors()]
        known = ", ".join(Plan.model_fields)
        raise ConfigurationError("the plan is wrong\n" + "\n".join(lines), remedy=f"its keys are {known}") from None
    effective = workload.training.effective_batch
    if effective % plan.micro_batch:
        raise ConfigurationError(
            f"plan.micro_batch={plan.micro_batch} does not divide training.effective_batch={effective}",
            remedy=f"take one of {[n for n in range(1, effective + 1) if effective % n == 0]}",
        )
    return plan


def num_steps(workload: Workload, num_examples: int) -> int:
    """Optimizer steps of a whole run. The last may hold fewer than ``effective_batch`` examples."""
    training = workload.training
    if training.max_steps is not None:
        return training.max_steps
    total = int(np.ceil(num_examples * training.epochs))
    return max(1, int(np.ceil(total / training.effective_batch)))


def step_order(workload: Workload, num_examples: int) -> list[np.ndarray]:
    """Which examples each optimizer step trains on: int64 arrays of shape (effective_batch,).

    Epochs are shuffles of all examples, joined into one stream and cut into steps, so a step may
    straddle two epochs and none is short but the last. The same for every backend and plan.
    """
    training = workload.training
    steps, size = num_steps(workload, num_examples), training.effective_batch
    total = steps * size
    if training.max_steps is None:
        total = min(total, int(np.ceil(num_examples * training.epochs)))
    generator = np.random.Generator(np.random.PCG64(training.seed))
    stream = np.concatenate([generator.permutation(num_examples) for _ in range(-(-total // num_examples))])
    return [stream[i : min(i + size, total)] for i in range(0, total, size)]


def micro_batches(step: np.ndarray, lengths: np.ndarray, plan: Plan) -> list[list[int]]:
    """Lay one step's examples out: lists of at most ``micro_batch`` example indices.

    ``lengths``: tokens of every example, int64 of shape (examples,). With ``group_by_length`` the
    longest come first (memory is claimed once, and padding is least).
    """
    indices = [int(i) for i in step]
    if plan.group_by_length:
        indices.sort(key=lambda i: (-int(lengths[i]), i))
    return [indices[i : i + plan.micro_batch] for i in range(0, len(indices), plan.micro_batch)]


def memory_floor_bytes(workload: Workload, config: dict[str, Any]) -> int:
    """Bytes that weights, adapter, its gradients and optimizer state need whatever the plan.

    ``config``: the base's ``config.json``. Counts the linear layers at 4 bits plus double-quantised
    constants (4.127 bits a weight: Dettmers et al. 2023, section 3) under nf4, embedding and head
    at 16 bits; activations and the CUDA context are not in it.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    intermediate, vocabulary = config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }
    element = 4 if workload.model.dtype == "float32" else 2
    bits = 4.127 if workload.model.quantization == "nf4" else 8 * element
    linear = layers * sum(a * b for a, b in shapes.values()) * bits / 8
    tied = 1 if config.get("tie_word_embeddings") else 2
    embeddings = tied * vocabulary * hidden * element
    rank = workload.lora.rank
    adapter = layers * sum(rank * (a + b) for name, (a, b) in shapes.items() if name in workload.lora.targets)
    state = 2 if "8bit" in workload.optimizer.name else 8
    return int(linear + embeddings + adapter * (4 + 4 + state))
