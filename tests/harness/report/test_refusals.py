"""A report is never made from evidence that does not fit together: one message, an exit code, and no file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.report.__main__ import main
from tests.support.recorded_gate import ARMS, Gate, small_gate
from tests.support.report_pages import report_of, whole


def refused(gate: Gate, capsys: pytest.CaptureFixture[str], **top: Any) -> str:
    """The one message; asserts the exit code 3 and that nothing was written."""
    path = gate.write(**top)
    capsys.readouterr()
    assert main([str(path), "-o", str(gate.directory / "out")]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
    assert not (gate.directory / "out").exists()
    return shown.err


def test_a_number_that_its_run_contradicts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = small_gate(tmp_path)
    entry = next(e for e in gate.entries if e["name"] == "metric/genome_full/unsloth/peak_allocated_bytes")
    entry["stats"]["data"][0] *= 0.9
    message = refused(gate, capsys)
    assert "peak_allocated_bytes is" in message
    assert entry["extra_info"]["run_ids"][0] in message


def test_an_estimate_that_the_pairs_contradict_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = small_gate(tmp_path)
    verdict = gate.entries[-1]["extra_info"]["verdict"]
    verdict["figures"]["high"] *= 1.01
    assert "genome_full_speed: high is" in refused(gate, capsys)


def test_a_pass_that_its_interval_does_not_earn_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = small_gate(tmp_path, seconds=1.65)
    gate.entries[-1]["extra_info"]["verdict"]["status"] = "PASS"
    assert "genome_full_speed: status is PASS in the JSON" in refused(gate, capsys)


def _lost_run(gate: Gate) -> None:
    (gate.directory / "store" / "runs" / f"{max(gate.runs)}.json").unlink()


def _broken_run(gate: Gate) -> None:
    (gate.directory / "store" / "runs" / f"{max(gate.runs)}.json").write_text('{"schema_version": 1')


def _foreign_record(gate: Gate) -> None:
    path = gate.directory / "store" / "runs" / f"{max(gate.runs)}.json"
    outcome = json.loads(path.read_text())
    outcome["record"]["surprise"] = 1
    path.write_text(json.dumps(outcome))


def _no_number(gate: Gate) -> None:
    gate.entries[0]["stats"]["data"][0] = float("nan")


def _no_arm(gate: Gate) -> None:
    del gate.entries[0]["extra_info"]["arm"]


def _odd_workload(gate: Gate) -> None:
    gate.entries[0]["extra_info"]["workload"] = 'x" onload="alert(1)'


def _odd_context(gate: Gate) -> None:
    gate.entry("context/x", "max_context", backend="legacy", budget_gib="UNSERIALIZABLE[8]")


def _lost_probe(gate: Gate) -> None:
    gate.entry("context/x", "max_context", backend="legacy", budget_gib=8.0, probe="0" * 64)


def _lost_pair(gate: Gate) -> None:
    runs = [gate.run(ARMS["genome_8k", backend], "genome_8k") for backend in ("legacy", "unsloth")]
    gate.trial("genome_8k", runs[:1], runs[1:], num_pairs=1)
    gate.metrics("genome_8k", "legacy", "legacy", runs[:1])
    (gate.directory / "store" / "runs" / f"{runs[1].id}.json").unlink()


def _odd_runs(gate: Gate) -> None:
    gate.entries[0]["extra_info"]["run_ids"] = "all of them"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lost_run, "lacks"),
        (_broken_run, "not readable JSON"),
        (_foreign_record, r"record\.surprise"),
        (_no_number, "not a number"),
        (_no_arm, r"extra_info\.arm is None"),
        (_odd_workload, "workload"),
        (_odd_context, r"extra_info\.budget_gib"),
        (_lost_probe, "names a probe"),
        (_odd_runs, "not a list of run ids"),
        (_lost_pair, "trial genome_8k names run .* lacks"),
    ],
)
def test_broken_evidence_is_one_message_and_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Gate], None], message: str
) -> None:
    gate = small_gate(tmp_path)
    damage(gate)
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"benchmarks": gate.entries}))
    assert main([str(path), "-o", str(tmp_path / "out")]) == 3
    shown = capsys.readouterr().err
    assert re.search(message, shown)
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"benchmarks": 3}', '{"benchmarks": []}', "{", "\x00"])
def test_a_file_that_is_no_gates_json_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    assert main([str(path), "-o", str(tmp_path / "out")]) == 3
    assert str(path) in capsys.readouterr().err


def test_missing_inputs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no.json"), "-o", str(tmp_path / "out")]) == 3
    assert "no.json is missing" in capsys.readouterr().err
    gate, _, _ = whole()
    arguments = [str(gate.directory / "benchmark.json"), "--store", str(tmp_path), "-o", str(tmp_path / "out")]
    assert main(arguments) == 3
    assert f"{tmp_path} is not a store" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_a_disk_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("in the way")
    gate, _, _ = whole()
    assert main([str(gate.directory / "benchmark.json"), "-o", str(tmp_path / "out")]) == 6
    assert "a file is in the way" in capsys.readouterr().err


def test_a_refused_report_leaves_the_earlier_one_as_it_was(tmp_path: Path) -> None:
    gate = small_gate(tmp_path)
    page, markdown = report_of(gate)
    _lost_run(gate)
    assert main([str(gate.write()), "-o", str(tmp_path / "out")]) == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "report.md"}
    assert (tmp_path / "out" / "report.html").read_text().replace("\u00a0", " ") == page
    assert (tmp_path / "out" / "report.md").read_text() == markdown


@pytest.mark.parametrize("arguments", [[], ["x.json"], ["x.json", "-o"], ["x.json", "-o", "out", "--colour"]])
def test_wrong_arguments_end_with_exit_code_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m harness.report" in capsys.readouterr().err
