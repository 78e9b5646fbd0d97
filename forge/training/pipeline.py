"""All steps in order, each a command of its own in a fresh process, each resumable."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.training.backends import Backend
from forge.training.config.workload import Workload, changed_keys, load_workload
from forge.training.export.chat import answer
from forge.training.system.errors import CheckError, ConfigurationError, ForgeError
from forge.training.system.files import write_json
from forge.training.system.signals import run_following
from forge.training.train.record import read_record

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Outcome:
    """Seconds of each step done now (``None``: done before), and what each GGUF answered."""

    run_dir: str
    seconds: dict[str, float | None] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)


def run_pipeline(
    workload: Workload,
    source: str,
    backend: Backend,
    run_dir: Path,
    *,
    overrides: list[str],
    plan: list[str],
    force: bool,
    console: Console,
) -> Outcome:
    """Check, train, evaluate, export and ask every exported GGUF the config's facts.

    A step whose artefact is complete is not done again. Raises the step's error, and
    :class:`CheckError` if a fact that should be there after training is not.
    """
    if force and run_dir.exists():
        shutil.rmtree(run_dir)
    _refuse_other_work(workload, run_dir)
    outcome = Outcome(run_dir=str(run_dir))
    arguments = [argument for key in overrides for argument in ("--set", key)]
    planned = [argument for key in plan for argument in ("--plan", key)]

    def step(name: str, done: bool, *command: str) -> None:
        if done:
            console.print(f"[bold]{name}[/]: done before")
            outcome.seconds[name] = None
            return
        console.print(f"[bold]{name}[/]", end="\n")
        started = time.perf_counter()
        code = run_following([sys.executable, "-m", "forge.training", *command])
        if code:
            ended = f"exit code {code}" if code > 0 else f"signal {-code}"
            raise ForgeError.of_child(
                code, f"step {name!r} ended with {ended}", remedy="the same command resumes at this step"
            )
        outcome.seconds[name] = time.perf_counter() - started

    step("base", False, "base", workload.model.path)
    step("check", False, "check", source, "--backend", backend, *arguments)
    trained = (run_dir / "run.json").is_file() and read_record(run_dir).status == "completed"
    step("train", trained, "train", source, "--backend", backend, "--out", str(run_dir), *arguments, *planned)
    step("evaluate", (run_dir / "evaluation.json").is_file(), "evaluate", str(run_dir))
    step("export", (run_dir / "export" / "SHA256SUMS").is_file(), "export", str(run_dir))
    started = time.perf_counter()
    outcome.answers = _ask_all(workload, run_dir)
    outcome.seconds["ask the GGUF"] = time.perf_counter() - started
    write_json(run_dir / "outcome.json", {"seconds": outcome.seconds, "answers": outcome.answers})
    _judge(workload, run_dir, outcome)
    return outcome


def _refuse_other_work(workload: Workload, run_dir: Path) -> None:
    stored = run_dir / "workload.yaml"
    if not stored.is_file():
        return
    before, now = load_workload(stored).model_dump(mode="json"), workload.model_dump(mode="json")
    changed = changed_keys(before, now)
    if changed:
        raise ConfigurationError(
            f"{run_dir} holds a run of another config:\n" + "\n".join(changed),
            remedy="pass --force to start afresh, or --out for another directory",
        )


def _ask_all(workload: Workload, run_dir: Path) -> list[dict[str, Any]]:
    rows = []
    for model in sorted((run_dir / "export").glob("*.gguf")):
        if model.stem.endswith("-lora"):
            continue
        for fact in workload.evaluation.facts:
            text = answer(
                model, fact.question, system=workload.data.system_prompt, max_tokens=workload.evaluation.max_new_tokens
            )
            rows.append({"model": model.name, "question": fact.question, "answer": text, "found": fact.answer in text})
    return rows


def _judge(workload: Workload, run_dir: Path, outcome: Outcome) -> None:
    """The planted facts: absent before, present after, in every form of the model."""
    evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    wrong = [f"{row['model']} does not say it: {row['answer']!r:.200}" for row in outcome.answers if not row["found"]]
    for row in evaluation.get("facts", []):
        expected = row["subject"] != "base"
        if row["found"] != expected:
            verb = "does not say it" if expected else "knew it before training"
            wrong.append(f"{row['subject']} {verb}: {row['answer']!r:.200}")
    if wrong:
        raise CheckError("the planted fact: " + "; ".join(wrong), remedy="train longer, or look at evaluation.json")


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Seconds of each step, and what the models answered."""
    from rich.table import Table

    table = Table(title="run", title_justify="left")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    for name, seconds in outcome.seconds.items():
        table.add_row(name, "before" if seconds is None else f"{seconds:.1f}")
    console.print(table)
    for row in outcome.answers:
        console.print(f"{row['model']}: {row['answer']}", markup=False)
    console.print(f"everything is in {outcome.run_dir}", markup=False)
