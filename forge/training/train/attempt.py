"""One attempt at a run in this process: the trainer built, brought to its checkpoint, trained, its end recorded."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from forge.training.backends.job import TrainingJob
from forge.training.data.inputs import Inputs
from forge.training.system.environment import describe_environment
from forge.training.system.errors import DiskError, MachineError
from forge.training.system.files import sha256_file
from forge.training.system.signals import StopRequest
from forge.training.train import checkpoint
from forge.training.train.ending import describe_trainable, fill_record, status_of, translated
from forge.training.train.metrics import Meter
from forge.training.train.record import Resume, RunRecord
from forge.training.train.resume import allowed_changes
from forge.training.train.status import StatusFile


@dataclass(frozen=True)
class Listener:
    """Who is told: lines for people, the plan before the first step, every step's figures."""

    announce: Callable[[str], None]
    on_plan: Callable[[TrainingJob, dict[str, Any]], None]
    on_step: Callable[[int, dict[str, Any]], None]


class Attempt:
    """``before``: the record of the run that is resumed, ``None`` for a fresh one."""

    def __init__(
        self,
        job: TrainingJob,
        inputs: Inputs,
        before: RunRecord | None,
        listener: Listener,
        status: StatusFile,
        stop: StopRequest,
    ) -> None:
        self._job, self._before, self._listener, self._status, self._stop = job, before, listener, status, stop
        self._identity = checkpoint.describe_identity(job.workload.digest(), inputs, job.backend)
        self._checkpoint = self._choose_checkpoint() if before else None
        self._record = self._begin_record(inputs)

    def _choose_checkpoint(self) -> checkpoint.Checkpoint | None:
        run_dir = self._job.run_dir
        needs_scaler = self._job.workload.model.dtype == "float16"
        found, remarks = checkpoint.choose(run_dir / "checkpoints", self._identity, needs_scaler=needs_scaler)
        for remark in remarks:
            self._listener.announce(remark)
        if found is None:
            self._listener.announce("no checkpoint was sealed: starting from the first step")
            shutil.rmtree(run_dir / "best", ignore_errors=True)
        else:
            checkpoint.restore(found, run_dir / "steps.jsonl", run_dir / "best")
        return found

    def _begin_record(self, inputs: Inputs) -> RunRecord:
        from forge.training.models.digests import model_shape

        job, before = self._job, self._before
        environment = describe_environment(with_torch=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = RunRecord(
            status="running",
            backend=job.backend,
            workload=job.workload.model_dump(mode="json"),
            workload_sha256=job.workload.digest(),
            plan=job.plan.model_dump(),
            seed=job.workload.training.seed,
            base_path=str(job.base_dir),
            started_at=before.started_at if before else now,
            num_steps=self._step,
            num_planned_steps=job.num_steps,
            inputs=inputs,
            model_shape=model_shape(job.base_dir),
            environment=environment,
        )
        if before is not None:
            changes = allowed_changes(before, job.plan, environment)
            for line in changes:
                self._listener.announce(f"changed since it began: {line}")
            record.notes = list(before.notes)
            record.resumes = [*before.resumes, Resume(at=now, step=self._step, after=before.status, changes=changes)]
        record.write(job.run_dir)
        return record

    @property
    def _step(self) -> int:
        return self._checkpoint.step if self._checkpoint else 0

    def run(self, module: Any) -> RunRecord:
        """Train to the end. ``module``: the backend's. Raises the errors of :mod:`forge.training.system.errors`."""
        import torch

        from forge.training.train.callbacks import StepCallback

        job, record = self._job, self._record
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(job.run_dir / "tensorboard")
        cuda = torch.cuda.is_available()
        meter = Meter(
            job.run_dir / "steps.jsonl",
            job.accumulation,
            cuda,
            resumed_step=self._step,
            loss_counts_first_labels=job.backend == "legacy",
        )
        callback: Any = None
        try:
            started = time.perf_counter()
            if cuda:
                torch.backends.cuda.enable_cudnn_sdp(job.plan.attention == "default")
            trainer = build_trainer(module, job)
            record.timing.load_seconds = time.perf_counter() - started
            meter.phase("load")
            record.trainable = describe_trainable(trainer.model)
            self._listener.on_plan(job, {"trainable": record.trainable, "resumed_from": self._checkpoint_name})
            saver = self._saver(meter, record.trainable.num_parameters)
            callback = StepCallback(trainer, meter, saver, self._stop, self._on_step, self._listener.announce)
            trainer.meter, trainer.saver, trainer.stop = meter, saver, self._stop
            trainer.add_callback(callback)
            self._status.update(state="running", step=self._step, num_planned_steps=job.num_steps)
            with self._stop.deferred():
                self._train(trainer, callback)
                record.timing.train_seconds = saver.train_seconds
                meter.phase("train")
                self._keep_adapter(trainer, callback)
                meter.phase("save")
                record.status = "completed"
        except BaseException as error:
            failure = translated(error, job, self._stop)
            record.status, record.message = status_of(failure), str(failure).partition("\n")[0] or repr(failure)
            if failure is error:
                raise
            raise failure from error
        finally:
            fill_record(record, meter, callback, job)
            meter.close()
            # where it is the disk that is full, that error is on its way already
            with contextlib.nullcontext() if record.status == "completed" else contextlib.suppress(DiskError):
                record.write(job.run_dir)
        checkpoint.delete_all(job.run_dir / "checkpoints")
        return record

    @property
    def _checkpoint_name(self) -> str | None:
        return self._checkpoint.path.name if self._checkpoint else None

    def _saver(self, meter: Meter, num_parameters: int) -> Any:
        from forge.training.train.saving import Saver

        saver = Saver(
            self._job,
            meter,
            self._identity,
            num_parameters=num_parameters,
            resumed_from=self._checkpoint,
            on_sealed=lambda name: self._status.update(checkpoint=name),
        )
        saver.require_space()
        return saver

    def _train(self, trainer: Any, callback: Any) -> None:
        from forge.training.train.callbacks import StoppedEarly

        with contextlib.suppress(StoppedEarly):
            trainer.train(resume_from_checkpoint=str(self._checkpoint.path) if self._checkpoint else None)
        done = int(trainer.state.global_step)
        if self._stop.number is not None and done < self._job.num_steps and not callback.is_out_of_patience():
            raise self._stop.interrupted(f" after step {done} of {self._job.num_steps}")

    def _keep_adapter(self, trainer: Any, callback: Any) -> None:
        """The best adapter of a run that evaluates, else the last one, becomes the run's."""
        from forge.training.train.saving import save_adapter

        adapter, best = self._job.run_dir / "adapter", self._job.run_dir / "best"
        if callback.best is None:
            save_adapter(trainer.model, self._job, adapter)
        else:
            shutil.rmtree(adapter, ignore_errors=True)  # of a process killed between these lines and its record
            os.replace(best, adapter)
        self._record.adapter_sha256 = sha256_file(adapter / "adapter_model.safetensors")

    def _on_step(self, step: int, figures: dict[str, Any]) -> None:
        self._status.step_done(step)
        self._listener.on_step(step, figures)


def build_trainer(module: Any, job: TrainingJob) -> Any:
    """The backend's trainer; a tracker that is not installed is said in one line."""
    try:
        return module.build(job)
    except RuntimeError as error:
        if "Callback requires" in str(error):
            raise MachineError(f"report_to: {error}", remedy="install that tracker, or --set report_to=[]") from error
        raise
