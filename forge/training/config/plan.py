"""Plan: how a backend lays a config's work out on this machine. Never changes a step's mathematics.

A plan decides how the examples of one optimizer step are put into micro-batches, what is kept
for the backward pass and how padding is avoided. Which examples a step holds, and the weight of
every token in its loss, are the config's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from forge.training.config.workload import Workload
from forge.training.system.oom import smaller_micro_batch

LONG_DOCUMENT_TOKENS = 8192
LEAST_MICRO_BATCH_TOKENS = LEAST_TILE_TOKENS = 1024


class Plan(BaseModel):
    """``padding="none"`` flattens a micro-batch into one row with masked borders (padding-free).

    ``attention="flash"`` leaves cuDNN's kernels out, which PyTorch prefers on Hopper: cuDNN plans
    every new length anew, on an H200 about 0.15 s per document, more than a short document's training.
    At 32,768 tokens it is 1.0 s per step faster, so ``"mixed"`` leaves it out only where the longest
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

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    micro_batch: Annotated[int, Field(gt=0)] = 1
    """examples at a time; divides training.effective_batch"""
    gradient_checkpointing: Literal["none", "full", "offload"] = "full"
    """what is kept for the backward pass; offload: in pinned host memory, unsloth only"""
    padding: Literal["longest", "none"] = "longest"
    """none: the examples of a micro-batch in one row, borders masked"""
    attention: Literal["default", "flash", "mixed"] = "default"
    """flash leaves cuDNN's kernels out; mixed: only where documents are short"""
    rehearsal: bool = True
    """the largest micro-batch once before the first step: what does not fit is known at once"""
    grouping: Literal["none", "length", "tokens"] = "none"
    """which examples of a step go together: in order, by length, or about as many tokens each"""
    mlp_tile_tokens: Annotated[int, Field(gt=0)] | None = None
    """longer micro-batches go through each MLP in tiles of so many tokens; null: whole; unsloth only"""
    loss_chunk_gib: Annotated[float, Field(gt=0)] | None = None
    """of logits that the loss holds at a time; null: the backend's choice; unsloth only"""

    kernels: Literal["stack", "forge"] = "stack"
    """forge: decoder layers by hand, with dropout that no layout changes; stack: the backend's own"""
    micro_batch_tokens: Annotated[int, Field(gt=0)] | None = None
    """as many examples at a time as fit into so many tokens, a long one alone; null: micro_batch of them"""
    kept_activations_gib: Annotated[float, Field(ge=0)] | None = None
    """of activations kept where gradient_checkpointing recomputes: so many layers keep theirs; kernels=forge only"""
    dequantize_once: bool = False
    """the 4-bit base held in 16 bits too: no dequantisation in a step, the same bits; kernels=forge only"""

    def accumulation(self, workload: Workload) -> int:
        """What the trainer fetches per optimizer step: micro-batches; with ``micro_batch_tokens`` the step as one."""
        if self.micro_batch_tokens is not None:
            return 1
        return workload.training.effective_batch // self.micro_batch

    def smaller(self, workload: Workload) -> str | None:
        """What to change, as KEY=VALUE, so that a micro-batch takes less memory; ``None``: nothing is left to change.

        Forge's layers keep less before fewer documents go together: recomputing costs least.
        """
        kept = self.kept_activations_gib or 0.0
        if self.kernels == "forge":
            if self.gradient_checkpointing == "none":
                return "gradient_checkpointing=full"
            if kept > 0:
                return f"kept_activations_gib={kept / 2 if kept > 0.5 else 0:g}"
            if self.dequantize_once:
                return "dequantize_once=false"
            if self.gradient_checkpointing == "full" and workload.model.quantization == "nf4":  # on a GPU, that is
                return "gradient_checkpointing=offload"
            if self.micro_batch_tokens is not None and self.micro_batch_tokens > LEAST_MICRO_BATCH_TOKENS:
                return f"micro_batch_tokens={max(LEAST_MICRO_BATCH_TOKENS, self.micro_batch_tokens // 2)}"
            if (self.mlp_tile_tokens or LEAST_TILE_TOKENS + 1) > LEAST_TILE_TOKENS:
                return f"mlp_tile_tokens={LEAST_TILE_TOKENS}"
            if self.micro_batch_tokens is not None:
                return None
        elif self.micro_batch_tokens is not None:
            halved = self.micro_batch_tokens // 2
            return f"micro_batch_tokens={halved}" if halved >= LEAST_MICRO_BATCH_TOKENS else None
        size = smaller_micro_batch(self.micro_batch, workload.training.effective_batch)
        return None if size is None else f"micro_batch={size}"

    def describe_batches(self, workload: Workload) -> str:
        """How many examples are taken at a time, for a person."""
        if self.micro_batch_tokens is not None:
            return f"up to {self.micro_batch_tokens:,} tokens at a time"
        return f"{self.micro_batch} x {self.accumulation(workload)}"
