"""Claims about evaluations and merges that end early: told apart, nothing half-written, nothing left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.training.adapter import merge
from forge.training.evaluation import neutral_model
from forge.training.evaluation.evaluate import evaluate_run
from forge.training.system.errors import DiskError, ForgeError, GpuMemoryError, MachineError
from tests.support.tiny_model import shared_base
from tests.support.tiny_run import made_up_run

QUESTIONS = 300


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A completed run that held nothing out and asks for facts, more than a moment's work."""
    facts = [{"question": f"Who counts ship {number}?", "answer": "the keeper"} for number in range(QUESTIONS)]
    return made_up_run(tmp_path / "run", evaluation={"facts": facts, "max_new_tokens": 24})


def names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name != ".lock")


def gpu_runs_out(*_: Any, **__: Any) -> Any:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.\nmore")


def memory_runs_out(*_: Any, **__: Any) -> Any:
    import torch

    return torch.empty(1 << 46)  # PyTorch's own allocator says so


def array_runs_out(*_: Any, **__: Any) -> Any:
    import numpy

    return numpy.empty(1 << 56, dtype="u1")


EMPTY: dict[str, tuple[Callable[..., Any], type[ForgeError], int, str]] = {
    "GPU": (gpu_runs_out, GpuMemoryError, 5, r"out of GPU memory during {}: CUDA out of memory\. Tried .* free\.$"),
    "host, PyTorch": (memory_runs_out, MachineError, 4, "out of memory during {}: .*can't allocate memory"),
    "host, numpy": (array_runs_out, MachineError, 4, "out of memory during {}: "),
}


@pytest.mark.parametrize("name", EMPTY)
def test_the_memory_that_ran_out_is_named(run_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail, kind, code, complaint = EMPTY[name]
    before = names(run_dir)
    monkeypatch.setattr(neutral_model, "load_model", fail)
    with pytest.raises(kind, match=complaint.format("the evaluation").removesuffix("$")) as error:
        evaluate_run(run_dir, device="cpu")
    assert error.value.exit_code == code
    assert "\nmore" not in error.value.message
    monkeypatch.setattr(merge._Merger, "_merge", fail)
    with pytest.raises(kind, match=complaint.format("the merge").removesuffix("$")):
        merge.merge_adapter(shared_base(), run_dir / "adapter", run_dir / "merged")
    assert names(run_dir) == before


def test_a_merge_for_the_occasion_asks_for_room_first(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 10**6))
    before = names(run_dir)
    with pytest.raises(DiskError, match=r"the merge needs \d\.\d MB in .*, 1\.0 MB are free"):
        evaluate_run(run_dir, device="cpu", subjects=("merged",))
    assert names(run_dir) == before


STOPS: dict[str, tuple[list[int], int]] = {
    "SIGINT": ([signal.SIGINT], 130),
    "SIGTERM": ([signal.SIGTERM], 143),
    "SIGTERM twice": ([signal.SIGTERM] * 2, 143),
    "SIGKILL": ([signal.SIGKILL], -9),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["evaluate base", "evaluate merged"])
@pytest.mark.parametrize("name", STOPS)
def test_an_evaluation_stopped_by_a_signal_leaves_nothing(run_dir: Path, name: str, moment: str) -> None:
    numbers, code = STOPS[name]
    subject = moment.split()[1]
    before = names(run_dir)
    command = [sys.executable, "-m", "forge.training", "evaluate", str(run_dir), "--device", "cpu"]
    command += ["--subjects", subject]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = ""
    while moment not in seen:
        line = process.stderr.readline()
        assert line, f"it ended before: {seen}"
        seen += line
    if subject == "merged":
        assert list(run_dir.glob(".merged.*.part"))
    time.sleep(0.3)
    stopped = time.monotonic()
    for number in numbers:
        process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - stopped < 30
    assert process.returncode == code, said
    assert "Traceback" not in said
    if len(numbers) == 1 and code > 0:
        assert names(run_dir) == before
    assert not (run_dir / "evaluation.json").exists()
    record = json.loads((run_dir / "run.json").read_text())
    record["workload"]["evaluation"]["facts"] = record["workload"]["evaluation"]["facts"][:1]
    (run_dir / "run.json").write_text(json.dumps(record))
    evaluate_run(run_dir, device="cpu", subjects=(subject,))
    assert names(run_dir) == sorted([*before, "evaluation.json"])


def test_what_a_killed_evaluation_left_is_cleared_by_the_next(run_dir: Path) -> None:
    (run_dir / ".merged.abcdefgh.part" / "merged").mkdir(parents=True)
    (run_dir / ".evaluation.json.abcdefgh.part").write_text("{")
    before = [name for name in names(run_dir) if not name.endswith(".part")]
    with pytest.raises(MachineError):  # it comes to loading a model, and there is no such device
        evaluate_run(run_dir, device="cuda")
    assert names(run_dir) == before
