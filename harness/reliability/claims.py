"""What the survival probe is asked, and the verdict on its answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from forge.training.backends import Backend
from forge.training.system.errors import ForgeError
from harness.export.findings import Finding, by_faults
from harness.measurement.environment import work_arguments
from harness.measurement.probe import run_probe
from harness.measurement.results import RunSpec, Store

BACKENDS: tuple[Backend, ...] = ("trl", "unsloth")
STOP_LIMIT_SECONDS = 30.0  # what torchrun's agent and Docker, at most, leave a process after SIGTERM
_PROBE_SECONDS = 540.0

# 4-bit weights, the paged 8-bit optimizer and dropout: everything whose state a resume must bring back
SMALL: tuple[str, ...] = (
    *("model.quantization=nf4", "model.dtype=bfloat16", "optimizer.name=paged_adamw_8bit", "lora.dropout=0.1"),
    *("training.max_steps=40", "training.save_every_steps=10", "training.evaluate_every_steps=16", "report_to=[]"),
)


@dataclass
class Survival:
    """One session: the probes' answers, from the store where it has them. ``train``: documents for the 7B run."""

    store: Store
    train: Path
    model: str
    deadline: float | None = None
    small: tuple[str, ...] = SMALL
    measures: bool = True
    announce: Callable[[str], None] = lambda line: None
    _answers: dict[tuple[str, ...], dict[str, Any] | ForgeError | None] = field(default_factory=dict)

    def small_run(self, backend: Backend) -> dict[str, Any] | None:
        """Killed and stopped: the smoke workload's trained base in 4 bits."""
        return self._ask(RunSpec(backend=backend, workload="smoke", overrides=self.small), resumes=True)

    def large_run(self, backend: Backend) -> dict[str, Any] | None:
        """Asked to stop at real size."""
        spec = RunSpec(backend=backend, workload="genome_8k", overrides=self._of_7b(64))
        return self._ask(spec, "--stop-only", "--after-steps", "3")

    def tight_run(self, backend: Backend) -> dict[str, Any] | None:
        """Eight documents of up to 2,048 tokens padded into one micro-batch, on the owner's 8 GB."""
        settings = (*self._of_7b(32), "data.max_length=2048", "training.max_steps=4")
        layout = ("micro_batch=8", "padding=longest", "grouping=none")
        spec = RunSpec(backend=backend, workload="genome_8k", overrides=settings, plan_overrides=layout)
        return self._ask(spec, "--cap-gib", "8")

    def _of_7b(self, num_documents: int) -> tuple[str, ...]:
        data = (f"data.train={self.train}", "data.validation=null", f"data.sample={num_documents}")
        return (f"model.path={self.model}", *data, "report_to=[]")

    def _ask(self, work: RunSpec, *options: str, resumes: bool = False) -> dict[str, Any] | None:
        arguments = (*work_arguments(work), *options)
        if arguments not in self._answers:
            deadline = self.deadline if self.measures else time.monotonic()
            try:
                self._answers[arguments] = run_probe(
                    "harness.reliability.probes.survival",
                    work.backend,
                    arguments,
                    self.store,
                    time_limit_seconds=_PROBE_SECONDS,
                    expected_seconds=150.0,  # the longest of them, its base included
                    deadline=deadline,
                    announce=self.announce,
                    resumes=resumes,
                    work=work,
                )
            except ForgeError as error:
                self._answers[arguments] = error
        answer = self._answers[arguments]
        if isinstance(answer, ForgeError):
            raise answer
        return answer

    def finding(self, name: str, backend: Backend) -> Finding:
        """The verdict on a claim of :data:`CLAIMS` for a backend."""
        ask, judge, statement = CLAIMS[name]
        stated = partial(Finding, name=f"{name}_{backend}", statement=f"{backend}: {statement}")
        try:
            answer = ask(self, backend)
        except ForgeError as error:
            return stated(status="FAIL", reason=str(error))
        if answer is None:
            why = "no time was left for it in this session" if self.measures else "left out of this session"
            return stated(status="INCOMPLETE", reason=why)
        status, reason = by_faults(*judge(answer))
        return stated(status=status, reason=reason, figures=answer)


def _resumes(answer: dict[str, Any]) -> tuple[list[str], str]:
    faults, said = [], []
    if not answer["noise"]["identical"]:
        faults.append(f"two whole runs differ by {answer['noise']['largest']:.2g}: resumed ones cannot be compared")
    for name in ("killed", "stopped"):
        run = answer[name]
        apart = run["difference"]
        if not run["same_labels"]:
            faults.append(f"{name}: it did not train on the same labels")
        if not run["resumed_from_step"]:
            faults.append(f"{name}: it began anew")
        if apart["identical"]:
            said.append(f"{name}, resumed from step {run['resumed_from_step']}: identical to the bit")
        else:
            since = f", its losses since step {step}" if (step := apart["first_different_step"]) else ""
            faults.append(f"{name}: the adapter differs by {apart['largest']:.2g}{since}")
    return faults, "; ".join(said)


def _memory(answer: dict[str, Any]) -> tuple[list[str], str]:
    faults = []
    if not any(resume["after"] == "out_of_memory" for resume in answer["resumes"]):
        faults.append(f"nothing ran out of memory within {answer['cap_gib']:g} GiB")
    if answer["num_steps"] != answer["num_planned_steps"] or len(set(answer["documents"])) != 1:
        faults.append(
            f"{answer['num_steps']} of {answer['num_planned_steps']} steps of {answer['documents']} documents"
        )
    return faults, f"went on with micro-batches of {answer['micro_batch']} within {answer['cap_gib']:g} GiB"


_NEEDED = ("step_begin", "pre_optimizer_step", "optimizer_step", "step_end", "log")


def _order(answer: dict[str, Any]) -> tuple[list[str], str]:
    """Gradients are looked at before the optimizer's step, a step is logged before it is evaluated, then saved."""
    faults = []
    for step in answer["events"]:
        events = step.split()
        places = [events.index(name) if name in events else -1 for name in _NEEDED]
        later = [events.index(name) for name in ("evaluate", "save") if name in events]
        if -1 in places or places != sorted(places) or later != sorted(later) or (later and later[0] < places[-1]):
            faults.append(f"a step's callbacks came as {step}")
    if not any("save" in step for step in answer["events"]):
        faults.append("no step was saved")
    return faults, f"{len(answer['events'])} kinds of steps, each in order"


def _stop(answer: dict[str, Any]) -> tuple[list[str], str]:
    faults = []
    if answer["state"] != "interrupted" or answer["checkpoint_problem"] is not None:
        faults.append(f"it ended {answer['state']}; its checkpoint: {answer['checkpoint_problem'] or 'sound'}")
    if answer["stop_seconds"] > STOP_LIMIT_SECONDS:
        faults.append(f"{answer['stop_seconds']:.1f} s from SIGTERM to the end, limit {STOP_LIMIT_SECONDS:g}")
    size = answer["checkpoint_bytes"] / 1e6
    return faults, f"{answer['stop_seconds']:.1f} s from SIGTERM to the end, checkpoint of {size:.0f} MB sealed"


CLAIMS: dict[str, tuple[Any, Any, str]] = {
    "resume": (Survival.small_run, _resumes, "A killed and a stopped run go on as if nothing had happened."),
    "memory": (Survival.tight_run, _memory, "A step that runs out of memory is survived, the same work done."),
    "callbacks": (Survival.small_run, _order, "The trainer's callbacks come in the order that saving relies on."),
    "stop": (Survival.large_run, _stop, "At 7B a stopped run has sealed its checkpoint within 30 seconds."),
}
