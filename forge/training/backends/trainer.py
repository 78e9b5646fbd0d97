"""The trainer subclass around each backend's own SFTTrainer.

Import only after the backend's ``prepare()``: this module imports transformers.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from forge.training.backends.job import StepObserver, TrainingJob
from forge.training.config.plan import LONG_DOCUMENT_TOKENS
from forge.training.data.batching import largest_micro_batch, longest_document
from forge.training.data.conversation import IGNORED
from forge.training.data.examples import Examples
from forge.training.kernels.dropout import padded_token_keys, token_keys
from forge.training.kernels.install import ForgeLayers, compare_with_own, why_not
from forge.training.models.tokenizers import load_tokenizer
from forge.training.system.errors import DataError

NUM_CHECK_TOKENS = 64
NUM_PLANNED_LENGTHS = 100

disable_progress_bar()  # train/display.py shows one bar, of steps


class StepBatches(torch.utils.data.BatchSampler):  # type: ignore[misc]
    """A run's micro-batches, as PyTorch's loader takes them."""

    def __init__(self, batches: list[list[int]]) -> None:
        self._batches = batches
        super().__init__(range(len(batches)), batch_size=1, drop_last=False)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class WholeSteps(torch.utils.data.Dataset):  # type: ignore[misc]
    """The rows of each optimizer step, by micro-batch: steps differ in how many they have."""

    def __init__(self, rows: Any, steps: list[list[list[int]]]) -> None:
        self._rows, self._steps = rows, steps

    def __getitem__(self, step: int) -> list[list[dict[str, Any]]]:
        return [[self._rows[i] for i in micro_batch] for micro_batch in self._steps[step]]

    def __len__(self) -> int:
        return len(self._steps)


def initialise_adapter(model: Any, seed: int) -> None:
    """Set every LoRA A from its own seeded stream and B to zero, so that all backends start equal.

    A is uniform in +-1/sqrt(in_features): PEFT's Kaiming initialisation with a = sqrt(5).
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                module = name.split(".lora_A.")[0].split("model.layers.")[-1]
                digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                bound = parameter.shape[1] ** -0.5
                values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(values.to(parameter.dtype))
            elif ".lora_B." in name:
                parameter.zero_()


def load_adapter(model: Any, path: Path) -> None:
    """Set every LoRA matrix to that of an adapter that PEFT saved. Raises :class:`DataError` unless they are the same.

    The same names and shapes, that is; values take the parameter's dtype.
    """
    from safetensors.torch import load_file

    stored = load_file(path)
    own = {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    other = sorted(name for name in {*stored, *own} if name not in stored or name not in own)
    other += [name for name in own if name in stored and stored[name].shape != own[name].shape]
    if other:
        raise DataError(
            f"{path} is no adapter of this config: it differs in {len(other):,} matrices, such as {other[0]}",
            remedy="continue it with the lora section that it was trained with",
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name].to(parameter.dtype))


def to_dataset(examples: Examples, max_length: int) -> Any:
    """The examples as a ``datasets.Dataset`` of ``input_ids`` and ``labels``."""
    from datasets import Dataset

    dataset = Dataset.from_dict({"input_ids": examples.input_ids, "labels": examples.labels})
    # Unsloth refuses padding-free batches unless somebody vouches that no row exceeds max_length
    dataset._unsloth_truncated_to = max_length
    return dataset


def forge_trainer(base: Any) -> Callable[..., Any]:
    """A subclass of a backend's SFTTrainer, taking ``(job, observer, model, config, **sft_trainer_arguments)``."""

    class ForgeTrainer(base):  # type: ignore[misc]
        def __init__(self, job: TrainingJob, observer: StepObserver, model: Any, config: Any, **arguments: Any) -> None:
            self.job, self.observer = job, observer
            self._has_begun = False
            length = job.workload.data.max_length
            evaluates = config.eval_strategy != "no" and job.validation is not None
            super().__init__(
                model=model,
                args=config,
                train_dataset=to_dataset(job.train, length),
                eval_dataset=to_dataset(job.validation, length) if evaluates and job.validation else None,
                processing_class=load_tokenizer(job.base_dir),
                **arguments,
            )
            self.remove_callback(PrinterCallback)
            initialise_adapter(self.model, job.workload.training.seed)
            if job.first_adapter is not None:
                load_adapter(self.model, job.first_adapter)

            self.layers = self._install_kernels() if job.plan.kernels == "forge" else None

        def _install_kernels(self) -> ForgeLayers | None:
            reason = why_not(self.model)
            if reason is not None:
                print(f"kernels=forge: {reason}; the stack's own layers train", file=sys.stderr)
                return None
            plan, workload = self.job.plan, self.job.workload
            recomputes = plan.gradient_checkpointing != "none"
            return ForgeLayers(
                self.model,
                tile_tokens=plan.mlp_tile_tokens,
                keep_gib=(plan.kept_activations_gib or 0.0) if recomputes else None,
                offload=plan.gradient_checkpointing == "offload",
                dequantize_once=plan.dequantize_once,
                dtype=getattr(torch, workload.model.dtype),
            )

        def _collate(self, rows: list[dict[str, Any]]) -> Any:
            batch = self.collate(rows)
            self.observer.fetched(batch)
            return batch

        def _collate_step(self, steps: list[list[list[dict[str, Any]]]]) -> Any:
            (micro_batches,) = steps
            batches = [self.collate(rows) for rows in micro_batches]
            self.observer.fetched(*batches)
            labels = torch.cat([batch["labels"].flatten() for batch in batches])
            firsts = torch.cat([_first_labels(batch) for batch in batches])
            labels[firsts] = IGNORED  # no token predicts them: the trainer divides by what is left
            return {"labels": torch.cat([labels.new_full((1,), IGNORED), labels])[None], "micro_batches": batches}

        def collate(self, rows: list[dict[str, Any]]) -> Any:
            """A micro-batch of rows of ``input_ids`` and ``labels``; for Forge's layers with the keys of its tokens."""
            batch = self.data_collator(rows)
            if self.layers is not None:
                documents = [row["input_ids"] for row in rows]
                lengths = [len(ids) for ids in documents]
                width = int(batch["input_ids"].shape[1])
                if batch["input_ids"].shape[0] == 1 and width == sum(lengths):
                    batch["forge"] = {"keys": torch.from_numpy(token_keys(documents)), "lengths": lengths}
                else:
                    keys = torch.from_numpy(padded_token_keys(documents, width))
                    batch["forge"] = {"keys": keys, "lengths": [width] * len(rows)}
            return batch

        def get_train_dataloader(self) -> Any:
            if self.job.plan.micro_batch_tokens is not None:
                layout: dict[str, Any] = {
                    "dataset": WholeSteps(self.train_dataset, self.job.steps),
                    "collate_fn": self._collate_step,
                    "batch_size": 1,
                }
            else:
                layout = {
                    "dataset": self.train_dataset,
                    "collate_fn": self._collate,
                    "batch_sampler": StepBatches(self.job.micro_batches),
                }
            loader = torch.utils.data.DataLoader(**layout, pin_memory=torch.cuda.is_available())
            return self.accelerator.prepare(loader)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            """A step's micro-batches. The loop's first call begins the run: nothing is fetched before it."""
            if not self._has_begun:
                self._has_begun = True
                self.observer.begin(self.state.global_step, self.rehearse, self.evaluate)
            return super().get_batch_samples(*args, **kwargs)

        def take_step(self, model: Any, batch: dict[str, Any], num_trained_tokens: Any) -> None:
            """Forward and backward of a collated micro-batch that is no part of the run: not observed, not logged."""
            self._forward_backward(model, batch, num_trained_tokens)
            getattr(self, "_metrics", {}).get("train", {}).clear()

        def _forward_backward(self, model: Any, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            """One micro-batch: its attention chosen, its dropout's keys told to Forge's layers."""
            is_long = longest_document(batch) >= LONG_DOCUMENT_TOKENS
            if self.job.plan.attention == "mixed" and torch.cuda.is_available():
                torch.backends.cuda.enable_cudnn_sdp(is_long)
            own = batch.pop("forge", None)
            if self.layers is None or own is None:
                return super().training_step(model, batch, *args, **kwargs)
            keys = own["keys"] if self.job.workload.lora.dropout else None
            cudnn = is_long and self.job.plan.attention == "mixed"
            self.layers.begin(own["lengths"], keys, self.job.workload.training.seed, self.state.global_step, cudnn)
            try:
                return super().training_step(model, batch, *args, **kwargs)
            finally:
                self.layers.end()

        def rehearse(self) -> float:
            """Take the largest micro-batch through the model once and forget it. Returns its seconds.

            The random state is put back and no optimizer step taken, so the run that follows is the
            same to the bit. Raises ``torch.OutOfMemoryError`` where the run could not have ended.
            """
            started, job = time.perf_counter(), self.job
            rows = [self.train_dataset[i] for i in largest_micro_batch(job.micro_batches, job.lengths, job.plan)]
            trained = sum(int((np.asarray(row["labels"][1:]) != IGNORED).sum()) for row in rows)
            before = torch.get_rng_state(), torch.cuda.get_rng_state_all()
            self._check_kernels()
            if self.layers is not None and job.plan.attention == "mixed" and torch.cuda.is_available():
                lengths = {job.lengths[i] for batch in job.micro_batches for i in batch}
                long = sorted(n for n in lengths if n >= LONG_DOCUMENT_TOKENS)[-NUM_PLANNED_LENGTHS:]
                self.layers.plan_attention(long, getattr(torch, job.workload.model.dtype))
            self.take_step(self.model, self.collate(rows), torch.tensor(trained, device=self.args.device))
            self.model.zero_grad(set_to_none=True)
            torch.set_rng_state(before[0])
            torch.cuda.set_rng_state_all(before[1])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - started

        def _check_kernels(self) -> None:
            """Forge's layers against the model's own on the first example's first tokens, before the first step."""
            if self.layers is None:
                return
            row = {key: self.train_dataset[0][key][:NUM_CHECK_TOKENS] for key in ("input_ids", "labels")}
            row["labels"] = row["input_ids"]
            length = len(row["input_ids"])
            counted = torch.tensor(length - 1, device=self.args.device)

            def take_step() -> None:
                self.model.train()
                super(ForgeTrainer, self).training_step(self.model, self.data_collator([row]), counted)

            apart = compare_with_own(self.model, self.layers, take_step, length)
            print(f"kernels=forge: gradients within {apart:.2%} of the stack's on {length} tokens", file=sys.stderr)
            getattr(self, "_metrics", {}).get("train", {}).clear()

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            losses = []
            for batch in inputs.get("micro_batches", [inputs]):
                losses.append(self._forward_backward(model, batch, *args, **kwargs))
                self.observer.add_loss(losses[-1].detach())
            return sum(losses[1:], losses[0])

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            """Token-weighted held-out loss: transformers' own is a mean over batches of unequal size."""
            total, count = 0.0, 0
            self.model.eval()
            for row in self.eval_dataset:
                if self.observer.is_stop_requested() and self.state.global_step < self.job.num_steps:
                    # a stop does not wait for it: the resume evaluates before its first step
                    self.control.should_save = self.control.should_training_stop = True
                    self.model.train()
                    return {}
                trained = int((np.asarray(row["labels"][1:]) != IGNORED).sum())
                batch = self._prepare_inputs(self.data_collator([row]))
                with torch.no_grad(), self.compute_loss_context_manager():
                    total += float(self.compute_loss(self.model, batch)) * trained
                count += trained
            getattr(self, "_metrics", {}).get("eval", {}).clear()  # TRL's averages over those batches
            metrics = {"eval_loss": total / count}
            self.log(dict(metrics))
            self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            self.model.train()
            return metrics

        def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            """PEFT (0.18 to 0.21) loads an adapter as float32; with a 4-bit base TRL trains it in bfloat16."""
            trained = {name: value.dtype for name, value in self.model.named_parameters() if value.requires_grad}
            super()._load_from_checkpoint(*args, **kwargs)
            for name, value in self.model.named_parameters():
                if name in trained:
                    value.data = value.data.to(trained[name])

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """Nothing: TRL writes one at every checkpoint; the export writes the model's."""

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            with self.observer.saving(self.state.global_step):
                super()._save_checkpoint(*args, **kwargs)

    return ForgeTrainer


def _first_labels(batch: dict[str, Any]) -> torch.Tensor:
    """Where a document's first label is, bool (rows * tokens,)."""
    positions = batch.get("position_ids")
    if positions is not None:
        return positions.flatten() == 0
    first = torch.zeros(batch["labels"].shape, dtype=torch.bool)
    first[:, 0] = True
    return first.flatten()
