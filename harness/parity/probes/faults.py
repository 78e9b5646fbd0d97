"""Faults that the first-step probe can plant in a trainer, so that the gate can be seen to catch them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from forge.training.data.conversation import IGNORED
from harness.parity.probes import kernel_faults

FAULTS = (
    "labels-shifted",  # the loss is that of the token after the next
    "micro-batch-mean",  # each micro-batch counts the same, however many tokens it trains
    "frozen-matrix",  # one LoRA matrix is not trained
    "no-boundaries",  # packed documents see one another
    "dropout",  # where the workload has none
    "learning-rate",  # a tenth too high
)


@contextmanager
def planted(fault: str | None, trainer: Any) -> Iterator[None]:
    """Plant one of :data:`FAULTS` in a trainer that has not begun, or a fault of Forge's layers for a while."""
    with ExitStack() as stack:
        if fault in kernel_faults.FAULTS:
            stack.enter_context(kernel_faults.planted(fault, trainer.layers))
        elif fault is not None:
            _plant(fault, trainer)
        yield


def _plant(fault: str, trainer: Any) -> None:
    if fault == "frozen-matrix":
        matrices = [p for name, p in trainer.model.named_parameters() if ".lora_A." in name]
        matrices[len(matrices) // 2].requires_grad_(False)
    elif fault == "dropout":
        _add_dropout(trainer.model, 0.1)
    elif fault == "learning-rate":
        trainer.args.learning_rate *= 1.1
    else:
        changed: Callable[..., Any] = {
            "labels-shifted": _labels_shifted,
            "micro-batch-mean": _micro_batch_mean,
            "no-boundaries": _no_boundaries,
        }[fault]
        real = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **more: Any) -> Any:
            inputs, num_items = changed(trainer, dict(inputs), num_items_in_batch)
            return real(model, inputs, *args, num_items_in_batch=num_items, **more)

        trainer.compute_loss = compute_loss


def _add_dropout(model: Any, share: float) -> None:
    from torch import nn

    for module in model.modules():
        for name in getattr(module, "lora_dropout", {}):
            module.lora_dropout[name] = nn.Dropout(share)


def _labels_shifted(_: Any, inputs: dict[str, Any], num_items: Any) -> tuple[dict[str, Any], Any]:
    labels = inputs["labels"].roll(-1, dims=1)
    labels[:, -1] = IGNORED
    return {**inputs, "labels": labels}, num_items


def _micro_batch_mean(trainer: Any, inputs: dict[str, Any], num_items: Any) -> tuple[dict[str, Any], Any]:
    own = (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
    return inputs, own * trainer.args.gradient_accumulation_steps


def _no_boundaries(_: Any, inputs: dict[str, Any], num_items: Any) -> tuple[dict[str, Any], Any]:
    import torch

    if "position_ids" not in inputs:
        return inputs, num_items
    whole = torch.arange(inputs["position_ids"].shape[1], device=inputs["position_ids"].device)
    return {**inputs, "position_ids": whole.expand_as(inputs["position_ids"])}, num_items
