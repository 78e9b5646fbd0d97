"""All steps in order, each a command of its own in a fresh process, each resumable."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.training.backends import Backend
from forge.training.checks.machine import check_llama_cpp
from forge.training.config.workload import Workload
from forge.training.evaluation.evaluate import (
    DEFAULT_SUBJECTS,
    has_anything_to_evaluate,
    stored_evaluation,
)
from forge.training.export.chat import answer
from forge.training.export.disk_space import peak_disk_bytes
from forge.training.models.weights import read_weights
from forge.training.system.command import counted, say, shown_path
from forge.training.system.errors import CheckError, DataError, ForgeError
from forge.training.system.files import read_json_object, remove, sha256_file, write_json
from forge.training.system.signals import run_following
from forge.training.train.record import RunRecord, completed_record

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Outcome:
    """Seconds that each step took when it was done, what each GGUF answered, and the closing line."""

    run_dir: str
    seconds: dict[str, float | None] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    verdict: str = ""


_RESUMABLE = (5, 6, 9, 130, 143)  # memory, disk, a lock, an interruption
# What a step leaves: a step that leaves the same bytes as before found nothing to do.
_RESULTS = {"train": "run.json", "evaluate": "evaluation.json", "export": "export/SHA256SUMS"}


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
    """Train, evaluate, export and ask every exported GGUF the config's facts.

    Each step compares what it would use with what it used, and says so where there is nothing to do. Where nothing
    was held out and no facts are asked there is nothing to evaluate, and the export follows. Raises the step's error,
    and :class:`CheckError` if a fact that should be there after training is not.
    """
    list(check_llama_cpp())  # before hours are spent: training alone does without it
    before = _outcome_before(run_dir)
    outcome = Outcome(run_dir=str(run_dir))
    given = [("--set", setting) for setting in overrides] + [("--plan", setting) for setting in plan]
    arguments = [part for option in given for part in option]

    def step(name: str, *command: str) -> None:
        console.print(f"[bold]{name}[/]")
        old = _digest(run_dir / _RESULTS[name])
        started = time.perf_counter()
        code = run_following([sys.executable, "-m", "forge.training", name, *command])
        if code:
            ended = f"exit code {code}" if code > 0 else f"signal {-code}"
            goes_on = code in _RESUMABLE or code < 0
            remedy = "the same command resumes at this step" if goes_on else "put right what is said above"
            raise ForgeError.of_child(code, f"step {name!r} ended with {ended}", remedy=remedy)
        is_new = _digest(run_dir / _RESULTS[name]) != old
        outcome.seconds[name] = time.perf_counter() - started if is_new else before.get(name)

    step("train", source, "--backend", backend, "--out", str(run_dir), *arguments, *(["--force"] if force else []))
    trained = completed_record(run_dir)
    merged = run_dir / "merged"
    is_kept = merged.exists()  # by a `forge export --keep-merged`
    try:
        if has_anything_to_evaluate(trained):
            once = ["--keep-merged"] if _has_room_for_merged(trained, run_dir) else []
            step("evaluate", str(run_dir), *once, *_renewed(trained, run_dir, console))
        else:
            console.print(
                "[yellow]warning: nothing was held out and the config asks for no facts: not evaluated[/]\n"
                "  -> data.validation_share=0.1 holds a tenth of the documents out"
            )
        step("export", str(run_dir))
    finally:
        if not is_kept:
            remove(merged)
    started = time.perf_counter()
    outcome.answers = _ask_all(workload, run_dir)
    if outcome.answers:
        outcome.seconds["ask the GGUF"] = time.perf_counter() - started
    write_json(run_dir / "outcome.json", {"seconds": outcome.seconds, "answers": outcome.answers})
    _judge(workload, run_dir, outcome)
    return outcome


def _has_room_for_merged(run: RunRecord, run_dir: Path) -> bool:
    """Whether what is merged for the evaluation can stay for the export, beside the files that it makes."""
    base, quantizations = Path(run.base_path), run.workload["export"]["quantizations"]
    if not base.is_dir():
        return False
    needed = peak_disk_bytes(read_weights(base), quantizations, adapter_bytes=0, writes_merged=True, keeps_merged=True)
    return shutil.disk_usage(run_dir).free >= needed


def _renewed(run: RunRecord, run_dir: Path, console: Console) -> list[str]:
    """``--force`` where the evaluation that is there is of something else, such as other facts, which is said."""
    try:
        stored_evaluation(run, run_dir, DEFAULT_SUBJECTS, None, None)
    except DataError as error:
        say(console, f"{error.message}\nmeasured again")
        return ["--force"]
    return []


def _outcome_before(run_dir: Path) -> dict[str, float | None]:
    """Seconds of the steps as an earlier `run` left them."""
    path = run_dir / "outcome.json"
    seconds = read_json_object(path).get("seconds") if path.is_file() else None
    return seconds if isinstance(seconds, dict) else {}


def _digest(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


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
    """The facts: absent before, present after, in every form of the model; only told where they are not required."""
    path = run_dir / "evaluation.json"
    evaluation = read_json_object(path) if path.is_file() else {}
    wrong = [f"{row['model']} does not say it: {row['answer']!r:.200}" for row in outcome.answers if not row["found"]]
    for row in evaluation.get("facts", []):
        expected = row["subject"] != "base"
        if row["found"] != expected:
            verb = "does not say it" if expected else "knew it before training"
            wrong.append(f"{row['subject']} {verb}: {row['answer']!r:.200}")
    if wrong and workload.evaluation.require_facts:
        raise CheckError("the planted fact: " + "; ".join(wrong), remedy="train longer, or look at evaluation.json")
    files = counted(len(list((run_dir / "export").glob("*.gguf"))), "GGUF file")
    if not workload.evaluation.facts:
        outcome.verdict = f"done: {files}, verified; no facts to ask (evaluation.facts)"
    elif wrong:
        right = sum(row["found"] for row in outcome.answers)
        outcome.verdict = (
            f"done: {files}, verified; {right} of {len(outcome.answers)} answers hold the fact that was asked for"
            " (evaluation.require_facts is false: no failure)"
        )
    else:
        facts = counted(len(workload.evaluation.facts), "fact")
        outcome.verdict = f"PASS: {files}, verified; each answers {facts} that the base did not know"


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
        say(console, row["answer"], f"{row['model']}: ")
    say(console, shown_path(Path(outcome.run_dir)), "run directory: ")
    say(console, outcome.verdict)
