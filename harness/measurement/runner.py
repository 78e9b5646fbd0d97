"""One run in one fresh process, and what became of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from forge.training.system.environment import ROOT, describe_gpu
from forge.training.system.errors import DataError
from forge.training.system.files import disk_errors, read_json_object
from forge.training.system.oom import memory_that_ran_out
from forge.training.train.record import RunRecord, read_record
from harness.measurement.environment import EVALUATOR, environment, evaluate_command, train_command
from harness.measurement.gpu_monitor import GpuMonitor, ReadGpu, machine_id, wait_until_free
from harness.measurement.key import explain, identify
from harness.measurement.process import Ended, run_process
from harness.measurement.redact import log_tail, portable, without_paths
from harness.measurement.results import Outcome, RunSpec, RunStatus, Store

Command = Callable[[RunSpec, Path], list[str]]

TIME_LIMIT_SECONDS = 900.0
_LARGEST_STEP_LOG_BYTES = 64 << 20  # of a real run it has a thousandth of that

_BY_EXIT_CODE: dict[int, RunStatus] = {
    **{2: "refused", 3: "refused", 4: "refused", 6: "refused", 9: "refused"},
    **{5: "out_of_memory", 7: "diverged"},
}


def run_once(
    spec: RunSpec,
    *,
    store: Store,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
    command: Command = train_command,
    evaluation_command: Callable[[Path], list[str]] = evaluate_command,
    read_gpu: ReadGpu = describe_gpu,
    grace_seconds: float = 10.0,
    is_alone: bool = True,
) -> Outcome:
    """Run ``spec`` once, add its outcome to the store and return it; its files are deleted.

    Where the spec asks for it, the adapter is evaluated first, in a second process that nobody monitors; a run
    whose evaluation fails is not completed. ``is_alone`` is False where others are made side by side with it (the
    store's lock is then held around all of them): the GPU is not monitored, and a failure, which may be
    their doing, is a refusal.

    ``command`` makes the command line from the spec and the directory that must receive ``run.json`` and
    ``steps.jsonl``; it is started in the repository's root. Whatever becomes of the child is an outcome.
    Raises, storing nothing: :class:`MachineError` where the GPU is in use or the arm has no interpreter,
    :class:`ConfigurationError` or :class:`DataError` for a spec that cannot be read, :class:`LockedError`
    where another process measures into the store, ``KeyboardInterrupt``.
    """
    identity = identify(spec)
    child = partial(run_process, directory=ROOT, time_limit_seconds=time_limit_seconds, grace_seconds=grace_seconds)
    with store.lock(), _scratch(store, None if is_alone else identity.key) as scratch:
        run_dir = scratch / "run"
        run_dir.mkdir()
        before = wait_until_free(read_gpu) if is_alone else None
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        with GpuMonitor(read_gpu if is_alone else lambda: None, before=before) as monitor:
            ended = child(command(spec, run_dir), environment=environment(spec.backend))
        record, why_not = _record_of(run_dir)
        log, seen = log_tail(ended.output), monitor.summary()
        seconds, content = ended.wall_seconds, None
        if ended.exit_code or ended.timed_out:
            error = (record.message if record else None) or _last_error(log)
            status, message = _status_of_failure(ended, log, error, time_limit_seconds)
        elif record is None or record.status != "completed":
            status, message = "no_record", f"its record says {record.status}" if record else why_not
        else:
            status, message = "completed", None
            if spec.evaluate:
                evaluated = child(evaluation_command(run_dir), environment=environment(EVALUATOR))
                seconds += evaluated.wall_seconds
                status, message, content = _evaluation_of(run_dir, evaluated, time_limit_seconds)
        # What spoils any measurement comes before how the process ended.
        if changed := explain(identity.parts, identify(spec).parts):
            status, message = "refused", "what is measured was changed during the run: " + "; ".join(changed)
        if count := seen.num_foreign_processes_max:
            status, message = "refused", f"met a foreign process on the GPU (at most {count} at a time)"
        if not is_alone and status not in ("completed", "refused"):
            status, message = "refused", f"beside others: {status}" + (f": {message}" if message else "")
        with store.numbering:
            outcome = Outcome(
                run_id=store.new_run_id(identity.key),
                key=identity.key,
                key_parts=identity.parts,
                spec=spec.portable(),
                status=status,
                message=without_paths(message)[:1000] if message else None,
                exit_code=ended.exit_code,
                started_at=started_at,
                wall_seconds=seconds,
                machine=machine_id(),
                monitor=seen,
                log_tail=log,
                record=_storable(record.model_dump(mode="json")) if record else None,
                steps=_steps_of(run_dir),
                evaluation=content,
            )
            store.append(outcome)
        return outcome


@contextmanager
def _scratch(store: Store, key: str | None = None) -> Iterator[Path]:
    """A directory for one run of a store that is locked: what a killed gate left of its last is cleared.

    ``key``: of a run that has others beside it, each with a directory of its own.
    """
    place = hashlib.sha256(str(store.directory).encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"forge-gate-{os.getuid()}-{place}{f'-{key[:12]}' if key else ''}"
    for left in [path] if key else path.parent.glob(f"{path.name}*"):
        shutil.rmtree(left, ignore_errors=True)
    with disk_errors(path):
        path.mkdir(mode=0o700)  # refuses what is not ours: it would be there still
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _status_of_failure(
    ended: Ended, log: str, error: str | None, time_limit_seconds: float
) -> tuple[RunStatus, str | None]:
    """Status and message of a process that did not end well in time."""
    code = ended.exit_code
    if ended.timed_out:
        return "timeout", f"stopped after {time_limit_seconds:g} seconds"
    if code in _BY_EXIT_CODE:
        return _BY_EXIT_CODE[code], error
    if memory_that_ran_out(log):
        return "out_of_memory", error
    return "crashed", f"{_ending(code)}{f': {error}' if error else ''}"


def _evaluation_of(
    run_dir: Path, ended: Ended, time_limit_seconds: float
) -> tuple[RunStatus, str | None, dict[str, Any] | None]:
    """Status, message and content of the run's evaluation; the content only where it completed.

    What cannot be judged (exit code 3: a damaged adapter, a loss that is not finite) is the run's fault, unlike a
    full disk or a missing interpreter.
    """
    if ended.exit_code or ended.timed_out:
        log = log_tail(ended.output)
        status, why = _status_of_failure(ended, log, _last_error(log), time_limit_seconds)
        return "crashed" if ended.exit_code == 3 else status, f"its evaluation: {why}", None
    try:
        return "completed", None, _storable(read_json_object(run_dir / "evaluation.json"))
    except DataError as error:
        return "no_record", f"its evaluation: {error.message}", None


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name}, as from the kernel when memory runs out" if name == "SIGKILL" else name


def _last_error(log: str) -> str | None:
    """The last of forge's own ``error:`` lines of a log, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = (errors or lines)[-1:]
    return last[0] if last else None


def _record_of(run_dir: Path) -> tuple[RunRecord | None, str]:
    """The run's record, or why there is none."""
    try:
        return read_record(run_dir), ""
    except DataError as error:
        return None, f"ended without a readable record: {error.message}"
    except RecursionError:  # JSON nested without end
        return None, "ended without a readable record: run.json is nested too deep"


def _steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of the step log that are whole: a kill cuts the last one short."""
    path = run_dir / "steps.jsonl"
    if not path.is_file() or path.stat().st_size > _LARGEST_STEP_LOG_BYTES:
        return []
    steps = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            steps.append(_storable(line))
    return steps


def _storable(content: dict[str, Any]) -> dict[str, Any]:
    """Without paths of this machine, and with None for NaN and infinity, which JSON does not have."""
    plain: dict[str, Any] = json.loads(json.dumps(portable(content)), parse_constant=lambda _: None)
    return plain
