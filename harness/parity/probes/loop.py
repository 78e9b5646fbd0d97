"""Takes the place of a trainer's ``training_step`` for one optimizer step and measures inside its loop.

What a backend really runs with is read from its trainer's optimizer, scheduler and model, not from a file.
"""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import Any

import numpy as np

from forge.training.backends.job import TrainingJob
from forge.training.system.files import sha256_json
from forge.training.train.metrics import document_labels
from forge.training.train.record import describe_trainable
from harness.parity.probes import batch as frozen
from harness.parity.probes.batch import FrozenStep


class Done(Exception):
    """The probe has what it wants of the training loop."""


class Observer:
    """Lets the loop take its first step's micro-batches, then measures and raises :class:`Done` before the update.

    With dropout the step is number :data:`FROZEN_STEP` of the run, and the model has taken the first micro-batch as the
    step before: what it keeps from one step to the next is seen. Layers that are not Forge's drop by explicit masks.
    """

    def __init__(
        self, trainer: Any, job: TrainingJob, step: FrozenStep, *, looks_for_leaks: bool, inputs_only: bool
    ) -> None:
        self.trainer, self.job, self.step = trainer, job, step
        self.looks_for_leaks, self.inputs_only = looks_for_leaks, inputs_only
        self.real = trainer.training_step
        self.micro_batches = job.steps[0]
        self.masks: Any = None
        self.losses: list[float] = []
        self.divisors: list[int | None] = []
        self.labels: list[bytes] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.facts: dict[str, Any] = {}

    def __call__(self, model: Any, inputs: Any, num_items_in_batch: Any = None, *more: Any, **named: Any) -> Any:
        """What the loop calls for every micro-batch."""
        import torch

        if not self.facts:
            self.facts["settings"] = describe_settings(self.trainer)
            self.facts["trainable_dtype"] = _dtype_of_adapter(model)
            if self.job.workload.lora.dropout and not self.inputs_only:
                self._begin_dropout(model, inputs)
        batches = inputs.get("micro_batches", [inputs])
        for batch in batches:
            self.labels += document_labels(batch)
        if self.inputs_only:
            loss = torch.zeros((), device=self.trainer.args.device)
        else:
            loss = self._train(model, inputs, num_items_in_batch, *more, **named)
        self.losses.append(float(loss))
        self.divisors += [None if num_items_in_batch is None else int(num_items_in_batch)] * len(batches)
        if len(self.losses) < self.job.accumulation:
            return loss
        self._describe_inputs(model)
        if not self.inputs_only:
            self._measure(model)
        raise Done

    def _begin_dropout(self, model: Any, inputs: Any) -> None:
        if self.trainer.layers is None:
            from harness.parity.probes.masks import ExplicitMasks

            self.masks = ExplicitMasks(model, self.job.workload.training.seed)
        self.trainer.state.global_step = frozen.FROZEN_STEP - 1
        self._take(model, dict(inputs.get("micro_batches", [inputs])[0]), 1)
        model.zero_grad(set_to_none=True)
        self.trainer.state.global_step = frozen.FROZEN_STEP

    def _train(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        """The trainer's own step on what it was given, with explicit masks where there are any."""
        if self.masks is not None:
            assert "micro_batches" not in inputs, "explicit masks are those of one micro-batch"
            self.masks.begin_batch(inputs, self.trainer.state.global_step, self.trainer.args.device)
        return self.real(model, inputs, *arguments, **named)

    def _describe_inputs(self, model: Any) -> None:
        weights = loaded_weights(model, self.job.workload.model.dtype)
        documents = sorted(self.labels)
        joined = b"".join(hashlib.sha256(labels).digest() for labels in documents)
        self.facts["labels_sha256"] = hashlib.sha256(joined).hexdigest()
        order = [sorted(chain.from_iterable(step)) for step in self.job.steps]
        self.facts["order_sha256"] = sha256_json(order)
        self.facts["weights_sha256"] = sha256_json(sorted(weights.items()))
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
                masked = frozen.only_labels(batch, row, slice(column + 1, end))
                losses[document] = self._take(model, masked, step.num_trained_tokens) * step.num_trained_tokens
                self._keep(f"document/{document}", self._gradients(model))
            self._token_losses(model, documents, tokens)
        self.tensors |= {"token_losses": tokens, "document_losses": losses}
        first = self.micro_batches[0]
        if self.looks_for_leaks and len(first) > 1:
            replaced = first[0]
            other = {replaced: frozen.other_tokens(step, replaced, self.job.workload.training.seed)}
            for name, exchanged in (("repeated_losses", None), ("replaced_losses", other)):
                self.tensors[name] = np.full(step.positions.shape, np.nan)
                self._token_losses(model, first, self.tensors[name], exchanged, frozen.NUM_LEAK_POSITIONS)
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
                    into[document, index] = self._take(model, frozen.only_labels(batch, row, column + int(position)), 1)

    def _collate(
        self, documents: list[int], replaced: dict[int, np.ndarray] | None = None
    ) -> tuple[Any, dict[int, tuple[int, int]]]:
        rows = self.step.rows(documents, replaced)
        batch = self.trainer.collate(rows)
        return batch, frozen.find_documents(batch, rows, documents)

    def _take(self, model: Any, batch: dict[str, Any], divisor: int) -> float:
        """Forwards and backwards as the trainer does it; gradients are those of this call alone."""
        import torch

        model.zero_grad(set_to_none=True)
        loss = self._train(model, batch, torch.tensor(divisor, device=self.trainer.args.device))
        getattr(self.trainer, "_metrics", {}).get("train", {}).clear()
        return float(loss)

    def _gradients(self, model: Any) -> dict[str, np.ndarray]:
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        return frozen.adapter_gradients(model, float(scaler.get_scale()) if scaler is not None else 1.0)

    def _keep(self, prefix: str, gradients: dict[str, np.ndarray]) -> None:
        self.tensors |= {f"{prefix}/{name}": gradient for name, gradient in gradients.items()}


def _dtype_of_adapter(model: Any) -> str:
    dtypes = {str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters() if ".lora_" in name}
    return ",".join(sorted(dtypes))


def describe_settings(trainer: Any) -> dict[str, Any]:
    """Settings that must be the same in every backend. Call it inside the training loop, before the first update.

    ``learning_rates``: of every step of the run, as the scheduler in place will give them.
    """
    args, model = trainer.args, trainer.model
    trainable, lora = describe_trainable(model), [module for module in model.modules() if hasattr(module, "lora_A")]
    return {
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "parameter_groups": _parameter_groups(trainer.optimizer),
        "learning_rates": _learning_rates(trainer),
        "max_grad_norm": args.max_grad_norm,
        "effective_batch": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "num_steps": trainer.state.max_steps,
        "seed": args.seed,
        "label_smoothing": args.label_smoothing_factor,
        "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        "dropouts": _dropouts(model),
        "lora_scalings": sorted({float(scaling) for module in lora for scaling in module.scaling.values()}),
        "trainable_names_sha256": trainable.names_sha256,
        "num_trainable_parameters": trainable.num_parameters,
    }


def _parameter_groups(optimizer: Any) -> list[dict[str, Any]]:
    groups = []
    for group in optimizer.param_groups:
        count = sum(parameter.numel() for parameter in group["params"])
        if count:
            described = {name: float(group[name]) for name in ("eps", "weight_decay")}
            described |= {"num_elements": count, "learning_rate": float(group.get("initial_lr", group["lr"]))}
            groups.append({**described, "betas": [float(beta) for beta in group["betas"]]})
    return sorted(groups, key=str)


def _learning_rates(trainer: Any) -> dict[str, Any]:
    """Of every step; the digest is over 12 digits, so that the last bit of a cosine makes no difference."""
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)  # accelerate's wrapper, or not
    steps = range(trainer.state.max_steps)
    rates = [float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step)) for step in steps]
    return {
        "num_steps": len(rates),
        "highest": float(f"{max(rates):.12g}"),
        "last": float(f"{rates[-1]:.12g}"),
        "sha256": sha256_json([f"{rate:.12g}" for rate in rates]),
    }


def _dropouts(model: Any) -> list[float]:
    """The shares that are dropped anywhere in the model while it trains; none is the empty list."""
    import torch

    shares = {float(module.p) for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0}
    shares |= {float(getattr(module, "attention_dropout", 0.0) or 0.0) for module in model.modules()}
    return sorted(share for share in shares if share > 0)


def loaded_weights(model: Any, dtype: str) -> dict[str, str]:
    """A digest (16 hex digits) of every frozen tensor as it lies in memory, by its name in the base.

    Quantised ones by their packed codes, others as ``dtype``: a stack may hold a norm in float32 and the same
    numbers still. A head that shares the embedding's numbers is not listed.
    """
    import torch

    digests = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace("._orig_mod", "")
        values = parameter.detach().as_subclass(torch.Tensor)  # bitsandbytes' own moves its state along with a copy
        if values.is_floating_point():
            values = values.to(getattr(torch, dtype))
        flat = values.cpu().contiguous().view(torch.uint8).reshape(-1).numpy()
        digests[plain] = hashlib.sha256(flat).hexdigest()[:16]
    if digests.get("lm_head.weight") == digests.get("model.embed_tokens.weight"):
        digests.pop("lm_head.weight", None)
    return digests
