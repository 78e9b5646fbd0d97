"""What becomes of runs that are killed, stopped or short of memory, on this machine and with this backend.

    python -m harness.reliability.probes.survival WORKLOAD --backend B [--cap-gib G] [--set ...] [--plan ...]

Four runs side by side: two that nothing happens to, one that is killed in a step and one that is stopped. The last two
are then resumed. All have deterministic kernels. Without them the compiler chooses some kernels by timing them on this
GPU: two processes may add in different orders, and a resumed run, which is two processes, may then differ from a whole
one as if a state had been lost.

With ``--cap-gib`` instead a single run whose micro-batches do not fit at first. With ``--stop-only`` a single run that
is stopped, for its seconds at real size. Prints one JSON object; its keys are in harness/reliability/answers.py.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.training.system.errors import ForgeError
from forge.training.train.checkpoint import problem
from forge.training.train.record import read_record
from forge.training.train.status import read_status
from harness.measurement.probe_main import add_settings, probe_main
from harness.reliability.answers import Difference, LargeRun, Resumed, SmallRun, TightRun
from harness.reliability.probes.constrained_run import CAP, DETERMINISTIC, TRACE

_LIMIT_SECONDS = 500.0


@dataclass(frozen=True)
class Runs:
    """Training processes of one config, each in a directory of its own. ``command``: `train` and its arguments."""

    folder: Path
    command: Sequence[str]

    def start(self, name: str, *constraints: str) -> subprocess.Popen[bytes]:
        """Start or resume the run of that name. ``constraints``: options of :mod:`.constrained_run`."""
        module = ["harness.reliability.probes.constrained_run", *constraints] if constraints else ["forge.training"]
        command = [sys.executable, "-m", *module, *self.command, "-o", str(self.folder / name)]
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self, name: str, process: subprocess.Popen[bytes], expected: int, *, is_resumed: bool = False) -> float:
        """Wait for its end. Returns the seconds. Raises :class:`ForgeError` unless it ended with that code.

        The error has the run's own exit code: a full disk or a GPU in use says nothing about the run. But a resumed run
        that refuses to continue, for whatever cause, is a failure to resume (1), and so is any other end.
        """
        started = time.monotonic()
        try:
            code: int | None = process.wait(timeout=_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        if code != expected:
            tail = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-1500:]
            message = f"the run {name!r} ended with {code}, not {expected}:\n{tail}"
            own_code = code if code is not None and 0 < code < 10 and not is_resumed else 1
            raise ForgeError.of_child(own_code, message)
        return time.monotonic() - started

    def interrupt(self, name: str, process: subprocess.Popen[bytes], number: int, after_steps: int) -> float:
        """Send a signal after that many steps. Returns the seconds to its end."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        log = self.folder / name / "steps.jsonl"
        while process.poll() is None and time.monotonic() < deadline:
            if log.is_file() and log.read_text(encoding="utf-8").count('"loss"') >= after_steps:
                break
            time.sleep(0.01)
        process.send_signal(number)
        return self.wait(name, process, -number if number == signal.SIGKILL else 128 + number)


def survive(runs: Runs, after_steps: int) -> SmallRun:
    """Two whole runs, one killed and one stopped ``after_steps`` steps; then the last two resumed."""
    first, trace = runs.folder / "first", runs.folder / "trace"
    processes = {
        "first": runs.start("first", TRACE, str(trace), DETERMINISTIC),
        **{name: runs.start(name, DETERMINISTIC) for name in ("second", "killed", "stopped")},
    }
    runs.interrupt("killed", processes["killed"], signal.SIGKILL, after_steps)
    stop_seconds = runs.interrupt("stopped", processes["stopped"], signal.SIGTERM, after_steps)
    for name in ("first", "second"):
        runs.wait(name, processes[name], 0)
    resumed = {name: runs.start(name, DETERMINISTIC) for name in ("killed", "stopped")}
    for name, process in resumed.items():
        runs.wait(name, process, 0, is_resumed=True)
    return {
        "stop_seconds": stop_seconds,
        "noise": _difference(first, runs.folder / "second"),
        "events": _events(trace),
        "killed": _resumed(first, runs.folder / "killed"),
        "stopped": _resumed(first, runs.folder / "stopped"),
    }


def _resumed(whole: Path, resumed: Path) -> Resumed:
    record = read_record(resumed)
    return {
        "difference": _difference(whole, resumed),
        "resumed_from_step": record.resumes[-1].step,
        "num_steps": record.num_steps,
        "same_labels": record.batch_digests == read_record(whole).batch_digests,
    }


def stop(runs: Runs, after_steps: int) -> LargeRun:
    """One run, stopped after ``after_steps`` steps."""
    seconds = runs.interrupt("stopped", runs.start("stopped"), signal.SIGTERM, after_steps)
    run_dir = runs.folder / "stopped"
    status = read_status(run_dir)
    checkpoint = run_dir / "checkpoints" / str(status.checkpoint)
    return {
        "stop_seconds": seconds,
        "state": status.state,
        "checkpoint_problem": problem(checkpoint),
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
        "step": read_record(run_dir).num_steps,
        "last_step_seconds": _steps(run_dir)[-1]["seconds"],
    }


def squeeze(runs: Runs, cap_gib: float) -> TightRun:
    """One run whose micro-batches do not fit at first."""
    runs.wait("tight", runs.start("tight", CAP, str(cap_gib)), 0)
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


def _difference(one: Path, other: Path) -> Difference:
    """Of two finished runs, by their adapters and their losses."""
    from safetensors.torch import load_file

    a, b = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, other))
    errors = [a[name].float() - b[name].float() for name in a]
    norm, distance = (sum(float(x.float().square().sum()) for x in each) ** 0.5 for each in (a.values(), errors))
    losses = [(x["step"], x["loss"], y["loss"]) for x, y in zip(_steps(one), _steps(other), strict=True)]
    return {
        "identical": a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a),
        "largest": max(float(error.abs().max()) for error in errors),
        "relative": distance / norm,
        "largest_loss": max(abs(x - y) for _, x, y in losses),
        "first_different_step": next((step for step, x, y in losses if x != y), None),
    }


def _events(trace: Path) -> list[str]:
    """The callbacks' order within each kind of step, once each: `begin substep ... end log save`."""
    events = [line.split()[0].removeprefix("on_") for line in trace.read_text(encoding="utf-8").splitlines()]
    begins = [place for place, event in enumerate(events) if event == "step_begin"]
    steps = [events[begin:end] for begin, end in zip(begins, [*begins[1:], None], strict=True)]
    return list(dict.fromkeys(map(" ".join, steps)))


def answer(options: argparse.Namespace) -> SmallRun | LargeRun | TightRun:
    """What the options ask for, in a folder that is deleted afterwards."""
    command = ["train", options.workload, "--backend", options.backend]
    command += [f"--set={setting}" for setting in options.overrides]
    command += [f"--plan={setting}" for setting in options.plan_overrides]
    with tempfile.TemporaryDirectory(prefix="forge-survival-") as folder:
        runs = Runs(Path(folder), command)
        if options.stop_only:
            return stop(runs, options.after_steps)
        if options.cap_gib is not None:
            return squeeze(runs, options.cap_gib)
        return survive(runs, options.after_steps)


def main() -> int:
    """Print the answer as JSON."""
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
