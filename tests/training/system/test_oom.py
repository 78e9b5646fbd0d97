"""Running out of memory: however a library says it, it is the same error in every command."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.training.adapter import merge
from forge.training.config.workload import Workload
from forge.training.evaluation import neutral_model
from forge.training.evaluation.evaluate import evaluate_run
from forge.training.llamacpp import converter
from forge.training.system.errors import ForgeError
from forge.training.system.oom import GPU_PHRASES, HOST_PHRASES, memory_that_ran_out, smaller_micro_batch
from forge.training.train import run
from tests.support.tiny_model import shared_adapter, shared_base
from tests.support.tiny_run import made_up_run


def pytorchs_own() -> Exception:
    import torch

    return torch.OutOfMemoryError()  # without a word


def numpys_own() -> Exception:
    import numpy

    try:
        numpy.empty(1 << 56, dtype="u1")
    except MemoryError as error:
        return error
    raise AssertionError("a machine of 64 PiB")


ERRORS: dict[str, tuple[Callable[[], Exception], int]] = {
    **{phrase: (lambda phrase=phrase: RuntimeError(f"{phrase}. Planted.\nmore"), 5) for phrase in GPU_PHRASES},
    "PyTorch's OutOfMemoryError": (pytorchs_own, 5),
    **{phrase: (lambda phrase=phrase: RuntimeError(f"{phrase}. Planted.\nmore"), 4) for phrase in HOST_PHRASES},
    "ENOMEM": (lambda: OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), 4),
    "MemoryError": (MemoryError, 4),
    "NumPy's MemoryError": (numpys_own, 4),
}


def train(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(run, "base_directory", lambda _: shared_base())
    monkeypatch.setattr(run, "build_trainer", fails)
    rows = [{"instruction": f"Recite {number}.", "input": "", "output": "It counts ships."} for number in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"train": str(folder / "train.jsonl"), "max_length": 128}
    workload = Workload.model_validate({"name": "w", "data": data, "report_to": []})
    listener = run.Listener(lambda _: None, lambda *_: None, lambda *_: None)
    try:
        run.train(workload, "trl", [], folder / "trained", listener)
    finally:
        status = json.loads((folder / "trained" / "status.json").read_text())
        record = json.loads((folder / "trained" / "run.json").read_text())
        assert (record["status"], record["message"]) == (status["state"], status["message"])
        assert (status["state"], status["exit_code"]) in (("out_of_memory", 5), ("failed", 4))


def evaluate(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    made_up_run(folder / "run", evaluation={"facts": [{"question": "Who?", "answer": "I"}]})
    monkeypatch.setattr(neutral_model, "load_model", fails)
    evaluate_run(folder / "run", device="cpu")


def merge_weights(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(merge._Merger, "_merge", fails)
    merge.merge_adapter(shared_base(), shared_adapter(), folder / "merged")


def convert(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise error

    converter._call(fails, "the model", str(folder / "model.gguf"))


COMMANDS = {"train": train, "evaluate": evaluate, "merge": merge_weights, "convert": convert}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_memory_has_the_same_exit_code_in_every_command(
    tmp_path: Path, error: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, code = ERRORS[error]
    raised = make()
    with pytest.raises(ForgeError, match="out of GPU memory" if code == 5 else "out of memory") as caught:
        COMMANDS[command](tmp_path, raised, monkeypatch)
    assert caught.value.exit_code == code
    assert caught.value.remedy
    assert "more" not in caught.value.message.split()
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize("error", ERRORS)
def test_the_end_of_a_log_is_judged_as_the_error_is(error: str) -> None:
    make, code = ERRORS[error]
    raised = make()
    name = f"{type(raised).__module__}.{type(raised).__name__}".removeprefix("builtins.")
    log = f"step 3/9\nTraceback (most recent call last):\n{name}: {raised}\n"
    assert memory_that_ran_out(log) == ("GPU" if code == 5 else "host")


@pytest.mark.parametrize(
    "other",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
        ValueError("the record says MemoryError"),
        "error: the GPU's memory does not suffice\n",
    ],
    ids=str,
)
def test_another_error_about_memory_is_not_taken_for_it(other: Exception | str) -> None:
    assert memory_that_ran_out(other) is None


def test_a_smaller_micro_batch_divides_the_effective_batch() -> None:
    assert [smaller_micro_batch(size, 12) for size in (12, 6, 4, 3, 2, 1)] == [6, 3, 2, 1, 1, None]
