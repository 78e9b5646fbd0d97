"""Comparing two gates: what says nothing about each other is refused by name, the rest is shown in its own unit."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from harness.compare import main
from tests.support.tiny_gate import make_project, run_compare, run_pytest, run_pytest_benchmark

GATE = """
@pytest.mark.benchmark(group="memory", timer=CLOCK)
def test_peak(benchmark):
    record_metric(benchmark, [10 * 2**30], metric="peak_allocated_bytes", unit="bytes", **INFO)

@pytest.mark.benchmark(group="speed", timer=CLOCK)
def test_step(benchmark):
    record_metric(benchmark, [2.0, 2.5, 3.0], metric="step_seconds", unit="seconds", **INFO)

@recorded
def test_claim(benchmark):
    record_facts(benchmark, metric="speed", record_kind="claim", verdict={"status": "FAIL"}, gpu="NVIDIA H200")
"""

Json = dict[str, Any]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """The JSON of a gate, as pytest-benchmark wrote it, recorded on a GPU."""
    project = make_project(tmp_path_factory.mktemp("gate"), GATE)
    done = run_pytest(project, "--benchmark-json=gate.json")
    assert done.returncode == 0, done.stdout
    content: Json = json.loads((project / "gate.json").read_text(encoding="utf-8"))
    content["machine_info"]["gpu"] = {"name": "NVIDIA H200", "driver": "580.1"}
    return content


@pytest.fixture
def write(gate: Json, tmp_path: Path) -> Write:
    """Write the gate under a name, after a change to it."""

    def write_gate(name: str, change: Callable[[Json], object] = lambda gate: None) -> Path:
        content = copy.deepcopy(gate)
        change(content)
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return write_gate


def entry(gate: Json, name: str) -> Json:
    return next(found for found in gate["benchmarks"] if found["name"] == name)


def use_more_memory(gate: Json) -> None:
    stats = entry(gate, "test_peak")["stats"]
    stats |= {key: stats[key] * 1.1 for key in ("min", "max", "mean", "median")}


def be_of_an_a100(gate: Json) -> None:
    gate["machine_info"]["gpu"]["name"] = "NVIDIA A100"
    for found in gate["benchmarks"]:
        found["extra_info"]["gpu"] = "NVIDIA A100"


def refusal(a: Path, b: Path, *arguments: str | Path, exit_code: int = 8) -> str:
    """What harness.compare says when it refuses; it then prints no table."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        returned = main([*map(str, (a, b, *arguments))])
    assert returned == exit_code, said.getvalue()
    assert "Median" not in said.getvalue()
    assert said.getvalue().startswith("error: ")
    return said.getvalue()


# What is shown


def test_ten_percent_more_memory_is_shown_in_mebibytes_whatever_the_files_are_called(write: Write) -> None:
    """pytest-benchmark sorts files by name; A stays the reference."""
    done = run_compare(write("z.json"), write("a.json", use_more_memory))
    assert done.returncode == 0, done.stdout
    memory, speed = done.stdout.split("\n\n")[1:3]
    assert "(time in mebibytes)" in memory
    assert memory.splitlines()[3].split() == ["test_peak", "10,240.0000", "11,264.0000", "+10.0%"]
    assert "(time in s)" in speed
    assert speed.splitlines()[3].split() == ["test_step", "2.5000", "2.5000", "+0.0%"]
    assert "test_claim" not in done.stdout


def test_files_of_the_same_name_are_compared_and_the_csv_has_both_medians_of_every_entry(
    write: Write, tmp_path: Path
) -> None:
    a, b, out = write("old/gate.json"), write("new/gate.json", use_more_memory), tmp_path / "csv" / "out.csv"
    done = run_compare(a, b, "--out", out)
    assert done.returncode == 0, done.stdout
    assert "+10.0%" in done.stdout
    peak, step = csv.DictReader(out.read_text(encoding="utf-8").splitlines())
    assert peak["entry"].endswith("::test_peak")
    assert (peak["unit"], float(peak["a_median"])) == ("bytes", 10 * 2**30)
    assert float(peak["change_percent"]) == pytest.approx(10)
    assert (step["metric"], step["b_median"]) == ("step_seconds", "2.5")


def test_an_existing_csv_is_kept(write: Write, tmp_path: Path) -> None:
    a, b, out = write("a.json"), write("b.json", use_more_memory), tmp_path / "out.csv"
    out.write_text("mine", encoding="utf-8")
    assert "exists already" in refusal(a, b, "--out", out, exit_code=6)
    assert out.read_text(encoding="utf-8") == "mine"


def test_another_driver_is_noted_and_it_and_another_plan_are_compared(write: Write) -> None:
    def change(gate: Json) -> None:
        gate["machine_info"]["gpu"]["driver"] = "590.2"
        entry(gate, "test_peak")["extra_info"]["plan"] = {"micro_batch": 4}

    b = write("b.json", change)
    done = run_compare(write("a.json"), b)
    assert done.returncode == 0, done.stdout
    assert "note: driver is 580.1 in A, 590.2 in B" in done.stdout


# What is refused


def test_different_gpus_are_refused_with_both_names(write: Write) -> None:
    a, b = write("a.json"), write("b.json", be_of_an_a100)
    assert "different GPUs: A is of NVIDIA H200, B of NVIDIA A100" in refusal(a, b)
    done = run_compare(a, b)
    assert (done.returncode, done.stdout) == (8, refusal(a, b)), "the command says what its function does"


def test_pytest_benchmarks_own_command_refuses_different_gpus_too(write: Write, tmp_path: Path) -> None:
    a, b = write("a.json"), write("b.json", be_of_an_a100)
    done = run_pytest_benchmark(f"--storage={tmp_path / 'store'}", "compare", a, b)
    assert done.returncode == 4, done.stdout
    assert "different GPUs" in done.stdout
    assert "NVIDIA A100, NVIDIA H200" in done.stdout
    assert "test_peak" not in done.stdout


def test_another_recording_machine_is_refused_even_if_the_entries_agree(write: Write) -> None:
    b = write("b.json", lambda gate: gate["machine_info"].update(gpu=None))
    assert "A was recorded on a machine with NVIDIA H200, B on one with no GPU" in refusal(write("a.json"), b)


@pytest.mark.parametrize(
    ("key", "value"), [("workload_sha256", "cd" * 32), ("unit", "seconds"), ("backend", "unsloth"), ("metric", "x")]
)
def test_one_name_for_two_things_is_refused_with_both(write: Write, gate: Json, key: str, value: str) -> None:
    b = write("b.json", lambda gate: entry(gate, "test_peak")["extra_info"].update({key: value}))
    before = entry(gate, "test_peak")["extra_info"][key]
    assert f"test_gate.py::test_peak: {key} is {before} in A, {value} in B" in refusal(write("a.json"), b)


def test_a_renamed_entry_is_refused_under_both_names(write: Write) -> None:
    b = write(
        "b.json", lambda gate: entry(gate, "test_step").update(name="test_fast", fullname="test_gate.py::test_fast")
    )
    said = refusal(write("a.json"), b)
    assert "only in A (renamed or missing): test_gate.py::test_step" in said
    assert "only in B (renamed or missing): test_gate.py::test_fast" in said


@pytest.mark.parametrize("missing_in", ["A", "B"])
def test_a_missing_entry_is_refused(write: Write, missing_in: str) -> None:
    paths = [write("whole.json"), write("less.json", lambda gate: gate["benchmarks"].pop(1))]
    there = "B" if missing_in == "A" else "A"
    said = refusal(*(reversed(paths) if missing_in == "A" else paths))
    assert f"only in {there} (renamed or missing): test_gate.py::test_step" in said


def test_an_unfinished_gate_is_refused(write: Write) -> None:
    b = write("b.json", lambda gate: entry(gate, "test_claim")["extra_info"].update(verdict={"status": "INCOMPLETE"}))
    assert "B is an unfinished gate: test_gate.py::test_claim is INCOMPLETE" in refusal(write("a.json"), b)


def test_what_was_kept_of_a_gate_that_died_is_refused(write: Write) -> None:
    b = write("b.json", lambda gate: gate.update(is_partial=True))
    assert "A was cut short" in refusal(b, write("a.json"))


def test_all_reasons_are_given_at_once(write: Write) -> None:
    def change(gate: Json) -> None:
        be_of_an_a100(gate)
        entry(gate, "test_peak")["extra_info"]["workload_sha256"] = "cd" * 32
        gate["benchmarks"].pop(1)

    assert refusal(write("a.json"), write("b.json", change)).count("\n  - ") == 4


def test_the_same_results_twice_are_refused(write: Write) -> None:
    a = write("a.json")
    a.with_name("link.json").symlink_to(a)
    for b in (a, a.with_name("link.json"), write("copy.json")):
        assert "are the same results" in refusal(a, b, exit_code=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing"),
        ("", "is not readable JSON"),
        ('{"machine_info": {', "is not readable JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "is not a pytest-benchmark result"),
        ('{"machine_info": {}, "datetime": "", "benchmarks": []}', "holds no entry"),
        ("\udcff", "is not readable JSON"),
    ],
)
def test_a_file_that_is_no_result_is_refused(write: Write, tmp_path: Path, text: str | None, message: str) -> None:
    broken = tmp_path / "broken.json"
    if text is not None:
        broken.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert message in refusal(write("a.json"), broken, exit_code=3)


def test_entries_of_other_benchmarks_are_refused(write: Write) -> None:
    def be_foreign(gate: Json) -> None:
        entry(gate, "test_peak")["extra_info"].clear()

    def be_no_number(gate: Json) -> None:
        entry(gate, "test_peak")["stats"]["median"] = float("nan")

    def occur_twice(gate: Json) -> None:
        gate["benchmarks"].append(entry(gate, "test_peak"))

    a = write("a.json")
    assert "test_peak has no metric, unit, record_kind" in refusal(a, write("b.json", be_foreign), exit_code=3)
    assert "stats.median: Input should be a finite number" in refusal(a, write("c.json", be_no_number), exit_code=3)
    assert "name occurs twice" in refusal(a, write("d.json", occur_twice), exit_code=3)
