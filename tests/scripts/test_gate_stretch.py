"""A stretch of the gate on a machine that is taken away: what was measured is kept, whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from forge.training.system.environment import ROOT
from forge.training.system.errors import CheckError, DataError
from harness.measurement.results import Store

sys.path.insert(0, str(ROOT / "scripts" / "lab"))

import keep_gate

from tests.support import fake_interpreter


def write_store(folder: Path, **files: str) -> Path:
    """A store by its files: ``runs_a="1"`` is ``runs/a.json``."""
    for name, content in files.items():
        path = folder / f"{name.replace('_', '/', 1)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / ".lock").touch()
    return folder


def pack(store: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    with tarfile.open(out / "store.tar.gz", "w:gz") as archive:
        archive.add(store, arcname="store")


# What was committed is only added to


def test_a_kept_store_is_added_to_and_trials_follow_the_newer_one(tmp_path: Path) -> None:
    kept = write_store(tmp_path / "kept", runs_a="1", trials_t="old", trials_u="put away since")
    new = write_store(tmp_path / "new", runs_a="1", runs_b="2", trials_t="new", probes_p="3")
    assert keep_gate.add_store(new, kept) == 2
    assert keep_gate.files_of(kept) == keep_gate.files_of(new)


@pytest.mark.parametrize(
    ("new", "said"),
    [({"runs_b": "2"}, "1 that are not in the new store, as runs/a.json"), ({"runs_a": "2"}, "runs/a.json is another")],
)
def test_a_store_that_lacks_or_contradicts_a_run_is_refused_and_changes_nothing(
    tmp_path: Path, new: dict[str, str], said: str
) -> None:
    kept = write_store(tmp_path / "kept", runs_a="1")
    with pytest.raises(DataError, match=said):
        keep_gate.add_store(write_store(tmp_path / "new", **new), kept)
    assert keep_gate.files_of(kept) == {"runs/a.json": b"1"}


def test_records_that_git_would_leave_out_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As happened to the gate's first runs: a .gitignore that meant another folder."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    pack(write_store(tmp_path / "store", runs_a="1"), tmp_path / "out")
    folder = tmp_path / "docs" / "results" / "a-gate"
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    keep_gate.keep(tmp_path / "out", folder)
    (tmp_path / ".gitignore").write_text("runs/\n")
    with pytest.raises(CheckError, match=r"git ignores 1 of its files, as .*runs/a\.json") as caught:
        keep_gate.keep(tmp_path / "out", folder)
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_what_is_no_stretch_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"holds no store\.tar\.gz"):
        keep_gate.keep(tmp_path, tmp_path / "kept")
    (tmp_path / "store.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be unpacked"):
        keep_gate.keep(tmp_path, tmp_path / "kept")


# The stretch itself, with the gate's command line on stand-in arms


class Machine:
    """A machine with stand-in arms that keeps nothing but what is in ``out``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_stretches = folder, 0
        self.train = folder / "train.jsonl"
        self.train.write_text('{"instruction": "Say it.", "input": "", "output": "It."}\n')
        self.arms = fake_interpreter.install(folder)

    def stretch(self, *options: str, **variables: str) -> subprocess.Popen[bytes]:
        """Begin one on a bare machine; its output is in ``out``, a folder of its own."""
        self.num_stretches += 1
        environment = {
            **os.environ,
            **self.arms,
            "GATE_MODEL": "qwen2-7b",
            "BUNDLE": "none",
            "LIMIT": "500",
            **variables,
        }
        environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment |= {"FORGE_WORK": str(self.folder / f"work{self.num_stretches}")}
        environment |= {"ARM_USED": str(self.folder / f"used{self.num_stretches}")}  # a killed arm leaves its figure
        command = ["bash", "scripts/lab/gate_stretch.sh", str(self.out), str(self.train), "perf", "--"]
        command += ["-p", "tests.support.fake_gpu", "-p", "no:cacheprovider", "--gate-only", "genome_full", *options]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    @property
    def out(self) -> Path:
        return self.folder / f"out{self.num_stretches}"

    def kept(self) -> list[str]:
        """The runs in the archive that came back, oldest first."""
        place = self.folder / f"unpacked{self.num_stretches}"
        return Store(keep_gate.unpack_store(self.out / "store.tar.gz", place)).run_ids()

    def wait_for_runs(self, number: int) -> None:
        """Until the archive holds so many."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if (self.out / "store.tar.gz").exists():
                with tarfile.open(self.out / "store.tar.gz") as archive:
                    if sum("/runs/" in name for name in archive.getnames()) >= number:
                        return
        raise AssertionError((self.out / "gate.log").read_text()[-2000:])


def write_benchmark(path: Path, verdicts: dict[str, str], gpu: str = "NVIDIA H200") -> Path:
    told = {"extra_info": {"metric": "none", "unit": "none", "record_kind": "claim"}, "stats": {"median": 1.0}}
    entries = [{"fullname": f"harness/{name}", "verdict": verdict, **told} for name, verdict in verdicts.items()]
    machine = {"gpu": {"name": gpu}, "torch": "2.11.0"}
    path.write_text(json.dumps({"machine_info": machine, "datetime": "2026-11-25", "benchmarks": entries}))
    return path


def test_a_gate_carried_out_one_suite_at_a_time_keeps_every_suites_latest_verdicts(tmp_path: Path) -> None:
    first = {"perf/test_claims.py::test_fast": "PASS", "parity/test_ladder.py::test_rung": "INCOMPLETE"}
    kept = write_benchmark(tmp_path / "kept.json", first)
    new = write_benchmark(tmp_path / "new.json", {"parity/test_ladder.py::test_rung": "PASS"})
    assert keep_gate.join_benchmarks(new, kept) == ["harness/perf"]
    verdicts = {entry["fullname"]: entry["verdict"] for entry in json.loads(kept.read_bytes())["benchmarks"]}
    assert verdicts == {f"harness/{name}": "PASS" for name in first}
    other = write_benchmark(tmp_path / "other.json", {"perf/test_claims.py::test_fast": "FAIL"}, gpu="NVIDIA H100")
    with pytest.raises(DataError, match="made with NVIDIA H100, torch"):
        keep_gate.join_benchmarks(other, kept)


def test_a_benchmark_json_that_is_cut_short_is_one_message_and_the_kept_one_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path / "store", runs_a="1")
    with tarfile.open(tmp_path / "store.tar.gz", "w:gz") as packed:
        packed.add(tmp_path / "store", "store")
    (tmp_path / "benchmark.json").write_text('{"benchmarks": [{"full')
    kept = write_benchmark(tmp_path / "kept.json", {"perf/test_claims.py::test_fast": "PASS"})
    (tmp_path / "kept").mkdir()
    before = kept.rename(tmp_path / "kept" / "benchmark.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["keep_gate.py", str(tmp_path), str(tmp_path / "kept")])
    assert keep_gate.main() == 3
    assert capsys.readouterr().err.startswith("error: ")
    assert (tmp_path / "kept" / "benchmark.json").read_bytes() == before


def test_a_store_of_another_gpu_is_refused_before_anything_is_measured_anew(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", runs_a='{"key_parts": {"gpu": "NVIDIA Other"}}')
    (tmp_path / "sitecustomize.py").write_text("import tests.support.fake_gpu\n")
    (tmp_path / "train.jsonl").touch()
    seen = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment = {**os.environ, **seen, "FORGE_WORK": str(tmp_path / "work"), "BUNDLE": "none", "STORE": str(store)}
    command = ["bash", "scripts/lab/gate_stretch.sh", str(tmp_path / "out"), str(tmp_path / "train.jsonl"), "perf"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 4, done.stderr
    log = (tmp_path / "out" / "gate.log").read_text()
    assert 'this GPU is "NVIDIA Test", the store is of "gpu": "NVIDIA Other": nothing in it would count' in log


@pytest.mark.slow
def test_stretches_that_are_stopped_and_killed_lose_nothing_that_was_measured(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    stopped = machine.stretch()
    machine.wait_for_runs(1)
    stopped.terminate()
    assert stopped.wait(60) == 143
    first = machine.kept()
    assert first
    log = (machine.out / "gate.log").read_text()
    assert "KeyboardInterrupt" in log, "what ran was interrupted, not left to itself"

    killed = machine.stretch(STORE=str(machine.out / "store.tar.gz"))
    machine.wait_for_runs(len(first) + 2)
    killed.kill()
    killed.wait(60)
    second = machine.kept()
    assert second[: len(first)] == first
    time.sleep(5)  # until what it left has noticed

    done = machine.stretch(STORE=str(machine.out / "store.tar.gz"))
    assert done.wait(200) == 1, "the claims of the other trials are INCOMPLETE"
    third = machine.kept()
    assert third[: len(second)] == second
    assert len(third) <= 10 + 2, "at most one lone half of a pair for each interruption was measured twice"
    assert sorted(path.name for path in machine.out.iterdir()) == [
        *("benchmark.json", "gate.log", "report.html", "report.md", "store.tar.gz")
    ]
    report = (machine.out / "report.md").read_text()
    assert "4 of 6 claims passed" in report


@pytest.mark.slow
def test_a_run_that_hangs_ends_the_stretch_in_time_and_what_was_measured_is_reported(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    first = machine.stretch()
    machine.wait_for_runs(2)
    first.send_signal(signal.SIGTERM)
    first.wait(60)
    before = machine.kept()
    started = time.monotonic()
    hung = machine.stretch(STORE=str(machine.out / "store.tar.gz"), ARM_HANGS="legacy", LIMIT="110")
    assert hung.wait(150) == 2
    assert time.monotonic() - started < 110
    assert machine.kept()[: len(before)] == before
    assert "pairs measured" in (machine.out / "report.md").read_text()
