"""Kill training and export at random moments, again and again, and compare what comes out: ``make soak``.

    python -m tests.support.random_kills [--kills 50] [--seed 0] [--out runs/soak/soak.json]

Every process is a fresh ``python -m forge.training``. A kill is SIGKILL or SIGTERM, in a step, a save, an evaluation
(of the run or after it), an export or the start of any of them; the same command then goes on. Whenever a run comes
to its end, its adapter and its GGUF files must be those of a run that nothing happened to, to the bit, nobody may be
left of the killed processes, and no half-written file. Exit code 8 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.training.system.environment import describe_environment
from forge.training.system.files import sha256_file, write_json
from forge.training.train.checkpoint import SEAL
from harness.measurement.key import code_sha256, resume_sha256
from tests.support.run_command import ROOT
from tests.support.tiny_run import arguments, write_inputs

NUM_STEPS = 60
_WHOLE = {"evaluate": "evaluation.json", "export": "export/SHA256SUMS"}  # there as soon as it is done, and whole
_POLL_SECONDS = 0.0005
_LIMIT_SECONDS = 300.0
_MORE = ("--set", f"training.max_steps={NUM_STEPS}", "--set", "data.max_length=256")


@dataclass(frozen=True)
class Kill:
    """One kill. ``signal`` is a name; ``exit_code`` what the process ended with; ``step``: done by then."""

    number: int
    command: str
    moment: str
    signal: str
    exit_code: int
    step: int
    resumed: str


class Soak:
    """``folder`` holds everything; ``announce`` is told a line a kill."""

    def __init__(self, folder: Path, num_kills: int, seed: int, announce: Callable[[str], None]) -> None:
        self.folder, self.num_kills, self.announce = folder, num_kills, announce
        self.random = random.Random(seed)
        self.kills: list[Kill] = []
        self.faults: list[str] = []
        self.num_runs = 0
        self.reference: dict[str, str] = {}
        self.code = _code()

    def run(self) -> None:
        """Make the reference, then kill until it is enough and the last run is whole."""
        write_inputs(self.folder)
        self.reference = self._whole(self.folder / "reference", is_killed=False)
        while len(self.kills) < self.num_kills:
            self.num_runs += 1
            out = self.folder / f"run-{self.num_runs}"
            found = self._whole(out, is_killed=True)
            self.faults += [
                f"{out.name}: {name} differs" for name in self.reference if found.get(name) != self.reference[name]
            ]
            left = [path.name for path in out.rglob(".*") if path.name != ".lock"]
            self.faults += [f"{out.name}: {name} is left" for name in left]
            shutil.rmtree(out)

    def _whole(self, out: Path, *, is_killed: bool) -> dict[str, str]:
        """Train, evaluate and export, killed on the way or not; the digests of what came out."""
        commands = {
            "train": arguments(self.folder, out, *_MORE),
            "evaluate": ["evaluate", str(out), "--subjects", "base,adapter"],
            "export": ["export", str(out), "--quant", "f16,q8_0"],
        }
        for name, command in commands.items():
            budget = {"train": 8, "evaluate": 2, "export": 4}[name] if is_killed else 0
            while True:
                is_next = budget > 0 and len(self.kills) < self.num_kills
                budget -= 1
                if is_next:
                    self._kill(name, command, out)
                    if name in _WHOLE and (out / _WHOLE[name]).exists():
                        break  # killed between its last file and its end: it would refuse to do it again
                if not is_next:
                    ended = self._start(command, out)
                    code = ended.wait(timeout=_LIMIT_SECONDS)
                    if code:
                        raise SystemExit(f"{name} in {out} ended with {code}:\n{self._log(out)[-3000:]}")
                    break
        digests = {"adapter": sha256_file(out / "adapter" / "adapter_model.safetensors")}
        for path in sorted((out / "export").glob("*.gguf")):
            digests[path.name] = sha256_file(path)
        return digests

    def _start(self, command: list[str], out: Path) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{out.name}.log", "ab") as log:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            return subprocess.Popen(
                [sys.executable, "-m", "forge.training", *command], stdout=log, stderr=log, env=environment
            )

    def _log(self, out: Path) -> str:
        return (self.folder / f"{out.name}.log").read_text(encoding="utf-8", errors="replace")

    def _kill(self, name: str, command: list[str], out: Path) -> None:
        """Start a command, kill it at a moment of its kind, and look for what is left of it."""
        number = self.random.choice([signal.SIGKILL, signal.SIGTERM])
        moments = {
            "train": ["start", "step", "step", "save", "save", "evaluation", "evaluation"],
            "evaluate": ["start", "middle"],
            "export": ["start", "middle", "middle", "middle"],
        }
        moment = self.random.choice(moments[name])
        before, started = _step_of(out), time.monotonic()
        process = self._start(command, out)
        self._wait(process, moment, out, before)
        process.send_signal(number)
        code = process.wait(timeout=_LIMIT_SECONDS)
        kill = Kill(
            number=len(self.kills) + 1,
            command=name,
            moment=moment,
            signal=number.name,
            exit_code=code,
            step=_step_of(out),
            resumed=f"from step {before}" if before else "",
        )
        if code == 0:
            return  # it was done before the signal came: no kill
        if code not in (-number, 128 + number):
            self.faults.append(f"kill {kill.number}: exit code {code} after {number.name}")
        time.sleep(0.3)  # a child that follows its parent is given a moment
        self.faults += [f"kill {kill.number}: process {pid} is left" for pid in _processes(out)]
        self.kills.append(kill)
        self.announce(
            f"{kill.number}/{self.num_kills}  {number.name:7} {name} {moment:10} at step {kill.step:2}, "
            f"{time.monotonic() - started:.1f} s, exit code {code}"
        )

    def _wait(self, process: subprocess.Popen[bytes], moment: str, out: Path, before: int) -> None:
        """Wait for the moment, or for the process to be done with it."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        target = before + self.random.randint(1, 14)

        def until(is_so: Callable[[], bool]) -> None:
            while not is_so() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)

        if moment == "start":
            time.sleep(self.random.uniform(0.0, 8.0))
        elif moment == "middle":
            time.sleep(self.random.uniform(3.0, 14.0))
        elif moment == "step":
            until(lambda: _step_of(out) >= target)
            time.sleep(self.random.uniform(0.0, 0.05))
        elif moment == "save":
            until(lambda: _step_of(out) >= target)
            until(lambda: any(not (path / SEAL).exists() for path in (out / "checkpoints").glob("checkpoint-*")))
            time.sleep(self.random.uniform(0.0, 0.02))
        else:
            due = -(-target // 8) * 8
            until(lambda: _step_of(out) >= due)
            time.sleep(self.random.uniform(0.0, 0.03))

    def describe(self, seconds: float) -> dict[str, Any]:
        """The record. ``code_sha256`` and ``resume_sha256``: of what its runs execute, as in the gate's keys."""
        if _code() != self.code:
            self.faults.append("the code was changed meanwhile")
        environment = describe_environment(with_torch=False)
        return {
            "what": "python -m tests.support.random_kills",
            **self.code,
            "num_kills": len(self.kills),
            "num_runs_completed": self.num_runs,
            "faults": self.faults,
            "seconds": round(seconds, 1),
            "kills_by": dict(Counter(f"{kill.signal} {kill.command} {kill.moment}" for kill in self.kills)),
            "reference": self.reference,
            "packages": environment.get("packages"),
            "kills": [vars(kill) for kill in self.kills],
        }


def _code() -> dict[str, str]:
    return {"code_sha256": code_sha256(), "resume_sha256": resume_sha256()}


def _step_of(out: Path) -> int:
    """The last step in the run's log."""
    try:
        return (out / "steps.jsonl").read_text(encoding="utf-8").count('"loss"')
    except OSError:
        return 0


def _processes(out: Path) -> list[int]:
    """Processes that name the run's directory, this one left out, and children of theirs that name a file of it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(out) in (path / "cmdline").read_bytes().decode(errors="replace") and int(path.name) != os.getpid():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def main() -> int:
    """See the module. 0: everything came out the same."""
    parser = argparse.ArgumentParser(description="Kill training and export at random moments and compare the end.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "soak" / "soak.json")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="forge-soak-") as folder:
        soak = Soak(Path(folder), options.kills, options.seed, lambda line: print(line, flush=True))
        soak.run()
    record = soak.describe(time.monotonic() - started) | {"seed": options.seed}
    write_json(options.out, record)
    print(f"{record['num_kills']} kills, {record['num_runs_completed']} runs, {len(soak.faults)} faults: {options.out}")
    for fault in soak.faults:
        print(f"  {fault}")
    return 8 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
