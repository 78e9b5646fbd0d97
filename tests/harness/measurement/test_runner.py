"""One run in a fresh process: every ending of a real child is an outcome, and nothing of it stays behind."""

from __future__ import annotations

import ast
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
from forge.training.system.errors import DataError, DiskError, LockedError, MachineError
from harness.measurement import environment as arms
from harness.measurement import key as identity
from harness.measurement.gpu_monitor import GpuMonitor, machine_id, wait_until_free
from harness.measurement.process import run_process
from harness.measurement.redact import log_tail, portable, without_paths
from harness.measurement.results import Outcome, RunSpec, Store
from harness.measurement.runner import run_once
from tests.support.fake_training import OTHER, SPEC, fake, make_record
from tests.support.tiny_model import write_base


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def python(code: str) -> Any:
    """A child that runs ``code``; ``sys.argv[1]`` is the run's directory."""
    return lambda spec, run_dir: [sys.executable, "-c", "import os, sys, signal, time\n" + code, str(run_dir)]


def run(store: Store, command: Any, **more: Any) -> Outcome:
    return run_once(SPEC, store=store, command=command, **{"time_limit_seconds": 60, "grace_seconds": 1, **more})


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and was not yet waited for by init does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


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
    loaded = {path.relative_to(identity.TRAINING) for path in loaded if path.is_relative_to(identity.TRAINING)}
    assert {Path("train/run.py"), Path("backends/trl.py"), Path("models/base.py")} <= loaded
    assert loaded <= set(identity.measured_files())

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


def imports_of(path: Path) -> set[Path]:
    """Modules of forge.training that a file imports anywhere, in functions too, as paths below forge/training."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("forge.training"):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")[2:] if name.startswith("forge.training") else []
            found |= (
                {Path(*parts[:n], "__init__.py") for n in range(len(parts) + 1)} if name.startswith("forge.") else set()
            )
            found |= {Path(*parts).with_suffix(".py")} if parts else set()
    return {name for name in found if (identity.TRAINING / name).is_file()}


def closure_of(starts: list[str], without: tuple[str, ...] = ()) -> set[Path]:
    closure: set[Path] = set()
    waiting = {Path(start) for start in starts}
    while waiting:
        path = waiting.pop()
        closure.add(path)
        if path.as_posix() not in ("cli.py", *without):  # imports inside each command: those that run are in `starts`
            waiting |= imports_of(identity.TRAINING / path) - closure
    return closure


def test_whatever_a_run_could_import_is_in_the_key() -> None:
    """Including what no run here does: Unsloth's side, Qwen2's tokenizer rebuilt."""
    starts = ["__main__.py", "train/run.py", "train/display.py", "models/base.py", "config/workload.py"]
    starts += [f"backends/{name}.py" for name in ("__init__", "legacy", "trl", "unsloth")]
    measured, making = set(identity.measured_files()), set(identity.measured_files(makes_corpus=True))
    closure = closure_of(starts)
    assert closure <= measured | making
    assert making <= closure
    assert Path("llamacpp/native.py") in closure
    assert Path("evaluation/evaluate.py") not in measured | making
    # a run that is given its corpus reaches the maker of corpora by one import, and does not make it
    given = closure_of(starts, without=("data/corpus.py",))
    assert given & making == {Path("data/corpus.py")}


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
    assert all(gone(int(pid)) for pid in note.read_text().split())


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
    assert gone(int(note.read_text()))


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
    assert gone(int(note.read_text()))
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


# The GPU, by a probe put in its place


def state(others: int = 0, used: int = 1 << 28, reasons: tuple[str, ...] = (), clock: int = 1980) -> dict[str, Any]:
    return {
        "num_other_processes": others,
        "memory_used_bytes": used,
        "throttle_reasons": list(reasons),
        "sm_clock_mhz": clock,
        "temperature_celsius": 40 + others,
        "power_watts": 300.0,
    }


class Probe:
    """Answers its states one after the other, then the last for ever."""

    def __init__(self, *states: dict[str, Any]) -> None:
        self.states = list(states)

    def __call__(self) -> dict[str, Any]:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]


def test_a_gpu_in_use_is_not_measured_on() -> None:
    with pytest.raises(MachineError, match="not free: 1 other process on it"):
        wait_until_free(Probe(state(others=1)), patience_seconds=0)
    with pytest.raises(MachineError, match=r"not free: 3\.0 GiB of its memory"):
        wait_until_free(Probe(state(used=3 << 30)), patience_seconds=0)
    assert wait_until_free(Probe(state(others=1), state()), patience_seconds=0.05) == state()


def test_a_foreign_process_during_a_run_is_a_refusal_with_the_reason(store: Store) -> None:
    probe = Probe(state(), state(), state(others=1), state(others=3, used=9 << 30), state(others=1))
    outcome = run(store, fake(sleep=1.5), probe=probe)
    assert outcome.status == "refused"
    assert outcome.message == "met a foreign process on the GPU (at most 2 at a time)"
    assert outcome.monitor.num_foreign_processes_max == 2


def test_the_runs_own_process_is_not_foreign_and_the_figures_are_those_under_load(store: Store) -> None:
    samples = [state(others=1, clock=1700, used=7 << 30, reasons=("power cap",)), state(others=1, clock=1500)]
    probe = Probe(state(), state(clock=200, reasons=("idle",)), *samples)
    outcome = run(store, fake(sleep=1.0), probe=probe)
    assert outcome.status == "completed"
    seen = outcome.monitor
    assert (seen.device_used_before_bytes, seen.device_used_peak_bytes) == (1 << 28, 7 << 30)
    assert (seen.sm_clock_mhz_min, seen.sm_clock_mhz_median) == (1500, 1500)
    assert (seen.throttle_reasons, seen.num_foreign_processes_max) == (["power cap"], 0)
    assert seen.disturbed_share == 0
    assert seen.num_samples >= 3


def test_without_a_gpu_nothing_is_guessed(store: Store) -> None:
    with GpuMonitor(lambda: None) as monitor:
        time.sleep(0.3)
    seen = monitor.summary()
    assert (seen.num_samples, seen.device_used_peak_bytes, seen.num_foreign_processes_max) == (0, None, None)


def test_a_machine_is_told_from_others_by_a_name_that_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = machine_id()
    assert first == machine_id()
    assert len(first) == 16
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert machine_id() != first


# Keys


def test_equal_measurements_have_equal_keys_wherever_their_files_lie(tmp_path: Path) -> None:
    keys = []
    for name, content in (("one", "{}\n"), ("two", "{}\n"), ("three", "{ }\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(content)
        spec = RunSpec(backend="trl", workload="smoke", overrides=(f"data.train={tmp_path / name / 'train.jsonl'}",))
        keys.append(identity.identify(spec))
    assert keys[0].key == keys[1].key != keys[2].key
    assert len(identity.explain(keys[0].parts, keys[2].parts)) == 1
    assert identity.explain(keys[0].parts, keys[2].parts)[0].startswith("workload.data.train_sha256: ")
    assert str(tmp_path) not in json.dumps(keys[0].parts)


def test_a_key_changes_with_plan_packages_settings_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity.identify(SPEC)
    assert {line.partition(":")[0] for line in identity.explain(before.parts, identity.identify(OTHER).parts)} == {
        "plan.micro_batch",
        "spec.plan_overrides",
    }
    assert before.parts["packages"]["trl"] is not None
    monkeypatch.setattr(identity, "describe_gpu", lambda: {"name": "Some GPU"})
    monkeypatch.setattr(identity, "settings", lambda: {**arms.settings(), "OMP_NUM_THREADS": "77"})
    monkeypatch.setattr(identity, "_ask_versions", lambda python, path: {**before.parts["packages"], "trl": "0.0"})
    lines = identity.explain(before.parts, identity.identify(SPEC).parts)
    assert [line.partition(":")[0] for line in lines] == ["gpu", "packages.trl", "settings.OMP_NUM_THREADS"]


def test_only_what_is_measured_is_in_the_codes_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "TRAINING", tmp_path)
    for name in ("backends/trainer.py", "export/card.py", "models/weights.py", "data/embedded/a.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a = 1\n")
    before = identity.code_sha256()
    for name in ("export/card.py", "data/embedded/a.md"):
        (tmp_path / name).write_text("a = 2\n")
    assert identity.code_sha256() == before
    (tmp_path / "backends" / "trainer.py").write_text("a = 2\n")
    assert identity.code_sha256() != before


def test_code_for_a_resume_is_in_the_key_of_what_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "TRAINING", tmp_path)
    source = "class T:\n    def step(self):\n        return 1\n\n{}    def last(self):\n        return 2\n"
    resumed = (
        '    @of(\n        1\n    )\n    def _load_from_checkpoint(self):\n        """Do it."""\n        return {}\n\n'
    )
    found = []
    (tmp_path / "backends").mkdir()
    for text in (source.format(""), source.format(resumed.format(1)), source.format(resumed.format(2))):
        (tmp_path / "backends" / "trainer.py").write_text(text)
        found.append((identity.code_sha256(), identity.resume_sha256()))
    assert len({code for code, _ in found}) == 1
    assert len({resume for _, resume in found}) == 3
    (tmp_path / "backends" / "trainer.py").write_text(source.format(resumed.format(2) + "    x = 1\n"))
    assert identity.code_sha256() != found[0][0]


def test_a_run_that_is_given_its_corpus_does_not_depend_on_how_corpora_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("{}\n")
    given = RunSpec(backend="trl", workload="smoke", overrides=(f"data.train={train}",))
    before = [identity.identify(spec).key for spec in (given, SPEC)]
    real = identity.code_sha256_of
    monkeypatch.setattr(identity, "code_sha256_of", lambda path: "0" if path.name == "corpus.py" else real(path))
    after = [identity.identify(spec).key for spec in (given, SPEC)]
    assert after[0] == before[0]
    assert after[1] != before[1], "the demo makes its corpus itself"


SOURCE = '''"""What this is for."""

LIMIT = 3  # of them


class Thing:
    """A thing."""

    def work(self) -> str:
        """Do it.

        In two paragraphs.
        """
        # with care
        return f"# no remark {LIMIT}"
'''


def test_a_remark_voids_no_measurement_and_a_statement_does(tmp_path: Path) -> None:
    path = tmp_path / "loop.py"

    def digest(source: str) -> str:
        path.write_text(source)
        return identity.code_sha256_of(path)

    before = digest(SOURCE)
    for old, new in {
        "What this is for": "What it is for, and why",
        "# of them": "# of those",
        "In two paragraphs.": "In three\n\n        paragraphs.",
        "        # with care\n": "\n",
        '    """A thing."""\n': "",
    }.items():
        assert old in SOURCE
        assert digest(SOURCE.replace(old, new)) == before, old
    for old, new in {
        "LIMIT = 3": "LIMIT = 4",
        "# no remark": "# a remark",
        "        return": "        return None\n        return",
        "    def work": "    def play",
        '    """A thing."""': '    """A thing."""; work = 1',
        "        # with care\n": '        "a string that is no docstring"\n',
    }.items():
        assert old in SOURCE
        assert digest(SOURCE.replace(old, new)) != before, old
    with pytest.raises(DataError, match=r"loop\.py is no Python"):
        digest("def f(:\n")


def test_another_base_in_the_same_place_is_another_measurement(tmp_path: Path) -> None:
    spec = RunSpec(backend="trl", workload="smoke", overrides=(f"model.path={tmp_path}",))
    weights = bytearray(os.urandom(1 << 20) * 8)
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = identity.identify(spec).key
    assert identity.identify(spec).key == before
    weights[:] = bytes(255 - b for b in weights)
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert identity.identify(spec).key != before


# Interpreters and environment


def test_the_legacy_arm_has_its_own_interpreter_or_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORGE_LEGACY_PYTHON", raising=False)
    monkeypatch.setattr(arms, "ROOT", tmp_path)
    with pytest.raises(MachineError, match="make legacy-env"):
        arms.interpreter("legacy")
    own = tmp_path / ".venv-legacy" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    assert arms.interpreter("legacy") == str(own)
    monkeypatch.setenv("FORGE_LEGACY_PYTHON", sys.executable)
    assert arms.interpreter("legacy") == sys.executable
    monkeypatch.setenv("FORGE_LEGACY_PYTHON", str(tmp_path / "none"))
    with pytest.raises(MachineError, match=r"FORGE_LEGACY_PYTHON=.* is no program"):
        arms.interpreter("legacy")
    assert arms.interpreter("unsloth") == arms.interpreter("trl") == sys.executable
    monkeypatch.setenv("FORGE_GPU_PYTHON", str(own))
    assert arms.interpreter("unsloth") == str(own)


def test_all_arms_get_the_same_environment_but_for_the_legacy_arms_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PYTHONPATH": "/a", "PYTORCH_CUDA_ALLOC_CONF": "x", "OMP_NUM_THREADS": "99"}.items():
        monkeypatch.setenv(name, value)
    legacy, trl, unsloth = (arms.environment(backend) for backend in ("legacy", "trl", "unsloth"))  # type: ignore[arg-type]
    assert trl == unsloth == legacy | {"PYTHONPATH": "/a"}
    assert "PYTHONPATH" not in legacy
    assert "PYTORCH_CUDA_ALLOC_CONF" not in legacy
    assert legacy["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert legacy["OMP_NUM_THREADS"] != "99"


def test_the_command_line_is_a_training_run_with_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").touch()
    spec = RunSpec(backend="trl", workload="smoke", overrides=("data.train=train.jsonl", "lora.rank=4"))
    assert arms.train_command(spec, Path("/out"))[1:] == [
        *("-m", "forge.training", "train", "smoke", "--backend", "trl"),
        *("--set", f"data.train={tmp_path / 'train.jsonl'}", "--set", "lora.rank=4"),
        *("-o", "/out", "--force", "--on-oom", "stop"),
    ]


# Paths and terminal codes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('  File "/usr/lib/python3.11/json/decoder.py", line 3', '  File "decoder.py", line 3'),
        (f"saved to {ROOT}/runs/a b", "saved to a b"),
        (f"{ROOT}: dirty", f"{ROOT.name}: dirty"),
        (f"in {Path.home()} and {Path.home()}/.cache/forge/x", "in ~ and x"),
        ("PATH=/opt/a/bin:/usr/local/bin,/x/y", "PATH=bin:bin,y"),
        ("see https://host/a/b/c and data/train.jsonl", "see https://host/a/b/c and data/train.jsonl"),
        ("3 docs /s, 5/8 and/or", "3 docs /s, 5/8 and/or"),
        ("file:///mnt/disk/x.safetensors", "x.safetensors"),
    ],
)
def test_paths_are_reduced_to_their_last_component(text: str, expected: str) -> None:
    assert without_paths(text) == expected


def test_a_record_loses_its_paths_and_keeps_everything_else() -> None:
    record = make_record(notes=["best of /a/b c/d.txt"]).model_dump(mode="json")
    clean = portable(record)
    assert clean["workload"] == {"model": {"path": "base"}, "data": {"train": "train.jsonl"}}
    assert clean["base_path"] == "base"
    assert "/somewhere" not in json.dumps(clean)
    assert {k: v for k, v in clean.items() if k not in ("workload", "base_path", "notes")} == {
        k: v for k, v in record.items() if k not in ("workload", "base_path", "notes")
    }


def test_a_log_loses_colours_overwritten_lines_and_all_but_its_end() -> None:
    raw = b"x" * 9000 + b"\n\x1b[1;31merror:\x1b[0m red\r\n 10%\r 50%\r100%\n\x1b]0;title\x07end\xff\x00\n"
    tail = log_tail(raw)
    assert tail.endswith("\nerror: red\n100%\nend\ufffd")
    assert len(tail) == 4000


# The store


def test_run_ids_count_up_in_a_store_and_an_outcome_is_never_replaced(store: Store) -> None:
    first = run(store, fake())
    second = run_once(OTHER, store=store, command=fake())
    assert [run_id.partition("-")[2] for run_id in store.run_ids()] == ["0001", "0002"]
    assert first.run_id.startswith(first.key[:12])
    assert store.with_key(second.key) == [second]
    with pytest.raises(DiskError, match="exists already"):
        store.append(first)


@pytest.mark.parametrize("content", ['{"run_id": "x', "[]", '{"schema_version": 2}', ""])
def test_a_damaged_file_is_an_error_that_names_it(store: Store, content: str) -> None:
    outcome = run(store, fake())
    path = store.directory / "runs" / f"{outcome.run_id}.json"
    path.write_text(content)
    with pytest.raises(DataError, match=str(path)):
        store.outcomes()
    path.rename(path.with_name("notes.json"))
    with pytest.raises(DataError, match=r"notes\.json is not a run"):
        store.outcomes()


def test_two_gates_on_one_store_do_not_mix(store: Store) -> None:
    with store.lock(), store.lock():
        with pytest.raises(LockedError) as caught:
            run_once(SPEC, store=Store(store.directory), command=fake())
        assert caught.value.exit_code == 9
        assert run(store, fake()).status == "completed"
    assert run_once(SPEC, store=Store(store.directory), command=fake()).status == "completed"


def test_a_process_dies_with_the_one_that_started_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"""
import os, sys
from pathlib import Path
from harness.measurement.process import run_process
run_process([sys.executable, "-c", {code!r}], environment=os.environ, directory=Path("."), time_limit_seconds=600)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert gone(int(note.read_text()))


def test_the_end_of_what_a_process_says_is_kept(tmp_path: Path) -> None:
    ended = run_process(
        [sys.executable, "-c", "import sys; print('out'); sys.stdout.flush(); sys.exit('err')"],
        environment=os.environ,
        directory=tmp_path,
        time_limit_seconds=30,
    )
    assert (ended.exit_code, ended.timed_out, ended.output) == (1, False, b"out\nerr\n")
