"""One training run from a config to an adapter and a record, in this process, from top to bottom.

:func:`train` is the run: checks, resume or start, the backend's trainer, the loop, the adapter, the record. What it
calls stands below it in the same order. Where the gate's instruments change a trainer: :func:`build_trainer`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from forge.training.backends import (
    Backend,
    BackendModule,
    describe_plan_source,
    load_backend,
    load_plan,
    read_plans,
)
from forge.training.backends.job import StepObserver, TrainingJob
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload
from forge.training.config.yaml import dump_yaml
from forge.training.data.inputs import Inputs, prepare_inputs, refuse_unusable_sources
from forge.training.models.base import is_here, refuse_unknown_name, resolve_base
from forge.training.models.digests import model_shape
from forge.training.models.lora_targets import refuse_targets
from forge.training.models.weights import read_weights
from forge.training.system.card import card_of
from forge.training.system.environment import describe_environment
from forge.training.system.errors import DiskError, ForgeError, MachineError
from forge.training.system.files import as_disk_error, locked, remove, sha256_file, write_text
from forge.training.system.oom import as_memory_error
from forge.training.system.signals import StopRequest
from forge.training.train.checkpoint import (
    Checkpoint,
    Saver,
    choose,
    delete_all,
    describe_identity,
    restore,
    save_adapter,
)
from forge.training.train.metrics import Meter, cut_log
from forge.training.train.record import (
    Predecessor,
    Resume,
    RunRecord,
    chain_after,
    completed_record,
    describe_trainable,
    status_of,
)
from forge.training.train.resume import (
    allowed_changes,
    clear_partials,
    completed_again,
    first_adapter_of,
    is_complete,
    previous_run,
    refuse_other_base,
    refuse_other_inputs,
    same_command,
    set_aside,
)
from forge.training.train.status import StatusFile
from forge.training.train.step_log import LOG


@dataclass(frozen=True)
class Listener:
    """Who is told: lines for people, the plan before the first step, every step's figures, what is held out."""

    announce: Callable[[str], None]
    on_plan: Callable[[TrainingJob, dict[str, Any]], None]
    on_step: Callable[[int, dict[str, Any]], None]
    on_evaluating: Callable[[int], None] = lambda _: None
    """Before a held-out loss is measured: of how many examples."""
    on_evaluation: Callable[[int, float, tuple[int, float]], None] = lambda *_: None
    """Step, held-out loss (nats per trained token), and step and loss of the best so far."""
    on_sample: Callable[[int, str, str], None] = lambda *_: None
    """Step, question and answer."""


def train(
    workload: Workload,
    backend: Backend,
    plan_overrides: list[str],
    run_dir: Path,
    listener: Listener,
    *,
    resume: bool = False,
    force: bool = False,
    check_first: Callable[[], None] | None = None,
    continued: Path | None = None,
    budget_bytes: int | None = None,
) -> RunRecord:
    """Train and leave ``adapter/``, ``run.json``, ``steps.jsonl``, ``status.json`` in ``run_dir``.

    Resumes a run of the same work that is there; a complete one is returned as it is once its documents, base and
    tokenizer are seen to be the same. ``resume`` insists that there is one. ``force`` trains afresh and keeps what
    was there in ``NAME.1`` beside it. ``continued``: a complete run on whose adapter this one trains, with its own
    examples, steps and schedule. ``check_first`` raises where training should not begin; it is asked before the base
    is made or fetched, and again after it was. ``budget_bytes``: of the GPU that the run may use. Raises the errors of
    :mod:`forge.training.system.errors`; record and status then say how the run ended.
    """
    plan = load_plan(workload, backend, plan_overrides)
    plan_source = describe_plan_source(workload, backend, plan_overrides)
    plans = {**read_plans(workload), backend: plan.model_dump()}  # beside workload.yaml: it trains as it did
    module = load_backend(backend)
    module.refuse(workload, plan)
    predecessor = None if continued is None else completed_record(continued)
    chain = [] if continued is None or predecessor is None else chain_after(continued, predecessor, run_dir)
    first_adapter = None if continued is None else first_adapter_of(continued, chain, run_dir)
    look = partial(previous_run, run_dir, workload, backend, resume=resume, force=force, continues=chain)
    before = look()
    if check_first is not None and not is_complete(before):
        check_first()  # nothing is left of a run that does not begin
    with locked(run_dir), StopRequest().caught() as stop:
        before = look()
        clear_partials(run_dir, listener.announce)
        is_done = is_complete(before)
        record: RunRecord | None = None
        status: StatusFile | None = None
        if not is_done and not force:  # else the status is that of what is there, until all checks are passed
            if before is None:
                set_aside(run_dir, listener.announce)  # of a run whose record was deleted
            status = StatusFile(run_dir)
            status.update(step=before.num_steps if before else 0)
        try:
            # checks that take time, and the inputs
            refuse_unusable_sources(workload)
            asks_again = (
                check_first is not None
                and not is_done
                and not is_here(workload.model.path, revision=workload.model.revision)
            )
            base_dir = base_directory(workload)
            if check_first is not None and asks_again:
                check_first()
            if not is_done:
                refuse_targets(workload.lora.targets, read_weights(base_dir))
                module.prepare(plan)
                listener.announce(f"base model {base_dir.name}, backend {backend}, plan: {plan_source}")
            with tempfile.TemporaryDirectory(dir=run_dir, prefix=".inputs.", suffix=".part") as made:
                date = None if before is None else before.inputs.template_date
                inputs = prepare_inputs(workload, base_dir, Path(made), date, run_dir=run_dir)
                if before is not None:
                    refuse_other_inputs(run_dir, before, inputs.described)
                if predecessor is not None:
                    refuse_other_base(predecessor, inputs.described)
                if before is not None and is_done:
                    return completed_again(before, workload, base_dir, run_dir, listener.announce)
                if force:
                    set_aside(run_dir, listener.announce)
                if before is None:
                    for path in Path(made).iterdir():
                        remove(run_dir / path.name)  # of a start that failed
                        os.replace(path, run_dir / path.name)
            if status is None:
                status = StatusFile(run_dir)
                status.update()
            for note in inputs.described.notes:
                listener.announce(note)
            write_text(run_dir / "workload.plans.yaml", dump_yaml(plans))
            write_text(run_dir / "workload.yaml", workload.to_yaml())
            job = TrainingJob(
                workload,
                plan,
                backend,
                base_dir,
                run_dir,
                inputs.train,
                inputs.validation,
                first_adapter=first_adapter,
                template_date=inputs.described.template_date,
            )
            # resume or start
            identity = describe_identity(
                workload.digest(), inputs.described, backend, chain[-1].adapter_sha256 if chain else None
            )
            checkpoint = _restore_newest(job, identity, listener.announce) if before else None
            record = _begin_record(job, backend, inputs.described, chain, before, checkpoint, listener.announce)
            # trainer, loop, adapter
            saver = Saver(job, identity, resumed_from=checkpoint, on_sealed=lambda name: status.update(checkpoint=name))
            with card_of(budget_bytes):
                _train(module, job, checkpoint, saver, record, listener, status, stop, same_command(force=force))
            # record
            record.status = "completed"
            record.write(run_dir)
            delete_all(run_dir / "checkpoints")  # the adapter supersedes them
        except BaseException as error:
            has_begun = before is not None or record is not None
            resumes = f"{same_command(force=force)} resumes" if has_begun else "the same command begins again"
            failure = _as_user_error(error, plan, run_dir, stop, resumes)
            if record is not None and record.status == "running":
                record.status, record.message = status_of(failure), str(failure).partition("\n")[0] or repr(failure)
                with contextlib.suppress(DiskError):  # where the disk is full, `failure` says so already
                    record.write(run_dir)
            code, message, remedy = 1, repr(failure)[:500], None
            if isinstance(failure, ForgeError):
                code, message, remedy = failure.exit_code, failure.message, failure.remedy
            if status is not None:
                status.update(state=status_of(failure), exit_code=code, message=message, remedy=remedy)
            if failure is error:
                raise
            raise failure from error
        status.update(state="completed", step=record.num_steps, exit_code=0, checkpoint=None)
        return record


def base_directory(workload: Workload) -> Path:
    """The base model's directory; what is made or fetched is so by a process of its own, unpatched by Unsloth."""
    refuse_unknown_name(workload.model.path)
    if Path(workload.model.path).is_dir():
        return resolve_base(workload.model.path)
    command = [sys.executable, "-m", "forge.training", "base", workload.model.path]
    if workload.model.revision:
        command += ["--revision", workload.model.revision]
    if workload.model.offline is not None:
        command += ["--offline" if workload.model.offline else "--online"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        message = f"the base model {workload.model.path} cannot be used (see above)"
        raise ForgeError.of_child(done.returncode, message)
    return Path(os.fsdecode(done.stdout.strip().splitlines()[-1]))


def _restore_newest(job: TrainingJob, identity: dict[str, str], announce: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to resume from, step log and best adapter as they were then; ``None``: from the first step."""
    needs_scaler = job.workload.model.dtype == "float16"
    checkpoint, remarks = choose(job.run_dir / "checkpoints", identity, needs_scaler=needs_scaler)
    for remark in remarks:
        announce(remark)
    if checkpoint is None:
        announce("no checkpoint was sealed: starting from the first step")
        shutil.rmtree(job.run_dir / "best", ignore_errors=True)
    else:
        restore(checkpoint, job.run_dir / LOG, job.run_dir / "best")
    return checkpoint


def _begin_record(
    job: TrainingJob,
    backend: Backend,
    inputs: Inputs,
    chain: list[Predecessor],
    before: RunRecord | None,
    checkpoint: Checkpoint | None,
    announce: Callable[[str], None],
) -> RunRecord:
    """Write the record of a run that is running, with what differs from the process before it."""
    environment = describe_environment(with_torch=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    step = checkpoint.step if checkpoint else 0
    record = RunRecord(
        status="running",
        backend=backend,
        workload=job.workload.model_dump(mode="json"),
        workload_sha256=job.workload.digest(),
        plan=job.plan.model_dump(),
        seed=job.workload.training.seed,
        base_path=str(job.base_dir),
        started_at=before.started_at if before else now,
        num_steps=step,
        num_planned_steps=job.num_steps,
        inputs=inputs,
        model_shape=model_shape(job.base_dir),
        environment=environment,
        continues=chain,
    )
    if before is not None:
        changes = allowed_changes(before, job.plan, environment)
        for line in changes:
            announce(f"changed since it began: {line}")
        record.notes = list(before.notes)
        record.resumes = [*before.resumes, Resume(at=now, step=step, after=before.status, changes=changes)]
    record.write(job.run_dir)
    return record


def _train(
    module: BackendModule,
    job: TrainingJob,
    checkpoint: Checkpoint | None,
    saver: Saver,
    record: RunRecord,
    listener: Listener,
    status: StatusFile,
    stop: StopRequest,
    resumes: str,
) -> None:
    """Build the trainer, take every step that is left and keep the adapter. What was measured goes into the record."""
    import torch

    from forge.training.train.callbacks import StepCallback, StoppedEarly

    def on_step(step: int, figures: dict[str, Any]) -> None:
        status.step_done(step)
        listener.on_step(step, figures)

    def is_stop_requested() -> bool:
        return stop.number is not None

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(job.run_dir.absolute() / "tensorboard")
    cuda = torch.cuda.is_available()
    lines = cut_log(job.run_dir / LOG, checkpoint.step if checkpoint else 0)
    counts_first = module.LOSS_COUNTS_FIRST_LABELS
    with Meter(job.run_dir / LOG, lines, job.accumulation, cuda, loss_counts_first_labels=counts_first) as meter:
        callback = StepCallback(job, meter, saver, stop, replace(listener, on_step=on_step))
        try:
            # the backend's trainer
            started = time.perf_counter()
            if cuda:
                torch.backends.cuda.enable_cudnn_sdp(job.plan.attention == "default")
            observer = StepObserver(callback.begin, meter.fetched, meter.add_loss, saver.saving, is_stop_requested)
            trainer = build_trainer(module, job, observer)
            trainer.add_callback(callback)
            record.timing.load_seconds = time.perf_counter() - started
            meter.phase("load")
            record.trainable = describe_trainable(trainer.model)
            resumed_from = checkpoint.path if checkpoint else None
            plan = {"trainable": record.trainable, "resumed_from": resumed_from.name if resumed_from else None}
            listener.on_plan(job, plan)
            saver.begin(record.trainable.num_parameters)
            status.update(state="running", step=record.num_steps, num_planned_steps=job.num_steps)
            with stop.deferred():
                # the loop
                with contextlib.suppress(StoppedEarly):
                    trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
                done = int(trainer.state.global_step)
                if is_stop_requested() and done < job.num_steps and not callback.is_out_of_patience():
                    raise stop.interrupted(f" after step {done} of {job.num_steps}", f"{resumes} resumes from there")
                record.timing.train_seconds = saver.train_seconds
                meter.phase("train")
                # the adapter
                record.adapter_sha256 = _keep_adapter(trainer.model, job, has_best=callback.best is not None)
                meter.phase("save")
        finally:
            meter.fill(record)
            callback.fill(record)


def build_trainer(module: BackendModule, job: TrainingJob, observer: StepObserver) -> Any:
    """The backend's trainer. Raises :class:`MachineError` for a tracker that is not installed.

    **The seam**: a run looks this function up in this module when it needs its trainer, and the gate's instruments
    put another in its place, which calls it and changes the trainer before the first step. They are
    ``harness/parity/probes/float32_adapter.py`` and ``harness/reliability/probes/constrained_run.py``; nothing else of
    a run may be replaced.
    """
    try:
        return module.build(job, observer)
    except RuntimeError as error:
        if "Callback requires" in str(error):
            raise MachineError(f"report_to: {error}", remedy="install that tracker, or --set report_to=[]") from error
        raise


def _keep_adapter(model: Any, job: TrainingJob, *, has_best: bool) -> str:
    """The best adapter of a run that evaluates, else the last one, becomes the run's. Returns its SHA-256."""
    adapter = job.run_dir / "adapter"
    if has_best:
        shutil.rmtree(adapter, ignore_errors=True)  # of a process killed between these lines and its record
        os.replace(job.run_dir / "best", adapter)
    else:
        save_adapter(model, job, adapter)
    return sha256_file(adapter / "adapter_model.safetensors")


def _as_user_error(error: BaseException, plan: Plan, run_dir: Path, stop: StopRequest, resumes: str) -> BaseException:
    """The error as :mod:`forge.training.system.errors` has it, where it is the user's: memory, a signal, disk."""
    if isinstance(error, ForgeError):
        return error
    remedies = []
    if plan.micro_batch > 1:
        remedies.append("--plan micro_batch=1 (the same mathematics)")
    if plan.gradient_checkpointing == "none":
        remedies.append("--plan gradient_checkpointing=full (the same mathematics)")
    remedies += ["--set data.max_length=... (shorter documents)", "--set lora.rank=... (a smaller adapter)"]
    memory_error = as_memory_error(error, "training", "in order of cost: " + "; ".join(remedies))
    if memory_error is not None:
        return memory_error
    if stop.caused(error):
        return stop.interrupted(" before it trained", resumes)
    return as_disk_error(error, getattr(error, "filename", None) or run_dir) or error
