"""The report beside speed: the parity ladder with its curves and differences, and the export as one chain."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.files import write_json
from harness.export.claims import KINDS
from harness.parity.claims import verdict_on as rung_verdict
from harness.parity.first_step.checks import Check
from harness.parity.rungs import verdict as judged
from harness.parity.simulation import read_recorded
from harness.report.__main__ import main
from tests.support.export_answers import divergence_answer, verdict_on
from tests.support.recorded_ladder import RECORDED, Runs, make_ladder
from tests.support.report_pages import status_of


def entry(kind: str, name: str, **info: Any) -> dict[str, Any]:
    extra = {"record_kind": kind, "unit": "none", "run_ids": [], "metric": name, "workload": "parity", **info}
    return {"name": f"{kind}/{name}", "extra_info": extra, "stats": {"data": [0.0]}}


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Rungs 4 to 6 as the ladder judges recorded runs, an export as its judges see it; a store."""
    where = tmp_path_factory.mktemp("gate")
    rows = [{"instruction": f"Recite {i}.", "input": "", "output": f"Ship {i} came by night. " * 9} for i in range(230)]
    (where / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ladder = make_ladder(where, where / "corpus.jsonl", Runs(read_recorded(RECORDED)))
    checks = [Check("error of a token's loss, nats", 0.01, 0.02), Check("cosine", 0.97, 0.99, least=True)]
    second = rung_verdict(2, "PASS", "all hold", {"checks": {"nf4": [c.to_dict() for c in checks]}})
    arms = {"arm": "unsloth", "backend": "unsloth", "baseline": "trl"}
    entries = [entry("parity", "rung 2", verdict=second.to_dict(), **arms)]
    for number in (4, 5, 6):
        rung = judged(ladder, number)
        entries.append(entry("parity", f"rung {number}", verdict=rung.to_dict(), run_ids=rung.run_ids, **arms))
    answer = divergence_answer(4e-7, 1e-8)
    answer["pairs"] = [{**pair, "same_top_share": 0.987} for pair in answer["pairs"]]
    answer["pairs"][0]["mean_kl_nats"] = 1.0
    answer["chain"][1]["change_nats_per_token"] = -0.5
    answer["held_out"]["num_tokens"] = 1234
    answer["four_bit"] = {"nats_per_token": 3.5, "shift_nats_per_token": 0.0125, "standard_error_nats_per_token": 0.001}
    for name in ("merged_against_adapter", *(f"divergence_{kind}" for kind in KINDS), "chain"):
        entries.append(entry("export", name, verdict=verdict_on(answer, name).to_dict()))
    steps = [{"name": "merge", "seconds": 36.2, "num_bytes": 15 << 30, "peak_rss_bytes": 9 << 30}]
    entries.append(entry("export", "export_seconds", steps=steps))
    return where, entries


def report_of(gate: tuple[Path, list[dict[str, Any]]], entries: list[dict[str, Any]] | None = None) -> tuple[str, str]:
    where, all_of_them = gate
    content = {"machine_info": {}, "commit_info": {}, "datetime": "", "benchmarks": entries or all_of_them}
    (where / "benchmark.json").write_text(json.dumps(content))
    assert main([str(where / "benchmark.json"), "-o", str(where / "out"), "--store", str(where / "store")]) == 0
    page, markdown = ((where / "out" / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    return page.replace("\u00a0", " "), markdown.replace("\\", "")


def section(markdown: str, title: str) -> str:
    return markdown.split(f"## {title}")[1].split("\n## ")[0]


def test_the_ladder_has_a_verdict_per_rung_with_its_reason_and_its_runs(gate: Any) -> None:
    ladder = section(report_of(gate)[1], "Accuracy: the parity ladder")
    for number, name in ((2, "first step"), (4, "noise"), (5, "trajectory"), (6, "outcome")):
        row = next(line for line in ladder.splitlines() if f"rung {number}, {name}" in line)
        assert "**PASS**" in row
        verdict = next(e["extra_info"] for e in gate[1] if e["extra_info"]["metric"] == f"rung {number}")
        assert verdict["verdict"]["reason"][:40] in row
        assert len(re.findall(r"#run-", row)) == len(verdict["run_ids"])
    assert "| cosine | 0.970 | at least 0.990 |" in ladder


def test_curves_stand_in_their_band_and_differences_beside_the_margin(gate: Any) -> None:
    page, markdown = report_of(gate)
    figures = gate[1][3]["extra_info"]["verdict"]["figures"]
    for name in (
        "parity-loss",
        "parity-loss-difference",
        "parity-grad_norm-difference",
        "parity-seeds",
        "parity-documents",
    ):
        assert f'id="{name}-title"' in page
    assert page.count("equal: within 0.01 nats per token") == 1
    assert page.count("band of trl&#39;s own rounding") + page.count("band of trl's own rounding") == 3
    ladder = section(markdown, "Accuracy: the parity ladder")
    for row in figures["seeds"]:
        line = f"| {row['seed']} | {row['base']:.4f} | {row['baseline']:.4f} | {row['candidate']:.4f} |"
        line += f" {row['stock']:.4f} | {row['difference']:+.4f} | {row['difference_to_stock']:+.4f} |"
        assert line in ladder
    assert "trl unchanged keeps its adapter in bfloat16" in ladder
    assert "| d0 | 100 | 4.0000 |" in ladder
    assert "optimizer.learning_rate=" in ladder, "the planted fault is shown beside the candidate"


def test_the_export_is_one_chain_from_base_to_the_smallest_file(gate: Any) -> None:
    page, markdown = report_of(gate)
    export = section(markdown, "Export: from the adapter to the files")
    rows = [line for line in export.splitlines() if re.match(r"\| (base|adapter|merged|f16|q8_0|q4_k_m) \|", line)]
    assert [row.split(" | ")[0] for row in rows] == ["| base", "| adapter", "| merged", "| f16", "| q8_0", "| q4_k_m"]
    assert "4.00e-07 (1.0e-08) | 0.05 | 98.70%" in rows[-1]
    assert [row.split(" | ")[4] for row in rows] == ["–", "–", "0.001", "1e-06", "0.001", "0.05"]
    assert 'id="export-chain-title"' in page
    assert "+0.0125" in export
    assert "| merge | 36 s | 15.0 GiB | 9.00 GiB |" in export


def test_a_red_rung_or_export_is_a_red_report_whatever_the_speed(gate: Any) -> None:
    page, _ = report_of(gate)
    assert "Accuracy: 4 of 15 passed, 11 INCOMPLETE." in page
    for place in (0, 5):
        entries = json.loads(json.dumps(gate[1]))
        entries[place]["extra_info"]["verdict"]["status"] = "FAIL"
        page, markdown = report_of(gate, entries)
        assert status_of(page) == "fail"
        assert re.search(r"(Accuracy|Export): \d of \d+ passed, 1 FAIL, ", markdown)


def _figures(entries: list[dict[str, Any]], metric: str) -> Any:
    info: dict[str, Any] = next(e["extra_info"] for e in entries if e["extra_info"]["metric"] == metric)
    return info["verdict"]["figures"] if "verdict" in info else info


@pytest.mark.parametrize(
    ("metric", "path"),
    [
        ("rung 2", ("checks", "nf4", 0, "bar")),
        ("rung 4", ("layouts", 0, "run_id")),
        ("rung 5", ("candidate", "loss", "drift")),
        ("rung 6", ("plan", "margin_nats")),
        ("divergence_q8_0", ("pair", "mean_kl_nats")),
        ("chain", ("held_out",)),
        ("export_seconds", ("steps", 0, "seconds")),
    ],
)
def test_a_figure_that_is_missing_is_one_message_that_names_the_entry(
    gate: Any, capsys: pytest.CaptureFixture[str], metric: str, path: tuple[Any, ...]
) -> None:
    entries = json.loads(json.dumps(gate[1]))
    kind = next(e["extra_info"]["record_kind"] for e in entries if e["extra_info"]["metric"] == metric)
    holder = _figures(entries, metric)
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    write_json(gate[0] / "broken.json", {"benchmarks": entries})
    arguments = [str(gate[0] / "broken.json"), "-o", str(gate[0] / "none"), "--store", str(gate[0] / "store")]
    assert main(arguments) == 3
    shown = capsys.readouterr().err
    assert f"entry {kind}/{metric}: its figures cannot be shown: '{path[-1]}' is missing" in shown
    assert not (gate[0] / "none").exists()


def test_a_peak_that_is_not_known_is_a_dash_and_not_the_drift(gate: Any) -> None:
    entries = json.loads(json.dumps(gate[1]))
    told = _figures(entries, "rung 5")["candidate"]["loss"]
    told["peak_spreads"] = None
    ladder = section(report_of(gate, entries)[1], "Accuracy: the parity ladder")
    row = next(line for line in ladder.splitlines() if line.startswith("| unsloth | training loss |"))
    drift = f"{told['drift']:+.2g} ({told['drift_limit']:.2g})"
    assert row.startswith(f"| unsloth | training loss | – | {drift} |")
