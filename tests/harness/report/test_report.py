"""The report: what it says is what the runs say, and only a pass looks like one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.environment import ROOT
from harness.measurement.results import Store
from harness.perf.claims import CLAIMS
from harness.report.__main__ import main
from harness.report.charts.points import Dot, trade_off
from harness.report.verdicts import EXPECTED
from harness.stats import corpus_seconds
from tests.support.html_page import Page
from tests.support.recorded_gate import ARMS, CLAIM, Gate, small_gate
from tests.support.report_pages import SECTIONS, report_of, status_of, whole


def test_both_files_hold_every_section_in_order_and_stay_small() -> None:
    _, page, markdown = whole()
    places = [page.index(f'<section id="{name}"') for name in SECTIONS]
    assert places == sorted(places)
    titles = re.findall(r"^## (.+)$", markdown, re.MULTILINE)
    assert titles == re.findall(r"<h2>([^<]+)</h2>", page.replace("&#39;", "'"))
    assert len(titles) == len(SECTIONS)
    assert len(page.encode()) < 600_000
    assert len(markdown.encode()) < 200_000


def test_the_verdict_table_comes_first_with_every_claim_and_its_numbers() -> None:
    gate, page, markdown = whole()
    for claim in CLAIMS:
        assert f'id="claim-{claim.name}"' in page
        assert claim.statement.replace("'", "&#39;") in page
    verdict = next(e["extra_info"]["verdict"] for e in gate.entries if e["name"] == "claim/genome_full_speed")
    line = next(line for line in markdown.splitlines() if "claim-genome_full_speed" in line)
    for number in (verdict["figures"][name] for name in ("estimate", "low", "high")):
        assert f"{number:.2f}×" in line
    assert "≥ 2.00×" in line
    assert "| 5 of 5 |" in line
    assert re.search(r"±\d\.\d%", line)


def test_every_run_that_is_named_stands_in_the_table_of_all_runs() -> None:
    gate, page, markdown = whole()
    parsed = Page(page)
    anchors = set(parsed.values("id"))
    targets = {href[1:] for href in parsed.values("href") if href.startswith("#")}
    assert targets <= anchors
    assert {f"run-{run_id}" for run_id in gate.runs} <= anchors
    named = {run_id for entry in gate.entries for run_id in entry["extra_info"]["run_ids"]}
    assert {f"run-{run_id}" for run_id in named} <= targets
    assert set(re.findall(r"\(#(run-[^)]+)\)", markdown)) <= set(re.findall(r'<a id="([^"]+)">', markdown))
    row = re.findall(rf'<tr id="run-{min(gate.runs)}">.*?</tr>', page, re.DOTALL)[0]
    run = gate.runs[min(gate.runs)].outcome
    assert all(text in row for text in (run.status, run.key[:12], run.machine))


def test_each_row_of_an_arm_names_the_runs_its_numbers_come_from() -> None:
    gate, _, markdown = whole()
    ids = gate.entries[0]["extra_info"]["run_ids"]
    assert gate.entries[0]["extra_info"]["arm"] == "legacy"
    rows = [line for line in markdown.splitlines() if line.startswith("| legacy | 1 x 8")]
    assert any(all(f"(#run-{run_id})" in row for run_id in ids) for row in rows)


def test_times_and_memory_are_those_of_the_runs() -> None:
    gate, _, markdown = whole()
    section = markdown.split("### genome_full")[1].split("## Speed")[0]
    ids = next(
        e["extra_info"]["run_ids"] for e in gate.entries if e["name"] == "metric/genome_full/trl/measured_seconds"
    )
    run = gate.runs[ids[0]]
    assert run.num_warmup_steps == 2
    seconds = sum(step["seconds"] for step in run.outcome.steps[2:])
    rows = [line for line in section.splitlines() if line.startswith("| trl |")]
    assert f"| {seconds:.1f} |" in rows[0]
    assert f"| {sum(step['documents'] for step in run.outcome.steps[2:]) / seconds:.2f} |" in rows[0]
    assert run.record is not None
    allocated = max(phase.peak_allocated_bytes for phase in run.record.memory)
    assert f"| {allocated / 2**30:.1f} |" in rows[1]


def test_a_pair_beside_the_claims_is_compared_with_itself_alone() -> None:
    gate, _, markdown = whole()
    pair = Store(gate.directory / "store").read_trial("genome_full_fastest_legacy")
    assert pair is not None
    baseline, candidate = (gate.runs[run_id] for run_id in (pair.pairs[0].baseline, pair.pairs[0].candidate))
    slow, fast = (sum(step["seconds"] for step in run.steps[2:]) for run in (baseline, candidate))
    row = next(line for line in markdown.splitlines() if line.startswith("| unsloth against legacy fastest layout"))
    assert f"| {fast:.1f} against {slow:.1f} | {slow / fast:.2f}× |" in row
    assert "unsloth against legacy |" not in markdown, "what the claims rest on stands in their own table"


def test_the_weight_floor_is_that_of_the_plan_and_is_drawn() -> None:
    _, page, markdown = whole()
    assert "weight floor 5.40 GiB" in markdown  # notes of the field: 5.40 GiB for this model and adapter
    chart = page[page.index('id="phases-genome_full"') :].split("</figure>")[0]
    assert "weight floor 5.40 GiB" in chart


def test_the_projection_is_epochs_times_the_fit_over_the_whole_corpus() -> None:
    gate, _, markdown = whole()
    ids = next(
        e["extra_info"]["run_ids"] for e in gate.entries if e["name"] == "metric/genome_full/trl/measured_seconds"
    )
    run = gate.runs[ids[0]]
    corpus = {"documents": 489.0, "tokens": 633_003.0, "tokens_squared": 4.1e9}
    minutes, seconds = divmod(round(3 * corpus_seconds(run.outcome.steps, 2, corpus)), 60)
    section = markdown.split("## The whole training run, projected")[1].split("\n## ")[0]
    assert "Not measured: projected" in section
    full = section.split("genome_full:")[1]
    assert f"| trl | {minutes} min {seconds:02d} s |" in full


def test_runs_without_the_corpus_sums_are_not_projected_and_it_says_so(tmp_path: Path) -> None:
    gate = small_gate(tmp_path)
    for path in (tmp_path / "store" / "runs").glob("*.json"):
        outcome = json.loads(path.read_text())
        outcome["record"]["inputs"]["corpus_tokens_squared"] = None
        path.write_text(json.dumps(outcome))
    _, markdown = report_of(gate)
    assert "not projected: the record holds no sums of the whole corpus" in markdown


def test_bars_are_as_long_as_their_values_are_large() -> None:
    gate, page, _ = whole()
    chart = page[page.index('id="time-genome_full"') :].split("</figure>")[0]
    marks = re.findall(r'data-series="(trl|unsloth)"><title>[^<]*</title><path d="M (\S+) \S+ L (\S+) ', chart)
    lengths = {name: float(end) - float(start) for name, start, end in marks}
    seconds = {}
    for name in lengths:
        key = f"metric/genome_full/{name}/measured_seconds"
        data = sorted(next(e["stats"]["data"] for e in gate.entries if e["name"] == key))
        seconds[name] = data[len(data) // 2]
    assert lengths["trl"] / lengths["unsloth"] == pytest.approx(seconds["trl"] / seconds["unsloth"], rel=0.01)


def test_names_of_points_that_lie_together_are_moved_apart() -> None:
    dots = [Dot(name, name, 50 + place, 1000 + place, "") for place, name in enumerate(("legacy", "trl", "unsloth"))]
    svg = trade_off("x", "x", dots, "GiB", "tokens/s").svg
    heights = [float(y) for y, name in re.findall(r'<text [^>]*y="([\d.]+)">(legacy|trl|unsloth)</text>', svg)]
    assert len(heights) == 3
    assert min(abs(a - b) for a, b in combinations(heights, 2)) >= 12


def test_a_context_stands_there_with_its_budget_and_where_the_embedding_was(tmp_path: Path) -> None:
    gate = small_gate(tmp_path)
    found = {"backend": "unsloth", "predicted_tokens": 5_000, "tokens_fits": 4_864, "tokens_fails": 4_992}
    for budget, points in ((8.0, [[512, 6 << 30]]), (24.0, [[512, 7 << 30], [32_768, 12 << 30]])):
        on_host = {"is_embedding_on_host": budget == 8.0, "why": "stopped: for want of time" if budget == 8.0 else None}
        gate.entry(f"context/{budget:g}", "max_context", **found, **on_host, budget_gib=budget, points=points)
    page, markdown = report_of(gate)
    section = markdown.split("## Context against memory")[1].split("\n## ")[0].replace("\u00a0", " ")
    assert (
        "| unsloth, 8 GiB<br>its input embedding on the host; stopped: for want of time | 5,000 | 4,864 | 4,992 |"
        in section
    )
    assert "| unsloth, 24 GiB | 5,000 |" in section
    for row in ("| unsloth | 8 | 512 | 6.00 |", "| unsloth | 24 | 512 | 7.00 |", "| unsloth | 24 | 32,768 | 12.00 |"):
        assert row in section
    chart = page.split('id="context-memory"')[1] if 'id="context-memory"' in page else page
    assert "7.00 GiB at 512 tokens" in chart
    assert "6.00 GiB at 512 tokens" not in chart, "the line is the largest budget's"


def test_what_was_not_run_is_said(tmp_path: Path) -> None:
    gate = small_gate(tmp_path)
    gate.run(ARMS["genome_full", "trl"], "genome_full", status="out_of_memory")
    gate.entry("not_run/x", "not_run", what="the small base", reason="no time was left")
    for number in range(3):  # one per metric
        gate.entry(f"not_run/{number}", "not_run", what="unsloth on legacy_256", reason="no time was left")
    _, markdown = report_of(gate)
    gaps = markdown.split("## What was not run")[1].split("## All runs")[0]
    assert "| the small base | no time was left |" in gaps
    silent = "no entry in the benchmark JSON |"
    assert f"| trl on genome_full | {silent}" in gaps
    assert f"| context of legacy in 24 GiB | {silent}" in gaps
    assert f"| matrix-product peak | {silent}" in gaps
    assert "| unsloth on genome_full |" not in gaps  # it was run
    assert gaps.count("| unsloth on legacy_256 |") == 1
    assert f"| unsloth on legacy_256 | {silent}" not in gaps  # the gate itself says why
    assert re.search(r"\| trl genome_full \| out of memory \|", gaps)


# Verdicts are never green by mistake


def test_a_whole_gate_that_passed_is_green() -> None:
    _, page, _ = whole()
    assert status_of(page) == "pass"
    assert page.count('class="badge pass"') == sum(map(len, EXPECTED.values()))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pairs": 3, "planned": 3, "seconds": 1.9}, "fail"),
        ({"pairs": 2, "planned": 5}, "incomplete"),
        ({"pairs": 3, "planned": 3, "seconds": 1.65}, "inconclusive"),
    ],
)
def test_only_a_pass_looks_like_one(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    page, markdown = report_of(small_gate(tmp_path, **changes))
    assert f'class="badge {expected}"' in page
    assert 'class="badge pass"' not in page
    assert status_of(page) != "pass"
    assert f"**{expected.upper()}**" in markdown
    line = next(line for line in markdown.splitlines() if "claim-genome_full_speed" in line)
    assert line.startswith({"fail": "| ✗", "incomplete": "| …", "inconclusive": "| ?"}[expected])  # not by colour alone


def test_a_claim_that_the_gate_left_out_is_incomplete(tmp_path: Path) -> None:
    page, markdown = report_of(small_gate(tmp_path))
    assert 'class="badge pass"' in page  # one claim passed
    assert status_of(page) == "incomplete"
    assert markdown.startswith("# Forge, acceptance gate: … INCOMPLETE")
    assert "control_aa: no verdict" in markdown


def test_a_gate_that_ended_early_is_incomplete_even_if_all_claims_passed(tmp_path: Path) -> None:
    gate, _, _ = whole()
    path = tmp_path / "benchmark.json"
    content = json.loads((gate.directory / "benchmark.json").read_text())
    path.write_text(json.dumps({**content, "is_partial": True}))
    assert main([str(path), "--store", str(gate.directory / "store"), "-o", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert status_of(page) == "incomplete"
    assert "the gate ended early" in page


@pytest.mark.parametrize("num_pairs", [0, 2])
def test_a_candidate_that_runs_out_of_memory_fails_in_words_and_without_a_bar(tmp_path: Path, num_pairs: int) -> None:
    gate = Gate(tmp_path)
    arms = [ARMS["genome_full", name] for name in ("legacy", "unsloth")]
    legacy, unsloth = ([gate.run(arm, "genome_full") for _ in range(num_pairs)] for arm in arms)
    legacy.append(gate.run(arms[0], "genome_full"))
    unsloth.append(gate.run(arms[1], "genome_full", status="out_of_memory"))
    gate.metrics("genome_full", "legacy", "legacy", legacy)
    gate.metrics("genome_full", "unsloth", "unsloth", unsloth[-1:])
    gate.claim(CLAIM["genome_full_speed"], legacy, unsloth)
    page, markdown = report_of(gate)
    assert status_of(page) == "fail"
    assert "the candidate cannot run this: out_of_memory" in page
    assert re.search(r"\| unsloth \| – \| out of memory \|", markdown)
    chart = page[page.index('id="time-genome_full"') :].split("</figure>")[0]
    assert 'data-series="legacy"' in chart
    assert 'data-series="unsloth"' not in chart
    assert "out of memory" in chart


_RECORDING = """
import json, pathlib, pytest
from harness.recorder import CLOCK, record_facts, record_metric
ENTRIES = json.loads(pathlib.Path({path!r}).read_text())["benchmarks"]

@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("number", range(len(ENTRIES)))
def test_record(benchmark, number):
    info = dict(ENTRIES[number]["extra_info"])
    metric, unit = info.pop("metric", "none"), info.pop("unit")
    if unit == "none":
        record_facts(benchmark, metric=metric, **info)
    else:
        record_metric(benchmark, ENTRIES[number]["stats"]["data"], metric=metric, unit=unit, **info)
"""


def test_what_the_real_recorder_writes_is_read(tmp_path: Path) -> None:
    gate, _, markdown = whole()
    (tmp_path / "test_recording.py").write_text(_RECORDING.format(path=str(gate.directory / "benchmark.json")))
    recorded = tmp_path / "recorded.json"
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path)]
    command += ["-p", "no:cacheprovider", str(tmp_path), f"--benchmark-json={recorded}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    out = tmp_path / "out"
    assert main([str(recorded), "--store", str(gate.directory / "store"), "-o", str(out)]) == 0
    again = (out / "report.md").read_text(encoding="utf-8")
    ours, theirs = (text.split("## Verdicts")[1].split("## Environment")[0] for text in (again, markdown))
    assert ours == theirs
