"""One run in a fresh process: every ending of a real child is an outcome, and nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.environment import ROOT
from forge.training.system.errors import MachineError
from harness.measurement import key
from harness.measurement.results import Outcome, RunSpec, Store
from harness.measurement.runner import run_once
from tests.support.fake_runs import SPEC, fake
from tests.support.processes import is_gone
from tests.support.tiny_model import write_base


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def python(code: str) -> Any:
    """A child that runs ``code``; ``sys.argv[1]`` is the run's directory."""
    return lambda spec, run_dir: [sys.executable, "-c", "import os, sys, signal, time\n" + code, str(run_dir)]


def run(store: Store, command: Any, **more: Any) -> Outcome:
    return run_once(SPEC, store=store, command=command, **{"time_limit_seconds": 60, "grace_seconds": 1, **more})


# A real training


@pytest.fixture(scope="module")
def tiny_spec(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    folder = tmp_path_factory.mktemp("gate")
    write_base(folder / "base", num_steps=5)
    rows = [{"instruction": f"Recite {i}", "input": "", "output": "It counts ships. " * (1 + i % 5)} for i in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.path": folder / "base",
        "data.train": folder / "train.jsonl",
        "data.validation_share": 0,
        "data.max_length": 128,
        "training.max_steps": 2,
        "training.evaluate_every_steps": "null",
        "report_to": "[]",
    }
    return RunSpec(backend="trl", workload="smoke", overrides=tuple(f"{k}={v}" for k, v in settings.items()))


# In every Python process of the run: write down, at its end, which modules of the project it holds.
SPY = """
import atexit, os, sys
def tell():
    names = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] in ("forge", "harness") and m.__file__]
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    with open(os.path.join(os.environ["SPY_FOLDER"], str(os.getpid())), "w") as stream:
        stream.write("\\n".join([*names, *([main] if main else [])]))
atexit.register(tell)
"""


def test_a_real_run_is_an_outcome_without_paths_and_loads_only_code_of_its_key(
    tiny_spec: RunSpec, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spy").mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SPY)
    monkeypatch.setenv("SPY_FOLDER", str(tmp_path / "spy"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    outcome = run_once(tiny_spec, store=store, time_limit_seconds=300)
    assert outcome.status == "completed", outcome.log_tail

    processes = list((tmp_path / "spy").iterdir())
    assert len(processes) >= 2  # `train`, and `base` that it starts
    loaded = {Path(line) for process in processes for line in process.read_text().splitlines()}
    training = ROOT / "forge" / "training"
    loaded = {path for path in loaded if path.is_relative_to(training)}
    assert {training / "train" / "run.py", training / "backends" / "trl.py", training / "models" / "base.py"} <= loaded
    assert loaded <= set(key.executed_files())

    assert outcome.record is not None
    assert outcome.record["status"] == "completed"
    assert outcome.record["base_path"] == outcome.record["workload"]["model"]["path"] == "base"
    assert outcome.record["workload"]["data"]["train"] == "train.jsonl"
    assert [line["step"] for line in outcome.steps] == [1, 2]
    assert outcome.record["batch_digests"] == [line["labels_sha256"] for line in outcome.steps]
    assert outcome.wall_seconds > sum(line["seconds"] for line in outcome.steps)
    assert "plan: smoke with trl" in outcome.log_tail
    stored = (store.directory / "runs" / f"{outcome.run_id}.json").read_text()
    assert Store(store.directory).read(outcome.run_id) == outcome
    for place in (ROOT, tmp_path, Path.home(), Path(tiny_spec.overrides[0].partition("=")[2]).parent):
        assert f"{place}/" not in stored
        assert f'{place}"' not in stored
    assert list(scratch.iterdir()) == []


@pytest.mark.slow  # alone takes as long as all the quick ones; these have exit code 7 from a quick child
def test_a_real_training_that_diverges_is_recorded_as_diverged(tiny_spec: RunSpec, store: Store) -> None:
    wild = ("optimizer.learning_rate=1e30", "optimizer.warmup_ratio=0.0", "optimizer.schedule=constant")
    spec = tiny_spec.model_copy(update={"overrides": (*tiny_spec.overrides, *wild)})
    outcome = run_once(spec, store=store, time_limit_seconds=300)
    assert (outcome.status, outcome.exit_code) == ("diverged", 7)
    assert outcome.record is not None
    assert outcome.record["status"] == "diverged"
    assert "step 2" in (outcome.message or "")


# Endings


def test_a_child_that_dies_of_memory_error_is_out_of_memory(store: Store) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28)); bytearray(1 << 30)"
    outcome = run(store, python(code))
    assert (outcome.status, outcome.exit_code, outcome.message) == ("out_of_memory", 1, "MemoryError")


def test_a_cuda_out_of_memory_in_a_crashs_log_is_out_of_memory(store: Store) -> None:
    said = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 18.57 GiB."
    outcome = run(store, python(f"os.write(2, b'{said}\\n'); os.abort()"))
    assert (outcome.status, outcome.exit_code, outcome.message) == ("out_of_memory", -signal.SIGABRT, said)


def test_exit_5_keeps_forges_own_record_of_it(store: Store) -> None:
    record = {"status": "out_of_memory", "message": "out of GPU memory: 18.57 GiB", "num_steps": 1}
    outcome = run(store, fake(record=record, exit_code=5))
    assert (outcome.status, outcome.message) == ("out_of_memory", "out of GPU memory: 18.57 GiB")
    assert outcome.record is not None
    assert outcome.record["num_steps"] == 1


def test_exit_7_is_a_divergence_with_its_record(store: Store) -> None:
    record = {"status": "diverged", "message": "step 2: the loss is nan", "num_steps": 1}
    outcome = run(store, fake(record=record, exit_code=7))
    assert (outcome.status, outcome.message) == ("diverged", "step 2: the loss is nan")


@pytest.mark.parametrize("code", [2, 3, 4, 6, 9])
def test_what_the_user_can_mend_is_refused_and_no_measurement(store: Store, code: int) -> None:
    outcome = run(store, python(f"sys.stderr.write('error: no such key\\n'); sys.exit({code})"))
    assert (outcome.status, outcome.exit_code, outcome.message) == ("refused", code, "no such key")


def test_a_bug_is_a_crash_with_its_last_line(store: Store) -> None:
    outcome = run(store, python("raise KeyError('weights')"))
    assert (outcome.status, outcome.message) == ("crashed", "exit code 1: KeyError: 'weights'")


def test_a_signal_is_a_crash_that_names_it(store: Store) -> None:
    outcome = run(store, python("os.kill(os.getpid(), signal.SIGSEGV)"))
    assert (outcome.status, outcome.exit_code, outcome.message) == ("crashed", -11, "SIGSEGV")


@pytest.mark.parametrize(
    "content", ['b\'{"status": "comp\'', "bytes(range(256)) * 99", "b'[' * 200000", "b'{}'", None], ids=str
)
def test_a_good_exit_without_a_readable_record_is_no_result(store: Store, content: str | None) -> None:
    write = f"open(sys.argv[1] + '/run.json', 'wb').write({content})" if content else "pass"
    outcome = run(store, python(write))
    assert (outcome.status, outcome.exit_code, outcome.record) == ("no_record", 0, None)
    assert "run.json" in (outcome.message or "")


def test_a_good_exit_with_the_record_of_a_running_run_is_no_result(store: Store) -> None:
    assert run(store, fake(record={"status": "running"})).status == "no_record"


def test_a_step_log_that_a_kill_cut_short_and_a_loss_that_is_no_number_are_read(store: Store) -> None:
    line = '{"step": 1, "seconds": 2.5, "loss": NaN, "where": "/home/me/x/y.txt"}\\n{"step": 2, "sec'
    code = f"open(sys.argv[1] + '/steps.jsonl', 'w').write('{line}'); sys.exit(1)"
    assert run(store, python(code)).steps == [{"step": 1, "seconds": 2.5, "loss": None, "where": "y.txt"}]


def test_a_hanging_child_is_killed_at_its_limit_with_its_grandchild(store: Store, tmp_path: Path) -> None:
    note = tmp_path / "pids"
    code = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(note)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(600)
"""
    started = time.monotonic()
    outcome = run(store, python(code), time_limit_seconds=1.5)
    assert (outcome.status, outcome.message) == ("timeout", "stopped after 1.5 seconds")
    assert time.monotonic() - started < 20
    assert all(is_gone(int(pid)) for pid in note.read_text().split())


def test_a_child_that_ignores_sigterm_is_killed(store: Store) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    outcome = run(store, python(code), time_limit_seconds=1.5, grace_seconds=0.5)
    assert (outcome.status, outcome.exit_code, outcome.log_tail) == ("timeout", -signal.SIGKILL, "deaf")


def test_what_a_child_leaves_running_is_killed_and_does_not_hold_the_gate_up(store: Store, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(note)!r}, "w").write(str(child.pid))
"""
    started = time.monotonic()
    run(store, python(code))
    assert time.monotonic() - started < 20
    assert is_gone(int(note.read_text()))


def test_megabytes_of_binary_noise_without_a_line_end_do_not_grow_memory(store: Store) -> None:
    code = "noise = bytes(b for b in range(256) if b != 10) * 4096\nfor _ in range(100): os.write(1, noise)"
    run(store, python("pass"))  # what is allocated once
    tracemalloc.start()
    outcome = run(store, python(code))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcome.exit_code == 0
    assert peak < 20 << 20  # of 100 MB; files are hashed in pieces of 8 MiB
    assert len(outcome.log_tail) <= 4000
    assert "\x1b" not in outcome.log_tail


def test_ctrl_c_kills_the_child_and_stores_nothing(store: Store, tmp_path: Path) -> None:
    note, driver = tmp_path / "pid", tmp_path / "driver.py"
    driver.write_text(f"""
import sys
from harness.measurement.results import RunSpec, Store
from harness.measurement.runner import run_once
code = "import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
spec = RunSpec(backend="trl", workload="smoke")
run_once(spec, store=Store({str(store.directory)!r}), command=lambda spec, run_dir: [sys.executable, "-c", code])
""")
    process = subprocess.Popen(
        [sys.executable, driver], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert is_gone(int(note.read_text()))
    assert store.run_ids() == []


def test_a_command_that_does_not_exist_is_the_machines_error(store: Store) -> None:
    with pytest.raises(MachineError, match="no-such-python cannot be started: No such file"):
        run(store, lambda spec, run_dir: ["no-such-python"])
    assert store.run_ids() == []


def test_code_that_changes_during_a_run_spoils_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("{}\n")
    spec = RunSpec(backend="trl", workload="smoke", overrides=(f"data.train={train}",))
    outcome = run_once(spec, store=store, command=python(f"open({str(train)!r}, 'a').write('{{}}')"))
    assert outcome.status == "refused"
    assert "workload.data.train_sha256" in (outcome.message or "")
