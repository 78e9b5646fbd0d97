"""Probes as processes: what they say without a GPU, and that nothing is measured twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.environment import ROOT
from forge.training.system.errors import ForgeError
from harness.measurement import probe as probes
from harness.measurement.results import RunSpec, Store


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["harness.perf.probes.matmul_peak"], 4, "CUDA GPU"),
        (
            ["harness.perf.probes.max_context", "genome_full", "--backend", "trl", "--budget", "8", "--lengths", "8"],
            2,
            "two or more rising",
        ),
        (
            ["harness.perf.probes.max_context", "genome_full", "--backend", "trl", "--budget", "0"],
            2,
            "an amount above 0",
        ),
        (
            ["harness.perf.probes.max_context", "genome_full", "--backend", "trl", "--budget", "nan"],
            2,
            "an amount above 0",
        ),
        (
            ["harness.perf.probes.max_context", "genome_full", "--backend", "trl", "--budget", "8", "--lengths", "8,x"],
            2,
            "takes numbers",
        ),
        (["harness.perf.probes.max_context", "nothing", "--backend", "trl", "--budget", "8"], 2, "'nothing'"),
        (["harness.perf.probes.max_context", "smoke", "--backend", "trl", "--budget", "8"], 4, "CUDA GPU"),
    ],
)
def test_a_probe_says_what_is_wrong_in_one_line(arguments: list[str], code: int, said: str) -> None:
    command = [sys.executable, "-m", arguments[0], *arguments[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def interpreter(where: Path, body: str) -> str:
    """A Python for the probes that appends to a file whenever a probe is started and then does ``body``."""
    path = where / "python"
    asked = f'case "$*" in *probes*) echo started >> {where}/started; {body};; *) exec {sys.executable} "$@";; esac'
    path.write_text(f"#!/bin/sh\n{asked}\n")
    path.chmod(0o755)
    return str(path)


def run(store: Store, arguments: tuple[str, ...] = (), seconds: float = 20) -> dict[str, Any] | None:
    return probes.run_probe("harness.perf.probes.matmul_peak", "trl", arguments, store, time_limit_seconds=seconds)


def test_a_probe_is_stored_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """echo warming up; echo '{"tflops": 700.0}'"""
    monkeypatch.setenv("FORGE_GPU_PYTHON", interpreter(tmp_path, body))
    store = Store(tmp_path / "store")
    first, again = run(store), run(store)
    assert first is not None
    assert first["tflops"] == 700.0
    assert again == first
    run(store, ("--other",))
    assert (tmp_path / "started").read_text().count("started") == 2


def test_a_probe_that_trains_is_measured_again_when_its_plan_or_its_documents_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_GPU_PYTHON", interpreter(tmp_path, """echo '{"tflops": 700.0}'"""))
    store, documents = Store(tmp_path / "store"), tmp_path / "train.jsonl"
    works = [
        RunSpec(backend="trl", workload="genome_full", overrides=(f"data.train={documents}",), plan_overrides=plan)
        for plan in ((), ("micro_batch=2",))  # the same arguments, as when NAME.plans.yaml has changed
    ]

    def num_measured(work: RunSpec) -> int:
        probes.run_probe("harness.perf.probes.matmul_peak", "trl", (), store, time_limit_seconds=20, work=work)
        return (tmp_path / "started").read_text().count("started")

    documents.write_text('{"instruction": "Say it.", "input": "", "output": "It."}\n')
    assert [num_measured(work) for work in (*works, *works)] == [1, 2, 2, 2]
    documents.write_text('{"instruction": "Say it.", "input": "", "output": "That."}\n')
    assert [num_measured(work) for work in works] == [3, 4]


@pytest.mark.parametrize(
    ("body", "code"),
    [("echo '{}'; exit 1", 1), ("echo no json", 1), ("exit 0", 1), ("echo full >&2; exit 6", 6), ("exec sleep 60", 1)],
)
def test_a_probe_that_fails_is_an_error_with_its_exit_code_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, code: int
) -> None:
    """One that was stopped at its limit was not interrupted."""
    monkeypatch.setenv("FORGE_GPU_PYTHON", interpreter(tmp_path, body))
    store = Store(tmp_path / "store")
    with pytest.raises(ForgeError, match="the matmul_peak probe of trl failed") as caught:
        run(store, seconds=2)
    assert caught.value.exit_code == code
    assert not list((tmp_path / "store").rglob("*.json"))
