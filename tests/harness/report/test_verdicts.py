"""No gate is green by what its JSON says: claims are judged again from the runs, and each verdict is there once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from forge.training.report.page.content import Table
from forge.training.system.errors import DataError
from harness.perf.claims import CLAIMS, judge
from harness.report.arms import ablation, arms_by_workload
from harness.report.evidence import Entry, Evidence, read_evidence
from harness.report.sections import missing
from harness.report.verdicts import EXPECTED, SUITES, Judged, judge_all, label, overall
from harness.verdict import Verdict
from tests.support.report_pages import whole

ALL = [(kind, verdict) for kind, verdicts in EXPECTED.items() for verdict in verdicts]
SPEED = "genome_full_speed"
Entries = list[dict[str, Any]]


@cache
def whole_evidence() -> Evidence:
    directory = whole()[0].directory
    return read_evidence(directory / "benchmark.json", directory / "store")


def entries_of_whole() -> Entries:
    return copy.deepcopy(whole()[0].entries)


def verdict_of(entries: Entries, name: str) -> dict[str, Any]:
    """What the one entry of this name (KIND/VERDICT) states, to be changed in place."""
    verdict: dict[str, Any] = next(e["extra_info"]["verdict"] for e in entries if e["name"] == name)
    return verdict


def judged_with(entries: Entries) -> tuple[Evidence, dict[str, list[Judged]]]:
    """The whole gate's store with these entries."""
    made = (Entry(e["name"], e["extra_info"]["record_kind"], e["extra_info"], ()) for e in entries)
    evidence = replace(whole_evidence(), entries=tuple(made))
    return evidence, judge_all(evidence)


def status_and_missing(entries: Entries) -> tuple[str, dict[str, str]]:
    """The gate's status, and what was not run with why."""
    evidence, judged = judged_with(entries)
    section = missing.build(evidence, judged, arms_by_workload(evidence), ablation(evidence))
    tables = [part for part in section.parts if isinstance(part, Table)]
    return overall(judged), {row.cells[0]: row.cells[1] for table in tables for row in table.rows}


def name_in_missing(kind: str, verdict: Verdict) -> str:
    return f"{SUITES[kind]}: {label(verdict)}"


# Each verdict is there once


@pytest.mark.parametrize(("kind", "verdict"), ALL, ids=lambda value: getattr(value, "name", value))
def test_a_gate_that_lacks_one_verdict_is_incomplete_and_names_it(kind: str, verdict: Verdict) -> None:
    entries = [entry for entry in entries_of_whole() if entry["name"] != f"{kind}/{verdict.name}"]
    assert len(entries) == len(entries_of_whole()) - 1
    status, missed = status_and_missing(entries)
    assert status == "INCOMPLETE"
    assert missed[name_in_missing(kind, verdict)] == "no verdict in the benchmark JSON"


def _rename(entries: Entries, entry: dict[str, Any]) -> None:
    entry["extra_info"]["verdict"]["name"] = "another"


def _double(entries: Entries, entry: dict[str, Any]) -> None:
    entries.append(entry)


def _strip(entries: Entries, entry: dict[str, Any]) -> None:
    del entry["extra_info"]["verdict"]


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize(("spoil", "why"), [(_rename, "no verdict"), (_double, "2 entries"), (_strip, "no verdict")])
def test_a_verdict_that_is_renamed_doubled_or_empty_is_missed(
    kind: str, spoil: Callable[[Entries, dict[str, Any]], None], why: str
) -> None:
    entries = entries_of_whole()
    verdict = EXPECTED[kind][2]
    spoil(entries, next(entry for entry in entries if entry["name"] == f"{kind}/{verdict.name}"))
    status, missed = status_and_missing(entries)
    assert status == "INCOMPLETE"
    assert why in missed[name_in_missing(kind, verdict)]


def test_a_gate_of_speed_alone_is_incomplete_and_names_every_verdict_it_lacks() -> None:
    entries = [e for e in entries_of_whole() if e["extra_info"]["record_kind"] not in SUITES.keys() - {"claim"}]
    status, missed = status_and_missing(entries)
    assert status == "INCOMPLETE"
    assert {name_in_missing(kind, verdict) for kind, verdict in ALL if kind != "claim"} <= missed.keys()
    assert "export at 7B" in missed


def test_the_whole_gate_lacks_nothing() -> None:
    status, missed = status_and_missing(entries_of_whole())
    assert status == "PASS"
    assert not {name_in_missing(kind, verdict) for kind, verdict in ALL} & missed.keys()


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_verdict_that_could_not_be_reached_stands_among_what_was_not_run(kind: str) -> None:
    entries = entries_of_whole()
    verdict = EXPECTED[kind][0]
    unmeasured = {**verdict.figures, "num_pairs": 0} if kind == "claim" else {}
    stated = verdict_of(entries, f"{kind}/{verdict.name}")
    stated.update(status="INCOMPLETE", reason="no time was left", figures=unmeasured or stated["figures"])
    status, missed = status_and_missing(entries)
    assert status == "INCOMPLETE"
    assert missed[name_in_missing(kind, verdict)] == "no time was left"


# What the runs say


@pytest.mark.parametrize(
    "forged",
    [
        {"low": 1.9},
        {"low": None},
        {"num_pairs": 4},
        {"num_pairs": 6},
        {"num_pairs": -1},
        {"num_pairs": 0},
        {"num_pairs": "all"},
        {"num_pairs_planned": 6},
        {"pairs_needed": 7},
        {"high": math.inf},
        {"estimate": math.nan},
        {"estimate": "3"},
        {"extra": 1},
    ],
)
def test_a_pass_whose_figures_are_not_those_of_the_pairs_is_refused(forged: dict[str, Any]) -> None:
    entries = entries_of_whole()
    verdict_of(entries, f"claim/{SPEED}")["figures"].update(forged)
    with pytest.raises(DataError, match=SPEED):
        judged_with(entries)


@pytest.mark.parametrize("status", ["FAIL", "INCONCLUSIVE", "INCOMPLETE", "GOOD"])
def test_another_status_than_the_pairs_earn_is_refused(status: str) -> None:
    entries = entries_of_whole()
    verdict_of(entries, f"claim/{SPEED}")["status"] = status
    with pytest.raises(DataError, match=f"{SPEED}: .*status"):
        judged_with(entries)


def test_a_pass_without_figures_is_refused() -> None:
    entries = entries_of_whole()
    verdict_of(entries, f"claim/{SPEED}")["figures"] = {}
    with pytest.raises(DataError, match=SPEED):
        judged_with(entries)


def test_a_verdict_on_a_trial_that_the_store_lacks_is_refused() -> None:
    entries, evidence = entries_of_whole(), whole_evidence()
    made = (Entry(e["name"], e["extra_info"]["record_kind"], e["extra_info"], ()) for e in entries)
    trials = {name: trial for name, trial in evidence.trials.items() if name != "control_aa"}
    with pytest.raises(DataError, match="control_aa: status is PASS"):
        judge_all(replace(evidence, entries=tuple(made), trials=trials))


@pytest.mark.parametrize("forged", [{"bar": 1.0}, {"metric": "peak_allocated_bytes"}, {"name": "x"}])
def test_a_pass_on_another_claim_than_the_acceptance_tables_is_incomplete(forged: dict[str, Any]) -> None:
    entries = entries_of_whole()
    verdict_of(entries, f"claim/{SPEED}")["figures"]["claim"].update(forged)
    status, missed = status_and_missing(entries)
    assert status == "INCOMPLETE"
    assert "another claim" in missed["claim: genome full speed"]


def test_a_trial_that_was_measured_further_since_bears_out_the_verdict_on_its_first_pairs() -> None:
    entries, evidence = entries_of_whole(), whole_evidence()
    claim = next(claim for claim in CLAIMS if claim.name == SPEED)
    pairs = evidence.trials["genome_full"].pairs[:2]
    baseline, candidate = (
        [evidence.runs[getattr(pair, role)].measure(claim.metric) or 0.0 for pair in pairs]
        for role in ("baseline", "candidate")
    )
    done = ["completed"] * 2
    earlier = judge(
        claim, baseline, candidate, num_pairs_planned=5, baseline_statuses=done, candidate_statuses=done
    ).to_dict()
    verdict_of(entries, f"claim/{SPEED}").update(earlier)
    status, missed = status_and_missing(entries)
    assert status == "INCOMPLETE"
    assert missed["claim: genome full speed"] == earlier["reason"] == "2 of 5 pairs measured"


def test_what_was_measured_of_killed_and_stopped_runs_stands_there_with_its_probe() -> None:
    _, page, markdown = whole()
    section = markdown.split("## Reliability")[1].split("\n## ")[0].replace("\\", "")
    rows = [line for line in section.splitlines() if line.startswith("|")]
    for cells in (
        "| killed, resumed from step 10: relative difference from a whole run | 0, the same bits "
        "| two whole runs: 0, the same bits |",
        "| seconds from SIGTERM to the end | 5.2 | at most 30 |",
        "| micro-batch that it continued with | 2 | within 8 GiB |",
        "pre_optimizer_step, optimizer_step, step_end, log, evaluate, save | 8 |",
    ):
        line = next((row for row in rows if cells in row.replace("\u00a0", " ")), None)
        assert line is not None, cells
        assert "(#run-survival-" in line
    assert 'id="run-survival-unsloth-' in page
