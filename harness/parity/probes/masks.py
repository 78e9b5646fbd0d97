"""Dropout of a stack's own adapters by explicit masks: those of the counter (forge/training/kernels/dropout.py).

The reference and the baseline of a step with dropout drop by them, so that they and Forge's layers compute the same
step, by another way: PEFT's ``lora_dropout`` multiplies by a whole mask that is made here and kept nowhere else.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forge.training.kernels.dropout import keep_mask, module_key, padded_token_keys, step_keys, token_keys
from harness.parity.probes.batch import matrix_name


class ExplicitMasks:
    """The masks of one micro-batch at a time, in every ``lora_dropout`` of a PEFT model."""

    def __init__(self, model: Any, seed: int) -> None:
        self._seed = seed
        self._rows: Tensor | None = None
        self.num_modules = 0
        for name, module in list(model.named_modules()):
            for adapter, drop in getattr(module, "lora_dropout", {}).items():
                if getattr(drop, "p", 0.0):
                    matrix = matrix_name(f"{name}.lora_A.{adapter}")
                    assert matrix is not None
                    linear = f"model.layers.{matrix.removesuffix('.lora_A')}"
                    module.lora_dropout[adapter] = _Masked(self, module_key(linear), drop.p)
                    self.num_modules += 1

    def begin(self, documents: list[list[int]], width: int | None, step: int, device: Any) -> None:
        """The next forward pass is of these documents, in rows of ``width`` tokens, or end to end where it is None."""
        keys = token_keys(documents) if width is None else padded_token_keys(documents, width)
        self._rows = step_keys(torch.from_numpy(keys).to(device), self._seed, step)

    def begin_batch(self, batch: dict[str, Any], step: int, device: Any) -> None:
        """The next forward pass is of a collated micro-batch."""
        ids = batch["input_ids"].to("cpu").numpy()
        if batch.get("attention_mask") is not None:
            mask = batch["attention_mask"].to("cpu").numpy().astype(bool)
            documents = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
            assert all(mask[:, 0]), "padding is on the right"
            self.begin(documents, ids.shape[1], step, device)
        else:
            starts = np.flatnonzero(batch["position_ids"].to("cpu").numpy()[0] == 0).tolist()
            documents = [ids[0, a:b].tolist() for a, b in pairwise([*starts, ids.shape[1]])]
            self.begin(documents, None, step, device)

    def of(self, x: Tensor, module: int, p: float) -> Tensor:
        """x (..., channels) without its dropped elements, the others scaled."""
        assert self._rows is not None, "no micro-batch was begun"
        kept = keep_mask(self._rows, module, x.shape[-1], p).view(x.shape)
        return (x.to(torch.promote_types(x.dtype, torch.float32)) * kept / (1 - p)).to(x.dtype)


class _Masked(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, masks: ExplicitMasks, module: int, p: float) -> None:
        super().__init__()
        self._masks, self._module, self.p = masks, module, p

    def forward(self, x: Tensor) -> Tensor:
        return self._masks.of(x, self._module, self.p)
