"""No gate is green on speed alone: each verdict on accuracy, export and reliability is there once, or it is missed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from harness.report.arms import Arm, arms_by_workload, ladder
from harness.report.evidence import Entry, Evidence, read_evidence
from harness.report.expected import EXPECTED, Expected
from harness.report.page.content import Table
from harness.report.sections import missing as gaps
from harness.report.sections.verdicts import Judged, judged_claims, overall
from harness.report.stated import ROOMS, statuses
from tests.support.report_pages import whole

ALL = [(kind, expected) for kind, found in EXPECTED.items() for expected in found]
Entries = list[dict[str, Any]]


@cache
def parts_of_whole() -> tuple[Evidence, list[Judged], dict[str, list[Arm]], list[Arm]]:
    directory = whole()[0].directory
    evidence = read_evidence(directory / "benchmark.json", directory / "store")
    return evidence, judged_claims(evidence), arms_by_workload(evidence), ladder(evidence)


def read_gaps(entries: Entries) -> tuple[str, dict[str, str]]:
    """The status of the whole gate with other entries, and what was not run with why."""
    of_whole, *rest = parts_of_whole()
    made = tuple(Entry(e["name"], e["extra_info"]["record_kind"], e["extra_info"], ()) for e in entries)
    evidence = replace(of_whole, entries=made)
    tables = [part for part in gaps.build(evidence, *rest).parts if isinstance(part, Table)]
    status = overall(rest[0], statuses(evidence))
    return status, {row.cells[0]: row.cells[1] for table in tables for row in table.rows}


def entries_of_whole() -> Entries:
    entries: Entries = json.loads(json.dumps(whole()[0].entries))
    return entries


def name_in_gaps(kind: str, expected: Expected) -> str:
    rung = f"rung {expected.number}, " if expected.number else ""
    return f"{ROOMS[kind]}: {rung}{expected.name.replace('_', ' ')}"


@pytest.mark.parametrize(("kind", "expected"), ALL, ids=lambda value: getattr(value, "metric", value))
def test_a_gate_that_lacks_one_verdict_is_incomplete_and_names_it(kind: str, expected: Expected) -> None:
    name = f"{kind}/{expected.metric}"
    entries = [entry for entry in entries_of_whole() if entry["name"] != name]
    assert len(entries) == len(entries_of_whole()) - 1
    status, missed = read_gaps(entries)
    assert status == "INCOMPLETE"
    assert missed[name_in_gaps(kind, expected)] == "no verdict in the benchmark JSON"


def _rename(entries: Entries, entry: dict[str, Any]) -> None:
    entry["extra_info"]["metric"] = "another"
    entry["extra_info"]["verdict"]["name"] = "another"


def _double(entries: Entries, entry: dict[str, Any]) -> None:
    entries.append(entry)


def _strip(entries: Entries, entry: dict[str, Any]) -> None:
    del entry["extra_info"]["verdict"]


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize(
    ("spoil", "why"), [(_rename, "no verdict in the"), (_double, "2 entries state it"), (_strip, "holds no verdict")]
)
def test_a_verdict_that_is_renamed_doubled_or_empty_is_missed(
    kind: str, spoil: Callable[[Entries, dict[str, Any]], None], why: str
) -> None:
    entries = entries_of_whole()
    expected = EXPECTED[kind][2]
    spoil(entries, next(entry for entry in entries if entry["name"] == f"{kind}/{expected.metric}"))
    status, missed = read_gaps(entries)
    assert status == "INCOMPLETE"
    assert why in missed[name_in_gaps(kind, expected)]


def test_a_gate_of_speed_alone_is_incomplete_and_names_every_verdict_it_lacks() -> None:
    entries = [entry for entry in entries_of_whole() if entry["extra_info"]["record_kind"] not in ROOMS]
    status, missed = read_gaps(entries)
    assert status == "INCOMPLETE"
    assert {name_in_gaps(kind, expected) for kind, expected in ALL} <= missed.keys()
    assert "export at 7B" in missed


def test_the_whole_gate_lacks_nothing() -> None:
    status, missed = read_gaps(entries_of_whole())
    assert status == "PASS"
    assert not {name_in_gaps(kind, expected) for kind, expected in ALL} & missed.keys()


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_verdict_that_could_not_be_reached_stands_among_what_was_not_run(kind: str) -> None:
    entries = entries_of_whole()
    expected = EXPECTED[kind][0]
    entry = next(entry for entry in entries if entry["name"] == f"{kind}/{expected.metric}")
    entry["extra_info"]["verdict"].update(status="INCOMPLETE", reason="no time was left")
    status, missed = read_gaps(entries)
    assert status == "INCOMPLETE"
    assert missed[name_in_gaps(kind, expected)] == "no time was left"


def test_what_was_found_of_killed_and_stopped_runs_stands_there_with_its_probe() -> None:
    _, page, markdown = whole()
    section = markdown.split("## Reliability")[1].split("\n## ")[0].replace("\\", "")
    rows = [line for line in section.splitlines() if line.startswith("|")]
    for found in (
        "| killed, resumed from step 10: relative difference from a whole run | 0, the same bits "
        "| two whole runs: 0, the same bits |",
        "| seconds from SIGTERM to the end | 5.2 | at most 30 |",
        "| micro-batch that it went on with | 2 | within 8 GiB |",
        "pre_optimizer_step, optimizer_step, step_end, log, evaluate, save | 8 |",
    ):
        line = next((row for row in rows if found in row.replace("\u00a0", " ")), None)
        assert line is not None, found
        assert "(#run-survival-" in line
    assert 'id="run-survival-unsloth-' in page
