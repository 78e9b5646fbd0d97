"""Faults planted into a real training process before it begins (``fault=`` of :mod:`tests.support.run_command`)."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from typing import Any

HURT_STEP = 10


def _at(owner: Any, name: str, then: Callable[..., Any]) -> None:
    """Call ``then(original, *arguments)`` in place of ``owner.name``."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: then(original, *a, **k))


def _changed_trainer(change: Callable[[type], type]) -> None:
    from forge.training.backends import trainer as loop

    _at(loop, "forge_trainer", lambda original, base: change(original(base)))


# --------------------------------------------------------------------------------------------------------------------
# As with a 4-bit base, which no CPU trains; and what only a resume executes


def adapter_in_bfloat16() -> None:
    """The adapter's weights are bfloat16, as TRL makes them for a 4-bit base."""
    from tests.support.planted_training import plant

    plant("bfloat16-adapter")


def adapter_in_bfloat16_and_killed() -> None:
    """The two of them."""
    adapter_in_bfloat16()
    kill_in_optimizer_file()


def no_code_for_a_resume() -> None:
    """Every function of :data:`harness.measurement.key.RESUMES` raises ``NotImplementedError``."""
    from harness.measurement.key import RESUMES

    def fails(self: Any, *_: Any, **__: Any) -> None:
        raise NotImplementedError("only a resumed run calls this")

    assert list(RESUMES) == ["backends/trainer.py"]
    _changed_trainer(
        lambda original: type("Changed", (original,), dict.fromkeys(RESUMES["backends/trainer.py"], fails))
    )


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
    """SIGKILL just before the ``$KILL_AT``-th change of the run's files after the first step; 0 counts them instead.

    Counted: files opened for writing, renamed, linked, deleted, copied, written by torch and safetensors.
    """
    import builtins

    import safetensors.torch
    import torch

    from forge.training.train.callbacks import StepCallback

    target, seen, begun = int(os.environ["KILL_AT"]), [0], [False]

    def count() -> None:
        if not begun[0]:
            return
        seen[0] += 1
        if seen[0] == target:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(original: Any, *arguments: Any, **named: Any) -> Any:
        count()
        return original(*arguments, **named)

    def opened(original: Any, path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if set(mode) & set("wax+"):
            count()
        return original(path, mode, *arguments, **named)

    def begin(original: Any, *arguments: Any, **named: Any) -> Any:
        begun[0] = True
        return original(*arguments, **named)

    for owner, name in (
        *((os, name) for name in ("replace", "link", "unlink", "rmdir", "mkdir")),
        *((shutil, "copyfile"), (torch, "save"), (safetensors.torch, "save_file")),
    ):
        _at(owner, name, counted)
    _at(builtins, "open", opened)
    _at(StepCallback, "on_step_end", begin)
    if target == 0:
        import atexit

        report = os.open(os.environ["KILL_COUNT"], os.O_WRONLY | os.O_CREAT)
        atexit.register(lambda: os.write(report, str(seen[0]).encode()))
        _at(os, "_exit", lambda original, code: (os.write(report, str(seen[0]).encode()), original(code)))


# --------------------------------------------------------------------------------------------------------------------
# Asked to stop


def ask_to_stop() -> None:
    """Send this process ``$STOP_SIGNAL`` (``$STOP_TIMES`` times) when it comes to ``$STOP_MOMENT``."""
    number, moment = int(os.environ["STOP_SIGNAL"]), os.environ["STOP_MOMENT"]
    times = int(os.environ.get("STOP_TIMES", "1"))
    asked = [0]

    def ask(original: Any, *arguments: Any, **named: Any) -> Any:
        if not asked[0]:
            asked[0] = 1
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(*arguments, **named)

    if moment == "tokenisation":
        from forge.training.data import inputs

        _at(inputs, "encode_records", ask)
    elif moment == "load":
        from forge.training.backends import trl

        _at(trl, "load_model", ask)
    elif moment == "save":
        import torch

        _at(torch, "save", ask)
    elif moment == "seal":
        from forge.training.train import checkpoint

        _at(checkpoint, "seal", ask)
    else:
        change = {"evaluation": "evaluate", "step": "training_step", "rehearsal": "rehearse"}[moment]

        def changed(trainer: type) -> type:
            original = getattr(trainer, change)
            return type("Stopped", (trainer,), {change: lambda self, *a, **k: ask(original, self, *a, **k)})

        _changed_trainer(changed)


# --------------------------------------------------------------------------------------------------------------------
# Numbers, memory, disk


def _loss_times(factor: Callable[[int], float]) -> None:
    def changed(trainer: type) -> type:
        original: Any = trainer.compute_loss  # type: ignore[attr-defined]

        def compute_loss(self: Any, *arguments: Any, **named: Any) -> Any:
            loss = original(self, *arguments, **named)
            return loss * factor(self.state.global_step + 1) if self.model.training else loss

        return type("Hurt", (trainer,), {"compute_loss": compute_loss})

    _changed_trainer(changed)


def nan_loss() -> None:
    """The loss of step 10 is NaN."""
    _loss_times(lambda step: float("nan") if step == HURT_STEP else 1.0)


def infinite_loss() -> None:
    """The loss of step 10 is infinite."""
    _loss_times(lambda step: float("inf") if step == HURT_STEP else 1.0)


def spiking_loss() -> None:
    """The loss is tenfold from step 10 to 12."""
    _loss_times(lambda step: 10.0 if HURT_STEP <= step < HURT_STEP + 3 else 1.0)


def nan_gradient() -> None:
    """The loss is sound and one gradient of step 10 is NaN."""
    from forge.training.backends import trainer as loop

    def initialise(original: Any, model: Any, seed: int) -> None:
        original(model, seed)
        parameter = next(p for name, p in model.named_parameters() if ".lora_B." in name)
        calls = [0]

        def hurt(gradient: Any) -> Any:
            calls[0] += 1
            return gradient * float("nan") if calls[0] == HURT_STEP + 1 else gradient  # the rehearsal is the first

        parameter.register_hook(hurt)

    _at(loop, "initialise_adapter", initialise)


def nan_validation() -> None:
    """The held-out loss is NaN."""

    def changed(trainer: type) -> type:
        original: Any = trainer.compute_loss  # type: ignore[attr-defined]

        def compute_loss(self: Any, *arguments: Any, **named: Any) -> Any:
            loss = original(self, *arguments, **named)
            return loss if self.model.training else loss * float("nan")

        return type("Hurt", (trainer,), {"compute_loss": compute_loss})

    _changed_trainer(changed)


def out_of_memory() -> None:
    """Any micro-batch of more than ``$ROWS`` documents, from step ``$FROM_STEP`` on, does not fit."""
    rows, first = int(os.environ.get("ROWS", "1")), int(os.environ.get("FROM_STEP", "0"))

    def changed(trainer: type) -> type:
        original: Any = trainer.compute_loss  # type: ignore[attr-defined]

        def compute_loss(self: Any, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            import torch

            if len(inputs["input_ids"]) > rows and self.state.global_step >= first:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (planted)")
            return original(self, model, inputs, *arguments, **named)

        return type("Hurt", (trainer,), {"compute_loss": compute_loss})

    _changed_trainer(changed)


def file_size_limit() -> None:
    """From the save of step 10 on no file may exceed 150,000 bytes: the kernel says EFBIG, as a full disk ENOSPC."""
    from forge.training.train.checkpoint import Saver

    def saving(original: Any, self: Any, step: int) -> Any:
        if step >= HURT_STEP:
            resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
        return original(self, step)

    _at(Saver, "saving", saving)


def no_room_for_checkpoints() -> None:
    """A checkpoint is said to take an exabyte."""
    from forge.training.train import checkpoint

    checkpoint.size_bytes = lambda *_: 10**18  # type: ignore[assignment]
