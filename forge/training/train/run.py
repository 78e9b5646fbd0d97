"""One training run from a workload to an adapter and a record, in this process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from forge.training.backends import Backend, load_plan
from forge.training.backends.job import TrainingJob
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload
from forge.training.data.inputs import PreparedInputs, prepare_inputs, refuse_unusable_sources
from forge.training.system.environment import has_cuda_gpu
from forge.training.system.errors import ForgeError
from forge.training.system.files import locked, write_text
from forge.training.system.signals import StopRequest
from forge.training.train.attempt import Attempt, Listener
from forge.training.train.checkpoint import delete_all
from forge.training.train.record import RunRecord
from forge.training.train.resume import clear, clear_partials, previous_run, refuse_other_inputs
from forge.training.train.status import StatusFile


def choose_backend(name: str) -> Backend:
    """``auto`` is unsloth where it is installed and a CUDA GPU answers, else trl. Imports no torch."""
    if name != "auto":
        return name  # type: ignore[return-value]  # the command line has checked it
    return "unsloth" if find_spec("unsloth") is not None and has_cuda_gpu() else "trl"


def base_directory(workload: Workload) -> Path:
    """The base model's directory; stand-ins are made by a process of their own, unpatched by Unsloth."""
    command = [sys.executable, "-m", "forge.training", "base", workload.model.path]
    if workload.model.revision:
        command += ["--revision", workload.model.revision]
    if workload.model.offline is not None:
        command += ["--offline" if workload.model.offline else "--online"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise _child_error(done.returncode, f"the base model {workload.model.path} cannot be used (see above)")
    return Path(done.stdout.strip().splitlines()[-1])


def _child_error(code: int, message: str) -> ForgeError:
    error = ForgeError(message)
    error.exit_code = code if 0 < code < 10 else 1
    return error


def train(
    workload: Workload,
    backend: Backend,
    plan_overrides: list[str],
    run_dir: Path,
    listener: Listener,
    *,
    resume: bool = False,
    force: bool = False,
) -> RunRecord:
    """Train and leave ``adapter/``, ``run.json``, ``steps.jsonl``, ``status.json`` in ``run_dir``.

    Goes on with a run of the same work that is there and returns a complete one as it is; ``resume``
    insists that there is one, ``force`` replaces it. Raises the errors of
    :mod:`forge.training.system.errors`; record and status then say how the run ended.
    """
    plan = load_plan(workload, backend, plan_overrides)
    with locked(run_dir), StopRequest().caught() as stop:
        before = previous_run(run_dir, workload, backend, resume=resume, force=force)
        if before is not None and before.status == "completed":
            delete_all(run_dir / "checkpoints")  # of a process killed between its last two writes
            listener.announce(f"{run_dir} is complete: nothing to do")
            return before
        clear_partials(run_dir, listener.announce)
        if before is None:
            clear(run_dir)
        status = StatusFile(run_dir)
        status.update(step=before.num_steps if before else 0)
        try:
            record = _train(workload, backend, plan, run_dir, before, listener, status, stop)
        except BaseException as error:
            failure = stop.interrupted(" before it trained") if stop.caused(error) else error
            _note_failure(status, failure)
            if failure is error:
                raise
            raise failure from error
        status.update(state="completed", step=record.num_steps, exit_code=0, checkpoint=None)
        return record


def _train(
    workload: Workload,
    backend: Backend,
    plan: Plan,
    run_dir: Path,
    before: RunRecord | None,
    listener: Listener,
    status: StatusFile,
    stop: StopRequest,
) -> RunRecord:
    refuse_unusable_sources(workload)
    base_dir = base_directory(workload)
    from forge.training.backends import load_backend

    module = load_backend(backend)
    module.prepare(plan)
    listener.announce(f"base model {base_dir.name}, backend {backend}")
    inputs = _inputs(workload, base_dir, run_dir, before)
    for note in inputs.described.notes:
        listener.announce(note)
    write_text(run_dir / "workload.yaml", workload.to_yaml())
    job = TrainingJob(workload, plan, backend, base_dir, run_dir, inputs.train, inputs.validation)
    return Attempt(job, inputs.described, before, listener, status, stop).run(module)


def _inputs(workload: Workload, base_dir: Path, run_dir: Path, before: RunRecord | None) -> PreparedInputs:
    """The run's examples, stored in its directory; a resume makes them again elsewhere and compares."""
    if before is None:
        return prepare_inputs(workload, base_dir, run_dir)
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".inputs.", suffix=".part") as again:
        inputs = prepare_inputs(workload, base_dir, Path(again))
    refuse_other_inputs(run_dir, before.inputs, inputs.described)
    return inputs


def _note_failure(status: StatusFile, failure: BaseException) -> None:
    """How the run ended, into its status."""
    from forge.training.train.ending import status_of

    status.update(
        state=status_of(failure),
        exit_code=failure.exit_code if isinstance(failure, ForgeError) else 1,
        message=failure.message if isinstance(failure, ForgeError) else repr(failure)[:500],
        remedy=failure.remedy if isinstance(failure, ForgeError) else None,
    )
