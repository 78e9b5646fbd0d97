"""`forge plan` and `train --budget` as processes: what is measured, remembered and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forge.training.config.plan import Plan
from forge.training.config.workload import load_workload
from forge.training.planner.planner import parse_gib
from forge.training.system.errors import ConfigurationError
from tests.support import run_command as command
from tests.support.run_command import Ended, planted_everywhere
from tests.support.tiny_run import settings, write_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("planner")
    write_inputs(made)
    return made


def typed(folder: Path, name: str, *more: str) -> list[str]:
    """A command on the config that ``tiny_run`` trains."""
    short = ("training.max_steps=3", "training.evaluate_every_steps=null", "training.save_every_steps=1")
    given = [*settings(folder), *(part for setting in short for part in ("--set", setting))]
    return [name, "smoke", "--backend", "trl", *given, *more]


def forge(folder: Path, name: str, *more: str, log: str = "plan", fault: str | None = None, **env: str) -> Ended:
    cache = {"FORGE_CACHE": str(folder / "cache")}
    return command.run(typed(folder, name, *more), folder / log, fault=fault, environment=cache | env)


def planned(done: Ended) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
def test_the_fastest_layout_of_both_kinds_of_layers_is_measured_once(folder: Path) -> None:
    first = forge(folder, "plan", "--json")
    answer = planned(first)
    assert "measuring layouts" in first.stderr
    kinds = {row["plan"]["kernels"] for row in answer["rows"]}
    assert kinds == {"forge", "stack"}
    fitting = [row for row in answer["rows"] if row["fits"]]
    assert answer["plan"] == max(fitting, key=lambda row: row["documents_per_second"])["plan"]
    assert all(0 < row["peak_bytes"] <= answer["limit_bytes"] for row in fitting)
    assert answer["how"] == "measured"
    again = forge(folder, "plan", "--json")
    assert planned(again) == answer
    assert "measuring" not in again.stderr
    table = forge(folder, "plan").stdout
    assert "measured on this machine" in table
    assert "trl:" in table or "the config's own plan is the fastest" in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.slow
def test_a_run_within_a_budget_trains_by_the_plan_and_corrects_it_where_it_was_wrong(folder: Path) -> None:
    budget = ("--budget", "6GiB", "--plan", "kernels=stack", "--plan", "gradient_checkpointing=none")
    answer = planned(forge(folder, "plan", "--json", *budget))
    assert answer["plan"]["micro_batch"] > 1
    out = ("--out", str(folder / "run"))
    environment = {**os.environ, **planted_everywhere(folder, "out_of_memory"), "FROM_STEP": "1"}
    environment["FORGE_CACHE"] = str(folder / "cache")
    line = [sys.executable, "-m", "forge.training", *typed(folder, "train", *budget, *out)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "run" / "run.json").read_text())
    assert record["plan"]["micro_batch"] == 1
    assert record["status"] == "completed"
    assert "training works without it" in done.stderr  # llama.cpp is not in this cache
    corrected = planned(forge(folder, "plan", "--json", *budget))
    assert corrected["changes"][-1] == "micro_batch=1"
    assert forge(folder, "train", *budget, *out).returncode == 0


def test_what_fits_nowhere_is_said_with_what_it_takes(folder: Path) -> None:
    done = forge(folder, "plan", "--card", "0.7501GiB")
    assert done.returncode == 5
    assert "no layout of this work fits into" in done.stderr
    assert "the least takes" in done.stderr


def test_a_card_that_is_not_here_is_computed_and_says_so(folder: Path) -> None:
    answer = planned(forge(folder, "plan", "--card", "24GiB", "--json"))
    assert answer["how"] == "computed"
    assert all(row["peak_bytes"] is None and row["documents_per_second"] is None for row in answer["rows"])
    text = forge(folder, "plan", "--card", "24GiB").stdout
    assert "not measured" in text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("plan", "--budget", "nine"), 2, "no amount of memory"),
        (("plan", "--budget", "0"), 2, "no amount of memory"),
        (("plan", "--budget", "8", "--card", "8"), 2, "give one of them"),
        (("train", "--budget", "-1GiB"), 2, "no amount of memory"),
        (("plan", "--plan", "kernels=magic"), 2, "kernels"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(folder: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = forge(folder, *arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_legacy_pipeline_has_no_layouts(folder: Path) -> None:
    done = command.run(["plan", "smoke", "--backend", "legacy"], folder / "legacy")
    assert done.returncode == 2
    assert "one layout" in done.stderr


def test_memory_is_read_as_people_write_it() -> None:
    assert [parse_gib(text, "--budget") for text in ("8", "8GiB", "8 gb", "7.5G")] == [8.0, 8.0, 8.0, 7.5]
    with pytest.raises(ConfigurationError, match="8 apples"):
        parse_gib("8 apples", "--budget")


def test_a_plan_shrinks_until_nothing_is_left_and_no_step_takes_more() -> None:
    """Each change is one of the plan's own keys, and keeping less comes before fewer documents at a time."""
    workload = load_workload("genome_full")
    plan = Plan(
        kernels="forge",
        padding="none",
        gradient_checkpointing="none",
        micro_batch_tokens=16384,
        dequantize_once=True,
    )
    seen = []
    while (change := plan.smaller(workload)) is not None:
        key, _, value = change.partition("=")
        seen.append(change)
        parsed = json.loads(value) if value[0].isdigit() or value == "false" else value
        plan = Plan.model_validate(plan.model_dump() | {key: parsed})
        assert len(seen) < 20
    assert seen == [
        "gradient_checkpointing=full",
        "dequantize_once=false",
        "gradient_checkpointing=offload",
        "micro_batch_tokens=8192",
        "micro_batch_tokens=4096",
        "micro_batch_tokens=2048",
        "micro_batch_tokens=1024",
        "mlp_tile_tokens=1024",
    ]
    kept = plan.model_copy(update={"kept_activations_gib": 1.0})
    assert kept.smaller(workload) == "kept_activations_gib=0.5"
    assert Plan(micro_batch=4).smaller(workload) == "micro_batch=2"
    assert Plan(micro_batch=1).smaller(workload) is None
