"""All steps in order, each a command of its own in a fresh process, each resumable."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.training.backends import Backend
from forge.training.checks.machine import check_llama_cpp
from forge.training.config.workload import EvaluationSection, Workload
from forge.training.data.questions import holds_answer
from forge.training.evaluation.evaluate import (
    DEFAULT_SUBJECTS,
    has_anything_to_evaluate,
    stored_evaluation,
)
from forge.training.evaluation.record import Evaluation, FactAnswer, load_evaluation
from forge.training.export.chat import Settings, open_conversation
from forge.training.export.disk_space import peak_disk_bytes
from forge.training.models.weights import read_weights
from forge.training.system.command import counted, printable, say, shown_path
from forge.training.system.errors import CheckError, DataError, ForgeError
from forge.training.system.files import read_json_object, remove, sha256_file, write_json
from forge.training.system.signals import run_following
from forge.training.train.record import RunRecord, completed_record
from forge.training.train.resume import same_command

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Outcome:
    """Seconds that each step took when it was done, what each GGUF answered, and the closing line.

    ``base_answers``: by question. ``faults``: why the run is not accepted.
    """

    run_dir: str
    seconds: dict[str, float | None] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    base_answers: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    verdict: str = ""

    def require_success(self) -> None:
        """Raise :class:`CheckError` where the run has faults that its config does not allow."""
        if self.faults:
            raise CheckError(self.verdict, remedy="train longer, or look at the answers in report.html")


_SHOWN_CHARACTERS = 200
_OF_THE_MACHINE = (5, 6, 9)  # memory, disk, a lock: put right, the same command can do it
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
    budget: str | None = None,
    force: bool,
    console: Console,
) -> Outcome:
    """Train, evaluate, export and ask every exported GGUF the config's facts.

    Each step compares what it would use with what it used, and says so where there is nothing to do. Where nothing
    was held out and no facts are asked there is nothing to evaluate, and the export follows. Raises the step's error;
    whether the run is accepted, :meth:`Outcome.require_success` says.
    """
    list(check_llama_cpp())  # before hours are spent: training alone does without it
    before = _outcome_before(run_dir)
    outcome = Outcome(run_dir=str(run_dir.absolute()))
    typed = os.path.join(os.curdir, run_dir)  # so that one that begins with a dash is no option
    given = [("--set", setting) for setting in overrides] + [("--plan", setting) for setting in plan]
    given += [("--budget", budget)] if budget is not None else []
    arguments = [part for option in given for part in option]

    def step(name: str, *command: str) -> None:
        console.print(f"[bold]{name}[/]")
        old = _digest(run_dir / _RESULTS[name])
        started = time.perf_counter()
        code = run_following([sys.executable, "-m", "forge.training", name, *command])
        if code:
            ended = f"exit code {code}" if code > 0 else f"signal {-code}"
            now = _digest(run_dir / _RESULTS[name])
            has_begun = name != "train" or (now is not None and not (force and now == old))
            remedy = _remedy(code, force=force, has_begun=has_begun)
            raise ForgeError.of_child(code, f"step {name!r} ended with {ended}", remedy=remedy)
        is_new = _digest(run_dir / _RESULTS[name]) != old
        outcome.seconds[name] = time.perf_counter() - started if is_new else before.get(name)

    step("train", source, "--backend", backend, "--out", typed, *arguments, *(["--force"] if force else []))
    trained = completed_record(run_dir)
    merged = run_dir / "merged"
    is_kept = merged.exists()  # by a `forge export --keep-merged`
    try:
        if has_anything_to_evaluate(trained):
            once = ["--keep-merged"] if _has_room_for_merged(trained, run_dir) else []
            step("evaluate", typed, *once, *_renewed(trained, run_dir, console))
        else:
            console.print(
                "[yellow]warning: nothing was held out and the config asks for no facts: not evaluated[/]\n"
                "  -> data.validation_share=0.1 holds a tenth of the documents out"
            )
        step("export", typed)
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


def _remedy(code: int, *, force: bool, has_begun: bool) -> str:
    """What to do after a step that ended with ``code``; ``has_begun``: there is a run by this command to resume."""
    again = f"{same_command(force=force)} resumes at this step"
    if code < 0 or code in (130, 143):
        return again if has_begun else "nothing was trained yet: the same command begins again"
    put_right = "put right what is said above"
    return f"{put_right}, then {again}" if code in _OF_THE_MACHINE and has_begun else put_right


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
    facts, rows = workload.evaluation.facts, []
    settings = Settings(workload.data.system_prompt, max_tokens=workload.evaluation.max_new_tokens, gpu_layers=0)
    for model in sorted((run_dir / "export").glob("*.gguf")) if facts else ():
        if model.stem.endswith("-lora"):
            continue
        with open_conversation(model, settings) as opened:
            for fact in facts:
                opened.reset()
                text = opened.say(fact.question)
                found = holds_answer(text, fact.answer)
                rows.append({"model": model.name, "question": fact.question, "answer": text, "found": found})
    return rows


def _judge(workload: Workload, run_dir: Path, outcome: Outcome) -> None:
    """Say in ``outcome`` what the run has proven, and what is wrong where the config insists on it."""
    path = run_dir / "evaluation.json"
    evaluation = load_evaluation(path, remedy=f"forge evaluate {run_dir} --force") if path.is_file() else None
    outcome.base_answers = {row.question: row.answer for row in _rows(evaluation, "base")}
    wrong = find_faults(workload.evaluation, evaluation, outcome.answers)
    files = counted(len(list((run_dir / "export").glob("*.gguf"))), "GGUF file")
    loss = ""
    if evaluation is not None and (pair := _loss_change(evaluation)) is not None:
        loss = f"; held-out loss {pair[0]:.3f} -> {pair[1]:.3f} nats per token"
        best = completed_record(run_dir).losses.best_step
        loss += f" (best checkpoint: step {best})" if best is not None else ""
    if evaluation is not None and (pair := _change(evaluation, "general_nats_per_token")) is not None:
        loss += f"; on general text {pair[0]:.3f} -> {pair[1]:.3f}"
    if not workload.evaluation.facts:
        outcome.verdict = f"done: {files}, verified; no facts to ask (evaluation.facts){loss}"
    elif wrong and workload.evaluation.require_facts:
        outcome.faults = wrong
        outcome.verdict = f"FAIL: {'; '.join(wrong)}{loss}"
    elif wrong:
        right = sum(row["found"] for row in outcome.answers)
        outcome.verdict = (
            f"done: {files}, verified; {right} of {len(outcome.answers)} answers hold the fact that was asked for"
            f" (evaluation.require_facts is false: no failure){loss}"
        )
    else:
        outcome.verdict = f"PASS: {files}, verified; {_described(workload.evaluation)}{loss}"


def find_faults(
    wanted: EvaluationSection, evaluation: Evaluation | None, gguf_answers: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What speaks against a run, a line each: a fact that the base knew or a trained model does not, something known
    that was forgotten, a held-out loss that did not fall.

    ``gguf_answers``: rows of ``model``, ``question`` and ``found``.
    """
    new = [fact.question for fact in wanted.facts if not fact.known]
    known = [fact.question for fact in wanted.facts if fact.known]
    faults, found = [], {row.question: row.found for row in _rows(evaluation, "base")}
    faults += [f"the base knew it before training: {question}" for question in new if found.get(question)]
    faults += [f"the base does not know it: {question}" for question in known if not found.get(question, True)]
    said: dict[str, dict[str, bool]] = {}
    for row in evaluation.facts if evaluation is not None else ():
        if row.subject != "base":
            said.setdefault(row.subject, {})[row.question] = row.found
    for answer in gguf_answers:
        said.setdefault(str(answer["model"]), {})[str(answer["question"])] = bool(answer["found"])
    needed = len(new) if wanted.min_facts is None else min(wanted.min_facts, len(new))
    for model, answers in said.items():
        num_right = sum(answers.get(question, False) for question in new)
        if num_right < needed:
            faults.append(f"{model} answers {num_right} of {counted(len(new), 'fact')}, and {needed} are wanted")
        faults += [f"{model} has forgotten it: {question}" for question in known if not answers.get(question, False)]
    change = _loss_change(evaluation) if evaluation is not None else None
    if change is not None and not change[1] < change[0]:
        faults.append(f"held-out loss did not fall: {change[0]:.4f} -> {change[1]:.4f} nats per token")
    return faults


def _rows(evaluation: Evaluation | None, subject: str) -> list[FactAnswer]:
    return [row for row in evaluation.facts if row.subject == subject] if evaluation is not None else []


def _loss_change(evaluation: Evaluation) -> tuple[float, float] | None:
    """Held-out nats per token of the base and of what is exported; ``None`` where nothing was held out."""
    return _change(evaluation, "nats_per_token")


def _change(evaluation: Evaluation, figure: str) -> tuple[float, float] | None:
    losses: dict[str, float | None] = {row.subject: getattr(row, figure) for row in evaluation.subjects}
    before, after = losses.get("base"), losses.get("merged", losses.get("adapter"))
    return None if before is None or after is None else (before, after)


def _described(wanted: EvaluationSection) -> str:
    num_known = sum(fact.known for fact in wanted.facts)
    num_new = len(wanted.facts) - num_known
    least = num_new if wanted.min_facts is None else min(wanted.min_facts, num_new)
    what = f"each answers {'at least ' if least < num_new else ''}{least} of {counted(num_new, 'fact')}"
    what += " that the base did not know"
    return what + (f", and {counted(num_known, 'thing')} that it knew" if num_known else "")


def print_outcome(outcome: Outcome, run_dir: Path, console: Console) -> None:
    """Seconds of each step, what base and GGUF files answered to each question, and the closing line."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="run", title_justify="left")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    for name, seconds in outcome.seconds.items():
        table.add_row(name, "before" if seconds is None else f"{seconds:.1f}")
    console.print(table)
    if outcome.answers:
        models = list(dict.fromkeys(str(row["model"]) for row in outcome.answers))
        answers = Table(title="answers", title_justify="left", show_lines=True)
        for name in ("question", "base", *models):
            answers.add_column(Text(name), overflow="fold")
        said = {(row["question"], row["model"]): row for row in outcome.answers}
        for question in dict.fromkeys(str(row["question"]) for row in outcome.answers):
            cells = [_shown(outcome.base_answers.get(question, "(not asked)"))]
            for model in models:
                row = said[question, model]
                cells.append(f"{'yes' if row['found'] else 'NO'}: {_shown(row['answer'])}")
            answers.add_row(*(Text(cell) for cell in (question, *cells)))
        console.print(answers)
    say(console, shown_path(run_dir), "run directory: ")
    if not outcome.faults:
        say(console, outcome.verdict)


def _shown(text: str) -> str:
    """An answer on one line, its beginning."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]} ..."
