"""Faults planted in a real training process: every public function is one, and changes this process's code.

In a test by ``fault=`` of :mod:`tests.support.run_command`; by hand ``python -m tests.support.faults FAULT [MODULE]
train ...``. Numbers in capitals are environment variables.
"""

from __future__ import annotations

import os
import resource
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Any

HURT_STEP = 10
FROZEN = "layers.1.mlp.up_proj.lora_B"


def _at(owner: Any, name: str, then: Callable[..., Any]) -> None:
    """Call ``then(original, *arguments)`` in place of ``owner.name``."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: then(original, *a, **k))


def _in_trainer(method: str, then: Callable[..., Any]) -> None:
    """Call ``then(original, trainer, *arguments)`` in place of a method of the trainer."""
    from forge.training.backends import trainer as loop

    def changed(forge_trainer: Any, base: Any) -> Any:
        made = forge_trainer(base)
        original = getattr(made, method)
        return type("Changed", (made,), {method: lambda self, *a, **k: then(original, self, *a, **k)})

    _at(loop, "forge_trainer", changed)


def _to_adapter(change: Callable[[Any], None]) -> None:
    """Call ``change(model)`` when the adapter has its first weights."""
    from forge.training.backends import trainer as loop

    def initialise(original: Any, model: Any, seed: int) -> None:
        original(model, seed)
        change(model)

    _at(loop, "initialise_adapter", initialise)


# --------------------------------------------------------------------------------------------------------------------
# Faults that leave config, plan and inputs as they are, so that only what comes of the run can show them


def learning_rate() -> None:
    """The learning rate is FAULT_FACTOR times as high (1.1)."""
    from forge.training.backends import sft_config

    factor = float(os.environ.get("FAULT_FACTOR", "1.1"))

    def faster(original: Any, job: Any) -> dict[str, Any]:
        fields = original(job)
        return fields | {"learning_rate": fields["learning_rate"] * factor}

    _at(sft_config, "sft_fields", faster)


def frozen_matrix() -> None:
    """One matrix of the adapter has a gradient of zeros."""

    def freeze(model: Any) -> None:
        import torch

        (matrix,) = (parameter for name, parameter in model.named_parameters() if FROZEN in name)
        matrix.register_hook(torch.zeros_like)

    _to_adapter(freeze)


def dropout() -> None:
    """The adapter has a dropout of 0.1."""

    def drop(model: Any) -> None:
        import torch

        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(0.1)

    _to_adapter(drop)


def bfloat16_adapter() -> None:
    """The adapter's weights are bfloat16, as TRL makes them for a 4-bit base, which no CPU trains."""

    def round_it(model: Any) -> None:
        import torch

        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)

    _to_adapter(round_it)


def bfloat16_adapter_and_killed() -> None:
    """The two of them."""
    bfloat16_adapter()
    kill_in_optimizer_file()


def no_code_for_a_resume() -> None:
    """Every function of :data:`harness.measurement.key.RESUMES` raises ``NotImplementedError``."""
    from harness.measurement.key import RESUMES

    def fails(*_: Any, **__: Any) -> None:
        raise NotImplementedError("only a resumed run calls this")

    assert list(RESUMES) == ["backends/trainer.py"]
    for method in RESUMES["backends/trainer.py"]:
        _in_trainer(method, fails)


# --------------------------------------------------------------------------------------------------------------------
# Killed while saving


def kill_in_optimizer_file() -> None:
    """SIGKILL when half of checkpoint-10's optimizer.pt is on disk."""
    import torch

    def save(original: Any, value: Any, target: Any, *more: Any, **named: Any) -> None:
        original(value, target, *more, **named)
        if str(target).endswith(f"checkpoint-{HURT_STEP}/optimizer.pt"):
            os.truncate(target, os.path.getsize(target) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    _at(torch, "save", save)


def kill_at_write() -> None:
    """SIGKILL just before the KILL_AT-th change of the run's files after the first step; 0 counts them instead.

    Counted: files opened for writing, renamed, linked, deleted, copied, written by torch and safetensors.
    """
    import atexit
    import builtins

    import safetensors.torch
    import torch

    from forge.training.train.callbacks import StepCallback

    target, num_changes, has_begun = int(os.environ["KILL_AT"]), 0, False

    def count() -> None:
        nonlocal num_changes
        num_changes += has_begun
        if has_begun and num_changes == target:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(original: Any, *arguments: Any, **named: Any) -> Any:
        count()
        return original(*arguments, **named)

    def opened(original: Any, path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if set(mode) & set("wax+"):
            count()
        return original(path, mode, *arguments, **named)

    def begin(original: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal has_begun
        has_begun = True
        return original(*arguments, **named)

    for owner, name in (
        *((os, name) for name in ("replace", "link", "unlink", "rmdir", "mkdir")),
        *((shutil, "copyfile"), (torch, "save"), (safetensors.torch, "save_file")),
    ):
        _at(owner, name, counted)
    _at(builtins, "open", opened)
    _at(StepCallback, "on_step_end", begin)
    if target == 0:
        report = os.open(os.environ["KILL_COUNT"], os.O_WRONLY | os.O_CREAT)
        atexit.register(lambda: os.write(report, str(num_changes).encode()))
        _at(os, "_exit", lambda original, code: (os.write(report, str(num_changes).encode()), original(code)))


# --------------------------------------------------------------------------------------------------------------------
# Asked to stop


def ask_to_stop() -> None:
    """Send this process STOP_SIGNAL (STOP_TIMES times) when it first comes to STOP_MOMENT."""
    number, moment = int(os.environ["STOP_SIGNAL"]), os.environ["STOP_MOMENT"]
    times = iter(range(int(os.environ.get("STOP_TIMES", "1"))))

    def ask(original: Any, *arguments: Any, **named: Any) -> Any:
        for _ in times:
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    import torch

    from forge.training.backends import trl
    from forge.training.data import inputs
    from forge.training.train import checkpoint

    functions = {"tokenisation": (inputs, "encode_records"), "load": (trl, "load_model"), "save": (torch, "save")}
    functions["seal"] = (checkpoint, "seal")
    if moment in functions:
        _at(*functions[moment], ask)
    else:
        _in_trainer({"evaluation": "evaluate", "step": "training_step", "rehearsal": "rehearse"}[moment], ask)


def signal_in_step() -> None:
    """Send this process STOP_SIGNAL when step STOP_STEP begins."""
    number, step = int(os.environ["STOP_SIGNAL"]), int(os.environ["STOP_STEP"])
    times = iter(range(1))

    def training_step(original: Any, trainer: Any, *arguments: Any, **named: Any) -> Any:
        if trainer.state.global_step + 1 == step:
            for _ in times:
                os.kill(os.getpid(), number)
        return original(trainer, *arguments, **named)

    _in_trainer("training_step", training_step)


def masks_in_the_order_drawn() -> None:
    """Dropout's masks depend on how many micro-batches this process has taken, as a random state that is not kept."""
    from forge.training.kernels import install

    num_taken = iter(range(1_000_000))
    _at(install, "step_keys", lambda original, keys, seed, step: original(keys, seed, next(num_taken)))


def masks_in_the_order_drawn_and_stopped() -> None:
    """The two of them."""
    masks_in_the_order_drawn()
    signal_in_step()


# --------------------------------------------------------------------------------------------------------------------
# Numbers, memory, disk


def _loss_times(factor: Callable[[int], float], *, is_training: bool = True) -> None:
    def compute_loss(original: Any, trainer: Any, *arguments: Any, **named: Any) -> Any:
        loss = original(trainer, *arguments, **named)
        return loss * factor(trainer.state.global_step + 1) if trainer.model.training == is_training else loss

    _in_trainer("compute_loss", compute_loss)


def nan_loss() -> None:
    """The loss of step 10 is NaN."""
    _loss_times(lambda step: float("nan") if step == HURT_STEP else 1.0)


def infinite_loss() -> None:
    """The loss of step 10 is infinite."""
    _loss_times(lambda step: float("inf") if step == HURT_STEP else 1.0)


def spiking_loss() -> None:
    """The loss is tenfold from step 10 to 12."""
    _loss_times(lambda step: 10.0 if HURT_STEP <= step < HURT_STEP + 3 else 1.0)


def nan_validation() -> None:
    """The held-out loss is NaN."""
    _loss_times(lambda step: float("nan"), is_training=False)


def nan_gradient() -> None:
    """The loss is sound and one gradient of step 10 is NaN."""
    steps = iter(range(1_000_000))  # the rehearsal is the first

    def hurt(model: Any) -> None:
        parameter = next(p for name, p in model.named_parameters() if ".lora_B." in name)
        parameter.register_hook(lambda gradient: gradient * float("nan") if next(steps) == HURT_STEP else gradient)

    _to_adapter(hurt)


def out_of_memory() -> None:
    """Any micro-batch of more than ROWS documents (1), from step FROM_STEP (0) on, does not fit."""
    rows, first = int(os.environ.get("ROWS", "1")), int(os.environ.get("FROM_STEP", "0"))

    def compute_loss(original: Any, trainer: Any, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        import torch

        if len(inputs["input_ids"]) > rows and trainer.state.global_step >= first:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (planted)")
        return original(trainer, model, inputs, *arguments, **named)

    _in_trainer("compute_loss", compute_loss)


def no_sample() -> None:
    """A sample answer does not fit into the GPU's memory."""
    from forge.training.train import callbacks

    def fails(*_: Any) -> None:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (planted)")

    callbacks.sample_answer = fails  # type: ignore[assignment]


def file_size_limit() -> None:
    """From the save of step 10 on no file may exceed 50,000 bytes: the kernel says EFBIG, as a full disk ENOSPC."""
    from forge.training.train.checkpoint import Saver

    def saving(original: Any, saver: Any, step: int) -> Any:
        if step >= HURT_STEP:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        return original(saver, step)

    _at(Saver, "saving", saving)


def no_room_for_checkpoints() -> None:
    """A checkpoint is said to take an exabyte."""
    from forge.training.train import checkpoint

    checkpoint.size_bytes = lambda *_: 10**18  # type: ignore[assignment]


def hasty_base() -> None:
    """The base `tiny` is trained for BASE_STEPS steps of few tokens."""
    from forge.training.models import base
    from forge.training.models.qwen2 import Recipe

    recipe = Recipe(int(os.environ["BASE_STEPS"]), batch=2, sequence=32, learning_rate=1e-3)
    base.STANDINS["tiny"] = base.Standin(base.TINY, recipe, "")


if __name__ == "__main__":
    globals()[sys.argv.pop(1).replace("-", "_")]()
    module = sys.argv.pop(1) if sys.argv[1].startswith(("forge.", "harness.")) else "forge.training"
    runpy.run_module(module, run_name="__main__", alter_sys=True)
