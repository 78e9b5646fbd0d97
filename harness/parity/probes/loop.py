"""Takes the place of a trainer's ``training_step`` for one optimizer step and measures inside its loop."""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import Any

import numpy as np
import torch

from forge.training.backends.job import TrainingJob
from forge.training.system.files import sha256_json
from forge.training.train.metrics import document_labels
from harness.parity.probes.batch import (
    NUM_LEAK_POSITIONS,
    FrozenStep,
    adapter_gradients,
    find_documents,
    only_labels,
    other_tokens,
)
from harness.parity.probes.settings import describe_settings, loaded_weights, weights_sha256


class Done(Exception):
    """The probe has what it wants of the training loop."""


class Observer:
    """Lets the loop take its first step's micro-batches, then measures and raises :class:`Done` before the update."""

    def __init__(self, trainer: Any, job: TrainingJob, step: FrozenStep, *, replace: str, inputs_only: bool) -> None:
        self.trainer, self.job, self.step = trainer, job, step
        self.replace, self.inputs_only = replace, inputs_only
        self.real = trainer.training_step
        self.micro_batches = job.micro_batches[: job.accumulation]
        self.losses: list[float] = []
        self.divisors: list[int | None] = []
        self.labels: list[bytes] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.facts: dict[str, Any] = {}

    def __call__(self, model: Any, inputs: Any, num_items_in_batch: Any = None, *more: Any, **named: Any) -> Any:
        """What the loop calls for every micro-batch."""
        if not self.facts:
            self.facts["settings"] = describe_settings(self.trainer)
            self.facts["trainable_dtype"] = _dtype_of_adapter(model)
        self.labels += document_labels(inputs)
        if self.inputs_only:
            loss = torch.zeros((), device=self.trainer.args.device)
        else:
            loss = self.real(model, inputs, num_items_in_batch, *more, **named)
        self.losses.append(float(loss))
        self.divisors.append(None if num_items_in_batch is None else int(num_items_in_batch))
        if len(self.losses) < self.job.accumulation:
            return loss
        self._describe_inputs(model)
        if not self.inputs_only:
            self._measure(model)
        raise Done

    def _describe_inputs(self, model: Any) -> None:
        weights = loaded_weights(model, self.job.workload.model.dtype)
        documents = sorted(self.labels)
        joined = b"".join(hashlib.sha256(labels).digest() for labels in documents)
        self.facts["labels_sha256"] = hashlib.sha256(joined).hexdigest()
        steps = self.job.micro_batches
        size = self.job.accumulation
        order = [sorted(chain.from_iterable(steps[i : i + size])) for i in range(0, len(steps), size)]
        self.facts["order_sha256"] = sha256_json(order)
        self.facts["weights_sha256"] = weights_sha256(weights)
        if self.inputs_only:
            self.facts["weights"] = weights

    def _measure(self, model: Any) -> None:
        step = self.step
        self.facts |= {
            "step_loss": sum(self.losses),
            "divisors": self.divisors,
            "micro_batches": self.micro_batches,
            "gradient_dtype": _dtype_of_adapter(model),
        }
        self._keep("step", self._gradients(model))
        tokens = np.full(step.positions.shape, np.nan)
        losses = np.zeros(len(step.examples))
        for documents in self.micro_batches:
            batch, places = self._collate(documents)
            for document in documents:
                row, column = places[document]
                end = column + len(step.examples.input_ids[document])
                masked = only_labels(batch, row, slice(column + 1, end))
                losses[document] = self._take(model, masked, step.num_trained_tokens) * step.num_trained_tokens
                self._keep(f"document/{document}", self._gradients(model))
            self._token_losses(model, documents, tokens)
        self.tensors |= {"token_losses": tokens, "document_losses": losses}
        first = self.micro_batches[0]
        if self.replace != "none" and len(first) > 1:
            replaced = first[0 if self.replace == "first" else -1]
            other = {replaced: other_tokens(step, replaced, self.job.workload.training.seed)}
            for name, exchanged in (("repeated_losses", None), ("replaced_losses", other)):
                self.tensors[name] = np.full(step.positions.shape, np.nan)
                self._token_losses(model, first, self.tensors[name], exchanged, NUM_LEAK_POSITIONS)
            self.facts["replaced_document"] = replaced

    def _token_losses(
        self,
        model: Any,
        documents: list[int],
        into: np.ndarray,
        replaced: dict[int, np.ndarray] | None = None,
        most: int | None = None,
    ) -> None:
        batch, places = self._collate(documents, replaced)
        for document in documents:
            row, column = places[document]
            for index, position in enumerate(self.step.positions[document][:most]):
                if position >= 0:
                    into[document, index] = self._take(model, only_labels(batch, row, column + int(position)), 1)

    def _collate(
        self, documents: list[int], replaced: dict[int, np.ndarray] | None = None
    ) -> tuple[Any, dict[int, tuple[int, int]]]:
        rows = self.step.rows(documents, replaced)
        batch = self.trainer.data_collator(rows)
        return batch, find_documents(batch, rows, documents)

    def _take(self, model: Any, batch: dict[str, Any], divisor: int) -> float:
        """Forwards and backwards as the trainer does it; gradients are those of this call alone."""
        model.zero_grad(set_to_none=True)
        loss = self.real(model, batch, torch.tensor(divisor, device=self.trainer.args.device))
        getattr(self.trainer, "_metrics", {}).get("train", {}).clear()
        return float(loss)

    def _gradients(self, model: Any) -> dict[str, np.ndarray]:
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        return adapter_gradients(model, float(scaler.get_scale()) if scaler is not None else 1.0)

    def _keep(self, prefix: str, gradients: dict[str, np.ndarray]) -> None:
        self.tensors |= {f"{prefix}/{name}": gradient for name, gradient in gradients.items()}


def _dtype_of_adapter(model: Any) -> str:
    found = {str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters() if ".lora_" in name}
    return ",".join(sorted(found))
