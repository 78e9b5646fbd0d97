"""How far a run is, by its status, its step log and its record, and what to type next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forge.training.system.command import shown_path
from forge.training.system.errors import DataError, ForgeError
from forge.training.system.files import lock_holder
from forge.training.train.record import RunRecord, predecessor_directory, read_record
from forge.training.train.status import read_status
from forge.training.train.step_log import read_step_log


def describe_status(run_dir: Path | str) -> dict[str, Any]:
    """The status and what the run's files say beside it; what is not known is ``None``.

    ``holder``: the process in the directory. ``killed``: it ended without saying so. ``loss`` and
    ``validation_loss``: the last ones, nats per trained token; ``best_*``: the lowest held-out loss.
    ``tokens_per_second``: of the last steps; ``seconds_left``: of training, at their pace. ``next``: the command
    to type next, as its words.
    """
    run_dir = Path(run_dir)
    status, holder = read_status(run_dir), lock_holder(run_dir)
    killed = holder is None and status.state in ("starting", "running")
    log = read_step_log(run_dir)
    step = max([status.step, *(step for step, _ in log.losses[-1:])]) if holder is not None else status.step
    left = max((status.num_planned_steps or step) - step, 0)
    best_step, best_loss = log.best or (None, None)
    following, remedy = None, status.remedy
    try:
        following = next_command(run_dir) if holder is None else None
    except DataError as error:  # the run that it continues is gone
        remedy = str(error)
    return {
        **status.model_dump(mode="json"),
        "remedy": remedy,
        "step": step,
        "holder": holder,
        "killed": killed,
        "run_dir": str(run_dir.absolute()),
        "loss": log.losses[-1][1] if log.losses else None,
        "validation_loss": log.validation[-1][1] if log.validation else None,
        "best_step": best_step,
        "best_validation_loss": best_loss,
        "tokens_per_second": log.tokens_per_second,
        "seconds_left": left * log.seconds_per_step if left and log.seconds_per_step is not None else None,
        "next": following,
    }


def next_command(run_dir: Path, export_dir: Path | None = None) -> list[str] | None:
    """What to type after what a run directory holds: train, evaluate, export or chat, with what it needs.

    ``export_dir``: where the export is, if not in the run. ``None`` where nothing can be said. Raises
    :class:`DataError` for an unfinished run that continues one which is gone.
    """
    try:
        record = read_record(run_dir)
    except ForgeError:
        return None
    if record.status != "completed":
        return _same_training(run_dir, record)
    run, config = shown_path(run_dir), record.workload
    facts = config.get("evaluation", {}).get("facts") or ()
    export_dir = export_dir or run_dir / "export"
    if not (export_dir / "export.json").is_file():
        can_evaluate = record.inputs.num_validation_examples or facts
        if can_evaluate and not (run_dir / "evaluation.json").is_file():
            return ["forge", "evaluate", run]
        return ["forge", "export", run]
    talk_to = run if export_dir == run_dir / "export" else shown_path(export_dir)
    return ["forge", "chat", talk_to, *(str(fact["question"]) for fact in facts[:1])]


def _same_training(run_dir: Path, record: RunRecord) -> list[str] | None:
    """The command that resumes a run by its own stored config, beside which its plan is."""
    stored = run_dir / "workload.yaml"
    if not stored.is_file() or record.status == "diverged":  # the same would diverge again
        return None
    command = ["forge", "train", shown_path(stored), "--backend", record.backend, "--out", shown_path(run_dir)]
    if record.continues:
        command += ["--continue", shown_path(predecessor_directory(run_dir, record))]
    return command
