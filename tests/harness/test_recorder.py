"""The recorder through the real pytest: samples are stored as they are, in their unit; none is lost in silence."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_gate import ROOT, make_project, read_entries, run_pytest, run_pytest_benchmark

BYTES = [2.0**40, 1.0, 3.0 * 2**30 + 1]
SECONDS = [1e-06, 0.1234567, 86400.000001]
NATS = [-0.25, 2.25]

GATE = f"""
@pytest.mark.benchmark(group="memory", timer=CLOCK)
def test_peak(benchmark):
    record_metric(benchmark, {[int(value) for value in BYTES]}, metric="peak_allocated_bytes", unit="bytes", **INFO)

@pytest.mark.benchmark(group="work", timer=CLOCK)
def test_step(benchmark):
    record_metric(benchmark, {SECONDS}, metric="step_seconds", unit="seconds", plan={{"tiles": [1, 2]}}, **INFO)

@pytest.mark.benchmark(group="work", timer=CLOCK)
def test_loss(benchmark):
    record_metric(benchmark, {NATS}, metric="last_train_loss", unit="nats", **INFO)

@recorded
def test_ceiling(benchmark):
    record_facts(benchmark, metric="matrix_product", record_kind="matmul_peak", tflops=700.5, gpu="NVIDIA H200")

@recorded
def test_misses_its_bar(benchmark):
    record_metric(benchmark, [3.0], metric="step_seconds", unit="seconds", verdict={{"status": "FAIL"}}, **INFO)
    assert False, "the bar is missed"

def test_plain_code_is_still_timed(benchmark):
    benchmark.pedantic(sum, args=([1, 2],), rounds=2)
"""


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A gate's JSON, written into a folder that did not exist, and what pytest said."""
    project = make_project(tmp_path_factory.mktemp("gate"), GATE)
    done = run_pytest(project, "--benchmark-json=new/folder/gate.json")
    return project / "new/folder/gate.json", done


Gate = tuple[Path, subprocess.CompletedProcess[str]]


def test_samples_are_stored_exactly(gate: Gate) -> None:
    entries = read_entries(gate[0])
    stored = [entries[name]["stats"]["data"] for name in ("test_peak", "test_step", "test_loss")]
    assert stored == [BYTES, SECONDS, NATS]
    assert entries["test_peak"]["stats"]["median"] == 3 * 2**30 + 1
    assert entries["test_peak"]["options"]["timer"] == "replay"


def test_what_the_samples_are_is_stored_beside_them(gate: Gate) -> None:
    info = read_entries(gate[0])["test_step"]["extra_info"]
    assert (info["metric"], info["unit"]) == ("step_seconds", "seconds")
    assert info["record_kind"] == "metric"
    assert info["gpu"] == "NVIDIA H200"
    assert info["plan"] == {"tiles": [1, 2]}


def test_an_assertion_after_recording_keeps_the_entry_and_the_red_exit(gate: Gate) -> None:
    path, done = gate
    assert done.returncode == 1, done.stdout
    assert "1 failed, 5 passed" in done.stdout
    assert read_entries(path)["test_misses_its_bar"]["extra_info"]["verdict"] == {"status": "FAIL"}


def test_each_table_is_in_its_own_unit(gate: Gate, tmp_path: Path) -> None:
    """Also where one group holds several units, and both in pytest and in pytest-benchmark's own command."""
    path, done = gate
    compared = run_pytest_benchmark(f"--storage={tmp_path}", "compare", path, "--columns=max")
    assert compared.returncode == 0, compared.stdout
    for text in (done.stdout, compared.stdout):
        memory, loss, step = (table_of(text, name) for name in ("test_peak", "test_loss", "test_step"))
        assert "'memory'" in memory
        assert "(time in mebibytes)" in memory
        assert "1,048,576.0000" in memory  # 2^40 bytes
        assert "'work (nats)'" in loss
        assert "(time in nats)" in loss
        assert "2.2500" in loss
        assert "'work (seconds)'" in step
        assert "(time in s)" in step
        assert "86,400.0000" in step


def test_facts_are_in_the_json_and_in_no_table(gate: Gate) -> None:
    path, done = gate
    info = read_entries(path)["test_ceiling"]["extra_info"]
    assert (info["record_kind"], info["tflops"], info["unit"]) == ("matmul_peak", 700.5, "none")
    assert "test_ceiling" not in done.stdout


def test_what_is_not_ours_keeps_its_scale(gate: Gate) -> None:
    table = table_of(gate[1].stdout, "test_plain_code")
    assert any(f"(time in {unit})" in table for unit in ("ns", "us"))


def test_the_machine_is_described_without_its_name(gate: Gate) -> None:
    text = gate[0].read_text(encoding="utf-8")
    info = json.loads(text)["machine_info"]
    assert info.keys() == {"gpu", "torch", "python", "system", "machine"}
    assert info["python"] == platform.python_version()
    assert platform.node() not in text
    assert '"node"' not in text


def test_nothing_is_left_beside_a_complete_result(gate: Gate) -> None:
    assert [path.name for path in gate[0].parent.iterdir()] == ["gate.json"]


def table_of(text: str, row: str) -> str:
    """The table of pytest-benchmark that has this row."""
    tables = [table for table in text.split("\n\n") if f"\n{row}" in table]
    assert len(tables) == 1, text
    return tables[0]


# What cannot be stored

REFUSED = {
    "nan": ("[1.0, float('nan')]", "{}", "ValueError: step_seconds: sample 1 is nan: not a finite number"),
    "infinity": ("[float('inf')]", "{}", "ValueError: step_seconds: sample 0 is inf: not a finite number"),
    "numpy": ("[numpy.float64(1)]", "{}", "TypeError: step_seconds: sample 0 is a numpy.float64, not a Python float"),
    "numpy_whole": ("[numpy.int64(1)]", "{}", "TypeError: step_seconds: sample 0 is a numpy.int64, not a Python float"),
    "truth": ("[True]", "{}", "TypeError: step_seconds: sample 0 is a bool, not a Python float"),
    "negative": ("[-1.0]", "{}", "ValueError: step_seconds: sample 0 is -1.0 seconds: negative"),
    "huge": ("[2**53 + 1]", "{}", "above 2^53, not exact as a float"),
    "huger": ("[10**400]", "{}", "above 2^53, not exact as a float"),
    "none": ("[]", "{}", "ValueError: step_seconds: there are no samples"),
    "nested_nan": ("[1.0]", "{'a': [{'b': float('nan')}]}", "ValueError: extra_info.facts.a[0].b is nan"),
    "nested_numpy": ("[1.0]", "{'a': numpy.float64(1)}", "TypeError: extra_info.facts.a is a numpy.float64"),
    "path": ("[1.0]", "{'a': pathlib.Path('x')}", "TypeError: extra_info.facts.a is a pathlib.PosixPath"),
    "key": ("[1.0]", "{'a': {1: 2}}", "TypeError: extra_info.facts.a has the key 1, a int: JSON keys are text"),
}


def test_what_json_cannot_hold_is_refused_by_name_and_leaves_no_entry(tmp_path: Path) -> None:
    tests = "import numpy, pathlib\n" + "".join(
        f"@recorded\ndef test_{name}(benchmark):\n"
        f"    record_metric(benchmark, {samples}, metric='step_seconds', unit='seconds', facts={facts})\n"
        for name, (samples, facts, _) in REFUSED.items()
    )
    tests += (
        "@recorded\ndef test_unit(benchmark):\n    record_metric(benchmark, [1.0], metric='x', unit='hours')\n"
        "@recorded\ndef test_kind(benchmark):\n    record_facts(benchmark, metric='x', record_kind='other')\n"
        "@recorded\ndef test_verdict(benchmark):\n"
        "    record_facts(benchmark, metric='x', record_kind='claim', verdict={'status': 'GREEN'})\n"
        "@recorded\ndef test_good(benchmark):\n    record_metric(benchmark, [1.0], metric='x', unit='seconds')\n"
        "def test_no_clock(benchmark):\n    record_metric(benchmark, [1.0], metric='x', unit='seconds')\n"
    )
    done = run_pytest(make_project(tmp_path, tests), "--benchmark-json=gate.json", "--tb=line")
    for name, (_, _, message) in REFUSED.items():
        assert message in done.stdout, name
    assert "ValueError: unit is 'hours'; known: seconds, bytes, nats" in done.stdout
    assert "ValueError: record_kind is 'other'; known: metric, claim" in done.stdout
    assert "ValueError: verdict has no status of PASS, INCOMPLETE" in done.stdout
    assert "mark it @pytest.mark.benchmark(timer=CLOCK)" in done.stdout
    assert read_entries(tmp_path / "gate.json").keys() == {"test_good"}


# Nothing is lost

ONE = """
@recorded
def test_first(benchmark):
    record_metric(benchmark, [1.5], metric="step_seconds", unit="seconds", **INFO)
"""
KILLED = (
    ONE
    + """
def test_second():
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""
)
FAILING_SET_UP = (
    ONE
    + """
@pytest.fixture
def broken():
    raise RuntimeError("no such run")

def test_second(broken):
    pass
"""
)


def test_results_survive_a_later_test_that_takes_the_process_down(tmp_path: Path) -> None:
    project = make_project(tmp_path, KILLED)
    assert run_pytest(project, "--benchmark-json=gate.json").returncode == -9
    assert not (project / "gate.json").exists()
    kept = project / "gate.json.partial"
    assert read_entries(kept)["test_first"]["stats"]["data"] == [1.5]
    assert json.loads(kept.read_text(encoding="utf-8"))["is_partial"] is True
    make_project(tmp_path, ONE)
    assert run_pytest(project, "--benchmark-json=gate.json").returncode == 0
    assert read_entries(project / "gate.json").keys() == {"test_first"}
    assert not kept.exists()


def test_results_survive_an_error_in_a_later_test(tmp_path: Path) -> None:
    done = run_pytest(make_project(tmp_path, FAILING_SET_UP), "--benchmark-json=gate.json")
    assert done.returncode == 1
    assert read_entries(tmp_path / "gate.json").keys() == {"test_first"}


def test_a_json_that_cannot_be_written_is_refused_before_the_first_test(tmp_path: Path) -> None:
    project = make_project(tmp_path, ONE)
    for path, reason in (("conftest.py/gate.json", "cannot be written"), (".", "is a folder")):
        done = run_pytest(project, f"--benchmark-json={path}")
        assert done.returncode == 4, done.stdout
        assert reason in done.stdout
        assert "1 passed" not in done.stdout


# A gate that records nothing is no gate

DIST = """
def pytest_addoption(parser):
    parser.addoption("--dist", default="no")  # the option by which pytest-benchmark knows xdist
"""


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["-p", "has_dist", "--dist=load"], {}, "-m gpu cannot run under xdist, which records nothing"),
        ([], {"PYTEST_XDIST_WORKER": "gw0"}, "-m gpu cannot run in an xdist worker, which records nothing"),
        (["-n2"], {}, "unrecognized arguments: -n2"),
        (["--benchmark-only"], {}, "-m gpu with --benchmark-only would leave tests out"),
        (["--benchmark-disable"], {}, "-m gpu with --benchmark-disable would leave tests out"),
        (["--benchmark-skip"], {}, "-m gpu with --benchmark-skip would leave tests out"),
    ],
)
def test_a_gate_that_would_record_nothing_does_not_start(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    project = make_project(tmp_path, ONE.replace("@recorded", "@pytest.mark.gpu\n@recorded"))
    (project / "has_dist.py").write_text(DIST, encoding="utf-8")
    done = run_pytest(project, "-m", "gpu", *arguments, **environment)
    assert done.returncode == 4, done.stdout
    assert message in done.stdout


def test_an_installed_xdist_is_switched_off(tmp_path: Path) -> None:
    project = make_project(tmp_path, ONE)
    (project / "has_dist.py").write_text(DIST, encoding="utf-8")
    metadata = project / "pytest_xdist-3.8.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pytest-xdist\nVersion: 3.8.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[pytest11]\nxdist = has_dist\n", encoding="utf-8")
    blocked = run_pytest(project, "--dist=load")
    assert blocked.returncode == 4, blocked.stdout
    assert "unrecognized arguments: --dist=load" in blocked.stdout
    assert run_pytest(project, "--dist=load", "-o", "addopts=").returncode == 1  # so it was there to be switched off


def test_an_entry_that_would_not_be_stored_fails_its_test_with_any_marker(tmp_path: Path) -> None:
    done = run_pytest(make_project(tmp_path, ONE), PYTEST_XDIST_WORKER="gw0")
    assert done.returncode == 1, done.stdout
    assert "benchmarks are switched off" in done.stdout


def test_results_of_another_gpu_are_no_baseline(tmp_path: Path) -> None:
    """``--benchmark-compare`` in the run itself; the stand-alone command is tested in test_compare.py."""
    project = make_project(tmp_path, ONE)
    assert run_pytest(project, "--benchmark-save=old", "--benchmark-storage=store").returncode == 0
    again = run_pytest(project, "--benchmark-compare", "--benchmark-storage=store")
    assert again.returncode == 0, again.stdout
    (saved,) = (project / "store").rglob("*.json")
    content = json.loads(saved.read_text(encoding="utf-8"))
    here = (content["machine_info"]["gpu"] or {"name": "no GPU"})["name"]
    content["machine_info"]["gpu"] = {"name": "NVIDIA A100"}
    saved.write_text(json.dumps(content), encoding="utf-8")
    refused = run_pytest(project, "--benchmark-compare", "--benchmark-storage=store")
    assert refused.returncode == 4, refused.stdout
    assert f"the saved results are of another GPU: NVIDIA A100; this machine has {here}" in refused.stdout


def test_collecting_all_tests_imports_no_torch_and_no_scipy() -> None:
    """But those of the kernels, which are about torch."""
    code = (
        "import sys, pytest\n"
        "options = ['-qq', '-p', 'no:cacheprovider', '-m', '', '--ignore=tests/training/kernels']\n"
        "code = pytest.main(['--collect-only', *options])\n"
        "print('heavy:', sorted({'torch', 'scipy', 'transformers'} & sys.modules.keys()))\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stdout.endswith("heavy: []\n"), done.stdout[-200:]
