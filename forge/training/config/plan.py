"""Plan: how a backend lays a workload out on this machine. Never changes a step's mathematics.

A plan decides how the examples of one optimizer step are put into micro-batches, what is kept
for the backward pass and how padding is avoided. Which examples a step holds, and the weight of
every token in its loss, are the workload's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forge.training.config.overrides import apply_overrides, listed, shown, unusable_text, validation_errors
from forge.training.config.workload import WORKLOADS, Workload
from forge.training.config.yaml import load_yaml
from forge.training.system.errors import ConfigurationError

Backend = Literal["legacy", "trl", "unsloth"]
LONG_DOCUMENT_TOKENS = 8192
BACKEND_NAMES: tuple[Backend, ...] = ("legacy", "trl", "unsloth")


class Plan(BaseModel):
    """``padding="none"`` flattens a micro-batch into one row with masked borders (padding-free).

    ``attention="flash"`` leaves cuDNN's kernels out, which PyTorch prefers on Hopper: cuDNN plans
    every new length anew, on an H200 about 0.15 s a document, more than a short document's training.
    At 32,768 tokens it is 1.0 s a step faster, so ``"mixed"`` leaves it out only where the longest
    document of the micro-batch is under ``LONG_DOCUMENT_TOKENS``.

    ``grouping`` lays the examples of one optimizer step out in micro-batches: in the order given, by
    length (least padding), or so that every micro-batch holds about the same number of tokens.

    ``mlp_tile_tokens`` takes a longer micro-batch through each MLP in tiles of that many tokens, and
    ``loss_chunk_gib`` bounds what the loss head holds of its logits at a time: both trade a little
    recomputation for memory that does not grow with the longest document.

    ``rehearsal`` takes the run's largest micro-batch forwards and backwards once before the first
    step and forgets it: a document that does not fit is known at once, and pinned buffers, kernels
    and the allocator's pool are there before the first step is timed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    micro_batch: Annotated[int, Field(gt=0)] = 1  # examples
    gradient_checkpointing: Literal["none", "full", "offload"] = "full"  # offload: to pinned host memory
    padding: Literal["longest", "none"] = "longest"
    attention: Literal["default", "flash", "mixed"] = "default"
    rehearsal: bool = True
    grouping: Literal["none", "length", "tokens"] = "none"  # within an optimizer step only
    mlp_tile_tokens: Annotated[int, Field(gt=0)] | None = None  # None: whole; unsloth only
    loss_chunk_gib: Annotated[float, Field(gt=0)] | None = None  # None: the backend's choice; unsloth only

    def accumulation(self, workload: Workload) -> int:
        """Micro-batches an optimizer step."""
        return workload.training.effective_batch // self.micro_batch


_DEFAULTS: dict[str, dict[str, Any]] = {
    # its owner's layout, fixed: the bar is set against it
    "legacy": {"micro_batch": 1, "gradient_checkpointing": "full", "padding": "longest"},
    "trl": {"gradient_checkpointing": "full", "padding": "longest", "grouping": "length"},
    "unsloth": {
        "gradient_checkpointing": "offload",
        "padding": "none",
        "attention": "mixed",
        "grouping": "tokens",
        "mlp_tile_tokens": 8192,
        "loss_chunk_gib": 1.0,
    },
}


def load_plan(workload: Workload, backend: Backend, overrides: list[str] | tuple[str, ...] = ()) -> Plan:
    """The plan of ``workloads/NAME.plans.yaml`` for this backend, else a default that fits anywhere.

    ``overrides`` are ``key=value``. Raises :class:`ConfigurationError`.
    """
    content = dict(_DEFAULTS[backend])
    path = WORKLOADS / f"{workload.name}.plans.yaml"
    if path.is_file():
        content.update(_planned(path, backend))
    errors = apply_overrides(content, overrides, "--plan") + list(unusable_text(content))
    try:
        plan = Plan.model_validate(content)
    except ValidationError as invalid:
        errors += validation_errors(Plan, invalid, "plan.")
    if errors:
        known = ", ".join(Plan.model_fields)
        raise ConfigurationError(f"the plan is wrong\n{listed(errors)}", remedy=f"its keys are {known}")
    effective = workload.training.effective_batch
    if effective % plan.micro_batch:
        raise ConfigurationError(
            f"plan.micro_batch={plan.micro_batch} does not divide training.effective_batch={effective}",
            remedy=f"take one of {[n for n in range(1, effective + 1) if effective % n == 0]}",
        )
    return plan


def _planned(path: Path, backend: Backend) -> dict[str, Any]:
    plans = load_yaml(path)
    unknown = sorted(plans.keys() - set(BACKEND_NAMES))
    if unknown:
        raise ConfigurationError(f"{path}: no backend {shown(unknown[0])}", remedy=f"one of {', '.join(BACKEND_NAMES)}")
    own = plans.get(backend) or {}
    if not isinstance(own, dict):
        raise ConfigurationError(f"{path}: {backend} is no mapping of keys to values", remedy="see the plans beside it")
    return own


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
    """Lay one step's examples out: lists of example indices, ceil(step size / ``micro_batch``) of them.

    ``lengths``: tokens of every example, int64 of shape (examples,). Grouped, the largest micro-batch
    comes first (memory is claimed once). By tokens each example goes, longest first, to the
    micro-batch that holds fewest (Graham 1969: at most 4/3 of the least possible maximum), so a
    document longer than all others of its step together stays alone.
    """
    indices = [int(i) for i in step]
    if plan.grouping != "none":
        indices.sort(key=lambda i: (-int(lengths[i]), i))
    if plan.grouping != "tokens":
        return [indices[i : i + plan.micro_batch] for i in range(0, len(indices), plan.micro_batch)]
    groups: list[list[int]] = [[] for _ in range(-(-len(indices) // plan.micro_batch))]
    totals = [0] * len(groups)
    for index in indices:
        least = totals.index(min(totals))
        groups[least].append(index)
        totals[least] += int(lengths[index])
    return [group for _, group in sorted(zip(totals, groups, strict=True), key=lambda pair: -pair[0])]


def _key_value_heads(config: dict[str, Any]) -> int:
    """As many as query heads where the configuration does not say: transformers' default."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def memory_floor_bytes(workload: Workload, config: dict[str, Any]) -> int:
    """Bytes that weights, adapter, its gradients and optimizer state need whatever the plan.

    ``config``: the base's ``config.json``. Counts the linear layers at 4 bits plus double-quantised
    constants (4.127 bits a weight: Dettmers et al. 2023, section 3) under nf4, embedding and head
    at 16 bits; activations and the CUDA context are not in it.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    intermediate, vocabulary = config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, _key_value_heads(config) * head
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
