"""The frozen step of the first-step probe: its documents, the tokens measured by themselves, the first adapter.

Documents are known by their place in the examples, tokens by their place in their document, matrices by
their place in the model: none of it depends on how a backend lays a step out or wraps its model.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from forge.training.data.conversation import IGNORED
from forge.training.data.examples import Examples
from forge.training.system.errors import CheckError

NUM_DOCUMENTS = 8
NUM_POSITIONS = 16  # tokens of a document whose loss is measured by itself
NUM_LEAK_POSITIONS = 4  # of those, how many are measured again when another document is replaced
FROZEN_STEP = 3  # of the run, where dropout's masks depend on it
B_BOUND = 0.01  # of the drawn LoRA B: what some fifty steps at a learning rate of 2e-4 make of zero

_MATRIX = re.compile(r"(?:^|\.)layers\.(\d+\..+)\.lora_([AB])\.")


@dataclass(frozen=True)
class FrozenStep:
    """``positions``: int32 (documents, tokens), targets measured by themselves in their document; -1: none.

    ``num_trained``: int64 (documents,), tokens that the model is trained to predict.
    """

    examples: Examples
    positions: np.ndarray
    num_trained: np.ndarray

    @property
    def num_trained_tokens(self) -> int:
        """The step's divisor: every trained token counts once."""
        return int(self.num_trained.sum())

    def rows(self, documents: list[int], replaced: dict[int, np.ndarray] | None = None) -> list[dict[str, Any]]:
        """Documents as the collators take them; ``replaced``: other token ids for some of them."""
        rows = []
        for document in documents:
            ids, labels = self.examples.input_ids[document], self.examples.labels[document]
            if replaced is not None and document in replaced:
                ids = replaced[document]
                labels = np.where(labels == IGNORED, IGNORED, ids)
            rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
        return rows


def freeze_step(examples: Examples, seed: int, num_positions: int = NUM_POSITIONS) -> FrozenStep:
    """Choose each document's positions: its first and last trained token, and others by chance; ascending."""
    positions = np.full((len(examples), num_positions), -1, dtype=np.int32)
    num_trained = np.zeros(len(examples), dtype=np.int64)
    for document, labels in enumerate(examples.labels):
        targets = 1 + np.flatnonzero(labels[1:] != IGNORED)  # nothing predicts the first token
        num_trained[document] = len(targets)
        generator = np.random.Generator(np.random.PCG64([seed, document]))
        others = generator.permutation(targets[1:-1])[: num_positions - 2]
        chosen = np.unique(np.concatenate([targets[:1], targets[-1:], others]))
        positions[document, : len(chosen)] = chosen
    return FrozenStep(examples, positions, num_trained)


def other_tokens(step: FrozenStep, document: int, seed: int) -> np.ndarray:
    """Another document of the same length: this one's tokens in another order."""
    generator = np.random.Generator(np.random.PCG64([seed, document, 1]))
    return generator.permutation(step.examples.input_ids[document])


def find_documents(batch: Any, rows: list[dict[str, Any]], documents: list[int]) -> dict[int, tuple[int, int]]:
    """The row and the first column of each document in a collated micro-batch.

    Documents are found by their tokens, between the borders that the batch itself gives: the attention mask's, or,
    where documents were flattened into one row, restarting ``position_ids``. Raises :class:`CheckError` where one is
    missing or changed.
    """
    ids = batch["input_ids"].to("cpu").numpy()
    places: dict[int, tuple[int, int]] = {}
    for row, start, end in _segments(batch, ids):
        for document, given in zip(documents, rows, strict=True):
            if document not in places and given["input_ids"] == ids[row, start:end].tolist():
                places[document] = (row, start)
                break
    missing = sorted(set(documents) - set(places))
    if missing:
        raise CheckError(
            f"documents {missing} are not in the micro-batch as they were given to the collator",
            remedy="look at what the backend's collator cuts, joins or reorders",
        )
    return places


def _segments(batch: Any, ids: np.ndarray) -> list[tuple[int, int, int]]:
    if batch.get("attention_mask") is not None:
        mask = batch["attention_mask"].to("cpu").numpy().astype(bool)
        return [(row, int(keep.argmax()), int(keep.argmax() + keep.sum())) for row, keep in enumerate(mask)]
    positions = batch["position_ids"].to("cpu").numpy()[0]
    bounds = [*np.flatnonzero(positions == 0).tolist(), ids.shape[1]]
    return [(0, start, end) for start, end in pairwise(bounds)]


def only_labels(batch: Any, row: int, columns: Any) -> dict[str, Any]:
    """The batch with every label masked but those of ``row`` and ``columns`` (an index or a slice)."""
    import torch

    labels = torch.full_like(batch["labels"], IGNORED)
    labels[row, columns] = batch["labels"][row, columns]
    return {**batch, "labels": labels}


def matrix_name(parameter: str) -> str | None:
    """``"0.self_attn.q_proj.lora_A"`` for a LoRA parameter however it is wrapped, else ``None``."""
    match = _MATRIX.search(parameter.replace("._orig_mod", "").replace("._checkpoint_wrapped_module", ""))
    return f"{match[1]}.lora_{match[2]}" if match else None


def draw_adapter(model: Any, seed: int) -> str:
    """Set the adapter: A as every run draws it, B drawn too, both rounded to bfloat16. Returns a digest of both.

    With B = 0 every gradient of A would be zero. Some backends keep the adapter in bfloat16 and some in float32;
    rounded, all have the same numbers, and no rounding of the start counts as an error of theirs.
    """
    import torch

    from forge.training.backends.trainer import initialise_adapter

    initialise_adapter(model, seed)
    digests = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = matrix_name(name)
            if matrix is None:
                continue
            values = parameter.detach().float().cpu()
            if matrix.endswith("B"):
                digest = hashlib.sha256(f"{seed}:{matrix}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                values = torch.empty(parameter.shape).uniform_(-B_BOUND, B_BOUND, generator=generator)
            values = values.to(torch.bfloat16).float()
            parameter.copy_(values.to(parameter.dtype))
            stored = parameter.detach().float().cpu().numpy()
            digests[matrix] = hashlib.sha256(stored.tobytes()).hexdigest()
    return hashlib.sha256("".join(f"{name}={digests[name]};" for name in sorted(digests)).encode()).hexdigest()


def adapter_gradients(model: Any, loss_scale: float = 1.0) -> dict[str, np.ndarray]:
    """Every LoRA matrix's gradient as float32; zeros where the backward pass left none."""
    gradients = {}
    for name, parameter in model.named_parameters():
        matrix = matrix_name(name)
        if matrix is not None and parameter.grad is None:
            gradients[matrix] = np.zeros(tuple(parameter.shape), dtype=np.float32)
        elif matrix is not None:
            gradients[matrix] = parameter.grad.detach().float().cpu().numpy() / np.float32(loss_scale)
    return gradients
