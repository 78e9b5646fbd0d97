"""The trainer subclass and callbacks around each backend's own SFTTrainer.

Import only after the backend's ``prepare()``: this module imports transformers.
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from forge.training import checkpoint
from forge.training.batches import StepBatches, largest_micro_batch, longest_document, to_dataset
from forge.training.data.conversation import IGNORED
from forge.training.errors import DivergedError
from forge.training.files import staged_directory, write_json
from forge.training.job import TrainingJob
from forge.training.meter import Meter
from forge.training.models.tokenizers import load_tokenizer
from forge.training.plan import LONG_DOCUMENT_TOKENS

BEST = "best.json"  # beside the best adapter: its step and held-out loss

disable_progress_bar()  # progress.py shows one bar, of steps


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


def forge_trainer(base: Any) -> Callable[..., Any]:
    """A subclass of a backend's SFTTrainer, taking ``(job, model, config, **sft_trainer_arguments)``."""

    class ForgeTrainer(base):  # type: ignore[misc]
        def __init__(self, job: TrainingJob, model: Any, config: Any, **more: Any) -> None:
            self.job = job
            self.meter: Meter | None = None
            length = job.workload.data.max_length
            evaluates = config.eval_strategy != "no" and job.validation is not None
            super().__init__(
                model=model,
                args=config,
                train_dataset=to_dataset(job.train, length),
                eval_dataset=to_dataset(job.validation, length) if evaluates and job.validation else None,
                processing_class=load_tokenizer(job.base_dir),
                **more,
            )
            self.remove_callback(PrinterCallback)
            initialise_adapter(self.model, job.workload.training.seed)

        def _collate(self, rows: list[dict[str, Any]]) -> Any:
            batch = self.data_collator(rows)
            if self.meter is not None:
                self.meter.fetched(batch)
            return batch

        def get_train_dataloader(self) -> Any:
            loader = torch.utils.data.DataLoader(
                self.train_dataset,
                batch_sampler=StepBatches(self.job),
                collate_fn=self._collate,
                pin_memory=torch.cuda.is_available(),
            )
            return self.accelerator.prepare(loader)

        def take_step(self, model: Any, batch: dict[str, Any], num_trained_tokens: Any) -> None:
            """Forward and backward of a collated micro-batch that is no part of the run: not metered, not logged."""
            self._choose_attention(batch)
            super().training_step(model, batch, num_trained_tokens)
            getattr(self, "_metrics", {}).get("train", {}).clear()

        def _choose_attention(self, batch: dict[str, Any]) -> None:
            if self.job.plan.attention == "mixed" and torch.cuda.is_available():
                torch.backends.cuda.enable_cudnn_sdp(longest_document(batch) >= LONG_DOCUMENT_TOKENS)

        def rehearse(self, model: Any) -> float:
            """Take the largest micro-batch through once and forget it. Returns its seconds.

            The random state is put back and no optimizer step taken, so the run that follows is the
            same to the bit. Raises ``torch.OutOfMemoryError`` where the run could not have ended.
            """
            started = time.perf_counter()
            rows = [self.train_dataset[i] for i in largest_micro_batch(self.job)]
            trained = sum(int((np.asarray(row["labels"][1:]) != IGNORED).sum()) for row in rows)
            before = torch.get_rng_state(), torch.cuda.get_rng_state_all()
            self.take_step(model, self.data_collator(rows), torch.tensor(trained, device=self.args.device))
            model.zero_grad(set_to_none=True)
            torch.set_rng_state(before[0])
            torch.cuda.set_rng_state_all(before[1])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - started

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._choose_attention(inputs)
            loss = super().training_step(model, inputs, *args, **kwargs)
            if self.meter is not None:
                self.meter.add_loss(loss.detach())
            return loss

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            """Token-weighted held-out loss: transformers' own is a mean over batches of unequal size."""
            total, count = 0.0, 0
            self.model.eval()
            for row in self.eval_dataset:
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

    return ForgeTrainer


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Finite numbers, the step log, the best adapter, early stopping, sealed checkpoints, signals."""

    def __init__(
        self,
        trainer: Any,
        meter: Meter,
        identity: dict[str, str],
        on_step: Callable[[int, dict[str, Any]], None],
    ) -> None:
        self.trainer = trainer
        self.job: TrainingJob = trainer.job
        self.meter = meter
        self.identity = identity
        self.on_step = on_step
        self.figures: dict[str, Any] = {}
        self.validation: list[tuple[int, float]] = meter.validation
        self.best = _read_best(self.job.run_dir / "best") if self.validation else None
        self.signal_number: int | None = None
        self.rehearsal_seconds: float | None = None

    def catch_signals(self) -> None:
        """Finish the step and stop on the first SIGINT or SIGTERM; the second kills at once."""

        def handler(number: int, _: Any) -> None:
            self.signal_number = number
            signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        if self.job.plan.rehearsal:
            self.rehearsal_seconds = self.trainer.rehearse(model)
            self.meter.phase("rehearsal")
        self.meter.resume_clock()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop before a number that is not finite reaches the weights."""
        grads = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        norms = torch._foreach_norm(grads) if grads else []
        finite = bool(torch.isfinite(torch.stack([n.float() for n in norms])).all()) if norms else False
        loss = self.meter.step_loss()
        if not np.isfinite(loss) or (not finite and not args.fp16):  # fp16's scaler skips its first steps
            what = f"the loss is {loss}" if not np.isfinite(loss) else "a gradient is not finite"
            raise DivergedError(
                f"step {state.global_step + 1}: {what}; the adapter was not touched by this step",
                remedy="lower optimizer.learning_rate, or look at the documents of this step in steps.jsonl",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_last = state.global_step >= self.job.num_steps
        self.figures = {"step": state.global_step, **self.meter.step_ended(is_last)}
        if self.signal_number is not None:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no" or bool(self.job.num_steps > state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "grad_norm" in logs and self.figures:
            self.figures["grad_norm"] = float(logs["grad_norm"])
            self.figures["learning_rate"] = float(logs["learning_rate"])
            self.meter.write(self.figures)
            self.on_step(state.global_step, self.figures)
            self.figures = {}
        self.meter.resume_clock()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        loss = float(metrics["eval_loss"])
        self.validation.append((state.global_step, loss))
        self.meter.write({"step": state.global_step, "validation_loss": loss})
        if self.best is None or loss < self.best[1]:
            self.best = (state.global_step, loss)
            save_adapter(self.trainer.model, self.job, self.job.run_dir / "best", self.best)
        patience = self.job.workload.training.early_stopping_patience
        if patience is not None:
            since = [step for step, _ in self.validation if step > self.best[0]]
            if len(since) >= patience:
                control.should_training_stop = True
        self.meter.resume_clock()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        directory = Path(args.output_dir)
        checkpoint.seal(directory / f"checkpoint-{state.global_step}", self.identity)
        checkpoint.rotate(directory)
        self.meter.resume_clock()


def _read_best(directory: Path) -> tuple[int, float] | None:
    try:
        content = json.loads((directory / BEST).read_text(encoding="utf-8"))
        return int(content["step"]), float(content["validation_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_adapter(model: Any, job: TrainingJob, directory: Path, evaluated: tuple[int, float] | None = None) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, complete or not at all."""
    with staged_directory(directory, force=True) as staging:
        model.save_pretrained(staging, safe_serialization=True)
        for name in ("README.md", "training_args.bin"):
            (staging / name).unlink(missing_ok=True)
        config = json.loads((staging / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = job.workload.model.path
        write_json(staging / "adapter_config.json", config)
        if evaluated is not None:
            write_json(staging / BEST, {"step": evaluated[0], "validation_loss": evaluated[1]})
        for path in staging.iterdir():
            path.chmod(0o644)
