"""One training run from a workload to an adapter and a record, in this process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forge.training.data.inputs import prepare_inputs
from forge.training.ending import describe_trainable, fill_record, status_of, translated
from forge.training.environment import describe_environment, has_cuda_gpu
from forge.training.errors import (
    DataError,
    ForgeError,
    Interrupted,
    MachineError,
)
from forge.training.files import locked, refuse_existing, sha256_file, write_text
from forge.training.job import TrainingJob
from forge.training.meter import Meter
from forge.training.plan import Backend, load_plan
from forge.training.record import Inputs, RunRecord, read_record
from forge.training.workload import Workload, changed_keys

_MADE_BY_A_RUN = (
    *("run.json", "steps.jsonl", "checkpoints", "best", "adapter", "examples", "tensorboard"),
    *("evaluation.json", "merged", "export", "outcome.json"),
)
Announce = Callable[[str], None]


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
    *,
    resume: bool,
    force: bool,
    announce: Announce,
    on_plan: Callable[[TrainingJob, dict[str, Any]], None],
    on_step: Callable[[int, dict[str, Any]], None],
) -> RunRecord:
    """Train and leave ``adapter/``, ``run.json``, ``steps.jsonl`` in ``run_dir``.

    Raises the errors of :mod:`forge.training.errors`; the record then says how the run ended.
    """
    plan = load_plan(workload, backend, plan_overrides)
    if not resume:
        refuse_existing(run_dir / "run.json", force)
    elif not (run_dir / "run.json").exists():
        raise DataError(f"{run_dir} holds no run to resume", remedy="start it without --resume")
    with locked(run_dir):
        if resume:
            before = read_record(run_dir)
            if before.status == "completed":
                announce(f"{run_dir} is complete: nothing to resume")
                return before
            _refuse_other_work(before, workload, backend, run_dir)
        base_dir = base_directory(workload)
        from forge.training.backends import load_backend

        module = load_backend(backend)
        module.prepare(plan)
        announce(f"base model {base_dir.name}, backend {backend}")
        if not resume:
            for name in _MADE_BY_A_RUN:
                _remove(run_dir / name)
        write_text(run_dir / "workload.yaml", workload.to_yaml())
        inputs = prepare_inputs(workload, base_dir, run_dir)
        job = TrainingJob(workload, plan, backend, base_dir, run_dir, inputs.train, inputs.validation)
        return _run(job, inputs.described, module, resume=resume, announce=announce, on_plan=on_plan, on_step=on_step)


def _refuse_other_work(before: RunRecord, workload: Workload, backend: Backend, run_dir: Path) -> None:
    """A resume goes on with the same work; refused before anything in the run directory is touched."""
    if (before.workload_sha256, before.backend) == (workload.digest(), backend):
        return
    changed = [f"  backend: {before.backend} -> {backend}"] if before.backend != backend else []
    changed += changed_keys(before.workload, workload.model_dump(mode="json"))
    raise DataError(
        f"{run_dir} belongs to other work:\n" + "\n".join(changed),
        remedy="resume with the settings it was started with, or train into another directory",
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _run(
    job: TrainingJob,
    inputs: Inputs,
    module: Any,
    *,
    resume: bool,
    announce: Announce,
    on_plan: Callable[[TrainingJob, dict[str, Any]], None],
    on_step: Callable[[int, dict[str, Any]], None],
) -> RunRecord:
    import torch

    from forge.training.checkpoint import newest_valid
    from forge.training.loop import BEST, StepCallback, save_adapter
    from forge.training.models.identity import model_shape

    workload, run_dir = job.workload, job.run_dir
    identity = {
        "workload": workload.digest(),
        "base": inputs.base_sha256,
        "train_examples": inputs.train_examples_sha256,
        "backend": job.backend,
    }
    if resume and (run_dir / "adapter" / BEST).is_file() and not (run_dir / "best").exists():
        os.replace(run_dir / "adapter", run_dir / "best")  # killed between the last two writes of a run
    found, remarks = newest_valid(run_dir / "checkpoints", identity) if resume else (None, [])
    for remark in remarks:
        announce(remark)
    if resume and found is None:
        announce("no checkpoint can be used: starting from the first step")
    record = RunRecord(
        status="running",
        backend=job.backend,
        workload=workload.model_dump(mode="json"),
        workload_sha256=workload.digest(),
        plan=job.plan.model_dump(),
        seed=workload.training.seed,
        base_path=str(job.base_dir),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        num_steps=0,
        num_planned_steps=job.num_steps,
        inputs=inputs,
        model_shape=model_shape(job.base_dir),
        environment=describe_environment(with_torch=True),
    )
    record.write(run_dir)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir / "tensorboard")
    cuda = torch.cuda.is_available()
    resumed_step = int(found.name.removeprefix("checkpoint-")) if found else 0
    meter = Meter(
        run_dir / "steps.jsonl",
        job.accumulation,
        cuda,
        resumed_step=resumed_step,
        loss_counts_first_labels=job.backend == "legacy",
    )
    callback: Any = None
    try:
        started = time.perf_counter()
        if cuda:
            torch.backends.cuda.enable_cudnn_sdp(job.plan.attention == "default")
        trainer = _build(module, job)
        record.timing.load_seconds = time.perf_counter() - started
        meter.phase("load")
        record.trainable = describe_trainable(trainer.model)
        on_plan(job, {"trainable": record.trainable, "resumed_from": found.name if found else None})
        trainer.meter = meter
        callback = StepCallback(trainer, meter, identity, on_step)
        trainer.add_callback(callback)
        callback.catch_signals()
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(found) if found else None)
        record.timing.train_seconds = time.perf_counter() - started
        meter.phase("train")
        done = int(trainer.state.global_step)
        if callback.signal_number is not None and done < job.num_steps:
            raise Interrupted(
                f"stopped by signal {callback.signal_number} after step {done} of {job.num_steps}",
                signal_number=callback.signal_number,
                remedy="the same command with --resume goes on from there",
            )
        if callback.best is not None:
            os.replace(run_dir / "best", run_dir / "adapter")
        else:
            save_adapter(trainer.model, job, run_dir / "adapter")
        meter.phase("save")
        record.adapter_sha256 = sha256_file(run_dir / "adapter" / "adapter_model.safetensors")
        record.status = "completed"
    except BaseException as error:
        failure = translated(error, job)
        record.status, record.message = status_of(failure), str(failure).splitlines()[0]
        if failure is error:
            raise
        raise failure from error
    finally:
        fill_record(record, meter, callback, job)
        meter.close()
        record.write(run_dir)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)  # the finished adapter supersedes them
    return record


def _build(module: Any, job: TrainingJob) -> Any:
    """The backend's trainer; a tracker that is not installed is said in one line."""
    try:
        return module.build(job)
    except RuntimeError as error:
        if "Callback requires" in str(error):
            raise MachineError(f"report_to: {error}", remedy="install that tracker, or --set report_to=[]") from error
        raise
