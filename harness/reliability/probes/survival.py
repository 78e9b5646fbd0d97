"""What becomes of runs that are killed, stopped or short of memory, on the machine and the stack at hand.

    python -m harness.reliability.probes.survival WORKLOAD --backend B [--cap-gib G] [--set ...] [--plan ...]

Side by side: two runs that nothing happens to, one that is killed in a step and one that is asked to stop; the
latter two then go on. All with deterministic kernels. Otherwise the compiler chooses among some kernels by timing
them on the GPU at hand: two processes may add in different orders, and a resumed run, being two processes, may
differ from a whole one as if a state had been lost.

With ``--cap-gib`` instead a single run whose micro-batches do not fit at first, with ``--stop-only`` a single one
that is asked to stop, for its seconds at real size. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forge.training.system.errors import ForgeError
from forge.training.train.checkpoint import problem
from forge.training.train.record import read_record
from forge.training.train.status import read_status
from harness.measurement.probe_main import add_settings, probe_main
from harness.reliability.probes.constrained_run import CAP, DETERMINISTIC, TRACE

_LIMIT_SECONDS = 500.0


class Runs:
    """Training processes of one workload, each in a directory of its own."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.folder, self.command = folder, command

    def start(self, name: str, *more: str, hindrance: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Begin, or go on with, the run of that name."""
        module = ["harness.reliability.probes.constrained_run", *hindrance] if hindrance else ["forge.training"]
        command = [sys.executable, "-m", *module, *self.command, *more, "-o", str(self.folder / name)]
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self, name: str, process: subprocess.Popen[bytes], expected: int) -> float:
        """Wait for its end. Returns the seconds. Raises :class:`ForgeError` unless it ended with that code."""
        started = time.monotonic()
        try:
            code = process.wait(timeout=_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        if code != expected:
            tail = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-1500:]
            raise ForgeError(f"the run {name!r} ended with {code}, not {expected}:\n{tail}")
        return time.monotonic() - started

    def steps_done(self, name: str) -> int:
        """Steps in a run's log."""
        try:
            return (self.folder / name / "steps.jsonl").read_text(encoding="utf-8").count('"loss"')
        except OSError:
            return 0

    def interrupt(self, name: str, process: subprocess.Popen[bytes], number: int, *, after_steps: int) -> float:
        """Send a signal after that many steps. Returns the seconds to its end."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        while self.steps_done(name) < after_steps and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        return self.wait(name, process, -number if number == signal.SIGKILL else 128 + number)


def survive(runs: Runs, after_steps: int) -> dict[str, Any]:
    """Reference twice, killed, stopped, resumed."""
    trace = runs.folder / "trace"
    same = (DETERMINISTIC,)
    whole = {"first": runs.start("first", hindrance=(TRACE, str(trace), *same))}
    whole["second"] = runs.start("second", hindrance=same)
    hurt = {name: runs.start(name, hindrance=same) for name in ("killed", "stopped")}
    runs.interrupt("killed", hurt["killed"], signal.SIGKILL, after_steps=after_steps)
    stop_seconds = runs.interrupt("stopped", hurt["stopped"], signal.SIGTERM, after_steps=after_steps)
    for name, process in whole.items():
        runs.wait(name, process, 0)
    resumed = {name: runs.start(name, hindrance=same) for name in hurt}
    for name, process in resumed.items():
        runs.wait(name, process, 0)
    found: dict[str, Any] = {
        "stop_seconds": stop_seconds,
        "noise": _difference(runs.folder / "first", runs.folder / "second"),
        "events": _events(trace),
    }
    for name in hurt:
        record = read_record(runs.folder / name)
        found[name] = {
            "difference": _difference(runs.folder / "first", runs.folder / name),
            "resumed_from_step": record.resumes[-1].step,
            "num_steps": record.num_steps,
            "same_labels": record.batch_digests == read_record(runs.folder / "first").batch_digests,
        }
    return found


def stop(runs: Runs, after_steps: int) -> dict[str, Any]:
    """One run, asked to stop: seconds from the signal to the end of the process, checkpoint sealed."""
    process = runs.start("stopped")
    seconds = runs.interrupt("stopped", process, signal.SIGTERM, after_steps=after_steps)
    status, record = read_status(runs.folder / "stopped"), read_record(runs.folder / "stopped")
    checkpoint = runs.folder / "stopped" / "checkpoints" / str(status.checkpoint)
    steps = _steps(runs.folder / "stopped")
    return {
        "stop_seconds": seconds,
        "state": status.state,
        "checkpoint_problem": problem(checkpoint),
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
        "step": record.num_steps,
        "last_step_seconds": steps[-1]["seconds"],
    }


def squeeze(runs: Runs, cap_gib: float) -> dict[str, Any]:
    """One run whose micro-batches do not fit at first."""
    runs.wait("tight", runs.start("tight", hindrance=(CAP, str(cap_gib))), 0)
    record = read_record(runs.folder / "tight")
    return {
        "cap_gib": cap_gib,
        "micro_batch": record.plan["micro_batch"],
        "resumes": [resume.model_dump() for resume in record.resumes],
        "num_steps": record.num_steps,
        "num_planned_steps": record.num_planned_steps,
        "documents": [line["documents"] for line in _steps(runs.folder / "tight")],
    }


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (run_dir / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line]


def _difference(one: Path, other: Path) -> dict[str, Any]:
    """Of two finished runs: adapters equal to the bit, else by how much; losses, and the first step that differs."""
    from safetensors.torch import load_file

    a, b = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, other))
    largest = max(float((a[name].float() - b[name].float()).abs().max()) for name in a)
    norm = sum(float(value.float().square().sum()) for value in a.values()) ** 0.5
    apart = sum(float((a[name].float() - b[name].float()).square().sum()) for name in a) ** 0.5
    losses = [(x["step"], x["loss"], y["loss"]) for x, y in zip(_steps(one), _steps(other), strict=True)]
    return {
        "identical": a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a),
        "largest": largest,
        "relative": apart / norm,
        "largest_loss": max(abs(x - y) for _, x, y in losses),
        "first_different_step": next((step for step, x, y in losses if x != y), None),
    }


def _events(trace: Path) -> list[str]:
    """The callbacks' order within each kind of step, once each: `begin substep ... end log save`."""
    kinds: dict[str, None] = {}
    step: list[str] = []
    for line in trace.read_text(encoding="utf-8").splitlines():
        name = line.split()[0].removeprefix("on_")
        if name == "step_begin" and step:
            kinds.setdefault(" ".join(step))
            step = []
        if step or name == "step_begin":
            step.append(name)
    kinds.setdefault(" ".join(step))
    return list(kinds)


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for, in a folder that is deleted afterwards."""
    command = ["train", options.workload, "--backend", options.backend]
    command += [part for setting in options.overrides for part in ("--set", setting)]
    command += [part for setting in options.plan_overrides for part in ("--plan", setting)]
    with tempfile.TemporaryDirectory(prefix="forge-survival-") as folder:
        runs = Runs(Path(folder), command)
        if options.stop_only:
            return stop(runs, options.after_steps)
        if options.cap_gib is not None:
            return squeeze(runs, options.cap_gib)
        return survive(runs, options.after_steps)


def main() -> int:
    """Print the findings as JSON."""
    parser = argparse.ArgumentParser(description="What becomes of runs that are killed, stopped or short of memory.")
    parser.add_argument("workload")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--after-steps", type=int, default=13)
    parser.add_argument("--cap-gib", type=float)
    parser.add_argument("--stop-only", action="store_true")
    add_settings(parser)
    return probe_main(parser, answer)


if __name__ == "__main__":
    sys.exit(main())
