"""How much memory a micro-batch takes, by phase, in a layout of Forge's layers.

    peak = what stays + what the layers leave for the backward pass + what the phase works with

What the layers leave follows from the plan and is counted exactly. What a phase works with is a few rows of the
hidden size per token, a few rows of the MLP's inner size per token of a tile, and a constant: three coefficients,
which probes on the machine fit. Without probes they are those of docs/results/2026-11-29-h200-kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from forge.training.config.plan import Plan
from forge.training.planner.sizes import Sizes

CONTEXT_BYTES = 768 << 20  # CUDA's own, on an H200 with the kernels of a run
_GIB = 1 << 30
LSE_BYTES = 4  # of attention's log-sum-exp, per token and query head

PHASES = ("forward and loss", "backward, kept layers", "backward, recomputed layers")


@dataclass(frozen=True)
class Probed:
    """One micro-batch that was measured: peaks in bytes, seconds of forward and backward."""

    num_tokens: int
    tokens_squared: int
    num_kept: int
    tile_tokens: int | None
    offload: bool
    forward_bytes: int
    backward_bytes: int
    seconds: float


@dataclass(frozen=True)
class MemoryModel:
    """Coefficients in rows: of the hidden size per token, of the inner size per token of a tile; bytes for constants.

    ``static_bytes``: weights, adapter and optimizer state as loaded. ``loss_bytes``: of the loss head, per token up to
    ``loss_limit`` bytes (infinite where the logits are whole).
    """

    sizes: Sizes
    static_bytes: int
    is_on_host: bool = False  # a CPU: nothing is offloaded
    rows: float = 10.6
    tile_rows: float = 4.0
    kept_rows: float = 2.5
    kept_tile_rows: float = 1.0
    constant_bytes: float = 0.0
    loss_rows: float = 5.0
    loss_bytes_per_token: float = 0.0
    loss_limit_bytes: float = float("inf")
    is_fitted: bool = False

    @classmethod
    def assumed(cls, sizes: Sizes, static_bytes: int | None, plan: Plan, *, is_on_host: bool) -> MemoryModel:
        """Before anything is measured. ``static_bytes``: as loaded; ``None``: computed from the sizes."""
        adapter = sizes.num_adapter * (4 + sizes.optimizer_bytes)
        static = int(sizes.weights_bytes + adapter) if static_bytes is None else static_bytes
        logits = 3.0 * 4 * sizes.vocabulary  # in float32, their exponentials and gradients
        limit = float("inf") if plan.loss_chunk_gib is None else 1.5 * plan.loss_chunk_gib * _GIB
        return cls(sizes, static, is_on_host, loss_bytes_per_token=logits, loss_limit_bytes=limit)

    def num_kept(self, plan: Plan, num_tokens: int) -> int:
        """Of how many layers a micro-batch of so many tokens keeps all activations."""
        layers = self.sizes.num_layers
        if plan.gradient_checkpointing == "none":
            return layers
        room = (plan.kept_activations_gib or 0.0) * _GIB
        return min(layers, int(room / (self.sizes.kept_bytes * num_tokens)))

    def left_bytes(self, num_tokens: int, num_kept: int, offload: bool) -> int:
        """What all layers of a micro-batch leave for its backward pass."""
        sizes = self.sizes
        on_device = num_kept if offload and not self.is_on_host else sizes.num_layers
        per_token = on_device * sizes.passed_bytes + num_kept * sizes.kept_bytes
        return num_tokens * (per_token + sizes.num_layers * sizes.num_heads * LSE_BYTES)

    def phases(self, plan: Plan, num_tokens: int) -> dict[str, int]:
        """Peak bytes of each phase of a micro-batch of ``num_tokens`` tokens."""
        offload = plan.gradient_checkpointing == "offload"
        num_kept = self.num_kept(plan, num_tokens)
        return self.phases_of(num_tokens, num_kept, plan.mlp_tile_tokens, offload, plan.dequantize_once)

    def phases_of(
        self, num_tokens: int, num_kept: int, tile_tokens: int | None, offload: bool, dense: bool
    ) -> dict[str, int]:
        """As :meth:`phases`, of a layout given by its parts."""
        sizes = self.sizes
        static = self.static_bytes + (sizes.dense_bytes if dense else 0)
        weights = 0 if dense or not sizes.is_nf4 else 2 * sizes.hidden * sizes.inner * sizes.itemsize
        left = self.left_bytes(num_tokens, num_kept, offload)
        row = num_tokens * sizes.hidden * sizes.itemsize
        tile = min(num_tokens, tile_tokens or num_tokens) * sizes.inner * sizes.itemsize
        loss = min(self.loss_bytes_per_token * num_tokens, self.loss_limit_bytes)
        found = {PHASES[0]: static + left + self.loss_rows * row + loss}
        backward = static + self.constant_bytes + weights + sizes.num_adapter * 4
        if num_kept:
            found[PHASES[1]] = backward + left + self.kept_rows * row + self.kept_tile_rows * tile
        if num_kept < sizes.num_layers:
            rest = self.left_bytes(num_tokens, 0, offload) * (sizes.num_layers - num_kept) / sizes.num_layers
            found[PHASES[2]] = backward + rest + self.rows * row + self.tile_rows * tile
        return {phase: int(value) for phase, value in found.items()}

    def peak_bytes(self, plan: Plan, micro_batches: Sequence[int]) -> int:
        """The most that any of a run's micro-batches, given by their tokens, takes."""
        return max(max(self.phases(plan, tokens).values()) for tokens in {*micro_batches})

    def fitted(self, probes: Sequence[Probed]) -> MemoryModel:
        """With the coefficients of what was measured: layers that recompute, of three lengths or more, some tiled."""
        sizes, recomputed = self.sizes, [probe for probe in probes if probe.num_kept == 0]
        rows, values = [], []
        weights = 2 * sizes.hidden * sizes.inner * sizes.itemsize if sizes.is_nf4 else 0
        for probe in recomputed:
            known = self.static_bytes + weights + sizes.num_adapter * 4
            known += self.left_bytes(probe.num_tokens, 0, probe.offload)
            tile = min(probe.num_tokens, probe.tile_tokens or probe.num_tokens)
            rows.append([1.0, probe.num_tokens * sizes.hidden * sizes.itemsize, tile * sizes.inner * sizes.itemsize])
            values.append(probe.backward_bytes - known)
        constant, hidden_rows, tile_rows = least_squares(rows, values)
        losses, loss_values = [], []
        for probe in probes:
            left = self.left_bytes(probe.num_tokens, probe.num_kept, probe.offload)
            losses.append([1.0, float(probe.num_tokens)])
            loss_values.append(probe.forward_bytes - self.static_bytes - left)
        loss_constant, loss_per_token = least_squares(losses, loss_values)
        return replace(
            self,
            constant_bytes=constant,
            rows=hidden_rows,
            tile_rows=tile_rows,
            loss_rows=loss_per_token / (sizes.hidden * sizes.itemsize),
            loss_bytes_per_token=loss_constant,  # reached by one token: a constant
            loss_limit_bytes=loss_constant,
            is_fitted=True,
        )

    def describe(self) -> dict[str, Any]:
        """The coefficients, for a record."""
        return {key: value for key, value in asdict(self).items() if key != "sizes" and value != float("inf")}


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Coefficients of at least 0 that fit best, relative to the values: of small ones as well as of large."""
    matrix, target = np.array(rows, dtype=float), np.array(values, dtype=float)
    weight = 1.0 / np.maximum(np.abs(target), 1e-9)
    found, used = np.zeros(matrix.shape[1]), [i for i in range(matrix.shape[1]) if matrix[:, i].any()]
    while used:
        scale = np.abs(matrix[:, used]).max(axis=0)
        part, *_ = np.linalg.lstsq(matrix[:, used] / scale * weight[:, None], target * weight, rcond=None)
        if part.min() >= 0:
            found[used] = part / scale
            break
        used.pop(int(part.argmin()))
    return [float(value) for value in found]
