"""What a run carries for rungs 4 to 6: its evaluation, and an adapter in float32 where its spec asks for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from harness.measurement.environment import train_command
from harness.measurement.key import identify
from harness.measurement.results import RunSpec, Store
from harness.measurement.runner import run_once
from harness.parity.outcome import read_evaluation
from harness.parity.session import Ladder
from harness.session import Session
from tests.support.fake_runs import fake

SPEC = RunSpec(backend="trl", workload="smoke", evaluate=True)
WRITES = "open(f'{RUN}/evaluation.json', 'w').write('{\"documents\": [], \"base_path\": \"/home/x/base\"}')"


def test_only_a_spec_that_asks_for_it_says_so_in_its_key() -> None:
    plain = RunSpec(backend="trl", workload="smoke")
    assert set(plain.model_dump()) == {"backend", "workload", "overrides", "plan_overrides"}
    assert not {"evaluation", "float32_adapter"} & set(identify(plain).parts)
    keys = {identify(plain.model_copy(update=more)).key for more in ({}, {"evaluate": True}, {"float32_adapter": True})}
    assert len(keys) == 3
    asked = plain.model_copy(update={"evaluate": True})
    assert RunSpec.model_validate(asked.portable().model_dump(mode="json")) == asked
    other_fact = asked.model_copy(update={"overrides": ("evaluation.num_answers=1",)})
    assert identify(other_fact).parts["evaluation"] != identify(asked).parts["evaluation"]


def evaluator(code: str) -> Any:
    """An evaluation that is a line of Python; ``RUN`` is the run's directory."""
    return lambda run_dir: [sys.executable, "-I", "-c", f"import sys, time; RUN = {str(run_dir)!r}\n{code}"]


def test_the_adapter_is_evaluated_before_its_directory_is_gone_and_the_answer_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    outcome = run_once(SPEC, store=store, command=fake(), evaluation_command=evaluator(WRITES))
    assert outcome.status == "completed"
    assert outcome.evaluation == {"documents": [], "base_path": "base"}
    assert store.read(outcome.run_id) == outcome
    plain = SPEC.model_copy(update={"evaluate": False})
    assert run_once(plain, store=store, command=fake(), evaluation_command=evaluator("1 / 0")).evaluation is None


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        ("sys.exit('error: a loss is not finite')", "crashed", "its evaluation: exit code 1: a loss is not finite"),
        ("print('error: a loss is not finite'); sys.exit(3)", "crashed", "a loss is not finite"),
        ("print('error: the disk is full'); sys.exit(6)", "refused", "its evaluation: the disk is full"),
        ("sys.exit(5)", "out_of_memory", "its evaluation"),
        ("pass", "no_record", "evaluation.json"),
        ("time.sleep(60)", "timeout", "its evaluation: stopped after 1.5 seconds"),
    ],
)
def test_a_run_whose_evaluation_fails_is_not_complete(tmp_path: Path, code: str, status: str, says: str) -> None:
    limits = {"time_limit_seconds": 1.5 if status == "timeout" else 60, "grace_seconds": 1}
    store = Store(tmp_path / "store")
    outcome = run_once(SPEC, store=store, command=fake(), evaluation_command=evaluator(code), **limits)
    assert (outcome.status, outcome.evaluation) == (status, None)
    assert says in (outcome.message or "")


def test_a_run_that_failed_is_not_evaluated(tmp_path: Path) -> None:
    command = fake(exit_code=5, record={"status": "out_of_memory"})
    outcome = run_once(
        SPEC, store=Store(tmp_path / "s"), command=command, evaluation_command=evaluator("time.sleep(60)")
    )
    assert outcome.status == "out_of_memory"
    assert outcome.wall_seconds < 30


def planted(fault: str) -> Any:
    """The real command of a run, with a fault in it."""

    def command(spec: RunSpec, run_dir: Path) -> list[str]:
        python, _, *rest = train_command(spec, run_dir)
        return [python, "-m", "tests.support.faults", fault, *rest]

    return command


@pytest.mark.slow
def test_real_runs_are_evaluated_and_keep_their_adapter_in_float32_where_asked(tmp_path: Path, corpus: Path) -> None:
    small = (
        *("model.quantization=none", "data.max_length=128", "training.max_steps=6"),
        *("evaluation.num_answers=1", "evaluation.max_new_tokens=8"),
    )
    store = Store(tmp_path / "store")
    ladder = Ladder(Session(store=store, train=corpus), base="tiny", overrides=small)
    outcome = ladder.outcome(ladder.spec("trl", 7, plan=("micro_batch=4",), evaluate=True))
    assert outcome is not None
    assert outcome.status == "completed", outcome.message
    evaluation = read_evaluation(outcome)
    assert len(evaluation.documents) == 48
    assert evaluation.adapter < evaluation.base - 0.01, "six steps on documents like these help"
    assert (evaluation.num_facts, evaluation.num_facts_found_by_base) == (1, 0)
    assert str(tmp_path) not in (tmp_path / "store" / "runs" / f"{outcome.run_id}.json").read_text()
    dtypes = []
    for float32 in (False, True):
        spec = ladder.spec("trl", 7, plan=("micro_batch=4",), float32_adapter=float32)
        faulty = run_once(spec, store=store, command=planted("bfloat16_adapter"))
        assert faulty.record is not None, faulty.message
        dtypes.append(faulty.record["trainable"]["dtype"])
    assert dtypes == ["bfloat16", "float32"]
