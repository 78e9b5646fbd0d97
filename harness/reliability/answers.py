"""What the survival probe answers, key by key: written by the probe, read by the judges and by the report.

As the store gives it, each answer also has what the probe runner adds: ``key``, ``machine``, ``started_at`` and others.
"""

from __future__ import annotations

from typing import Any, TypedDict


class Difference(TypedDict):
    """Two finished runs, compared."""

    identical: bool  # the adapters, to the bit
    largest: float  # difference of two weights
    relative: float  # norm of the adapters' difference / norm of the first
    largest_loss: float  # difference of two steps' losses, nats
    first_different_step: int | None  # by its loss


class Resumed(TypedDict):
    """A run that was ended by a signal and resumed."""

    difference: Difference  # from a run that nothing happened to
    resumed_from_step: int
    num_steps: int
    same_labels: bool  # it trained on the same labels as that run, step by step


class SmallRun(TypedDict):
    """Two whole runs, one that is killed and one that is stopped."""

    noise: Difference  # of the two whole runs
    killed: Resumed  # by SIGKILL in a step
    stopped: Resumed  # by SIGTERM
    stop_seconds: float  # from SIGTERM to the end of the process
    events: list[str]  # the order of the trainer's callbacks, once per kind of step: "step_begin ... log save"


class LargeRun(TypedDict):
    """A run of real size that is stopped."""

    stop_seconds: float  # from SIGTERM to the end of the process
    state: str  # what status.json says afterwards
    checkpoint_problem: Any  # what is wrong with its checkpoint, `None` where it is sound
    checkpoint_bytes: int
    step: int  # the last one done
    last_step_seconds: float


class TightRun(TypedDict):
    """A run whose micro-batches do not fit into GPU memory at first."""

    cap_gib: float  # of GPU memory
    micro_batch: int  # documents, in the end
    resumes: list[dict[str, Any]]  # as in run.json; `after` is "out_of_memory" or another cause
    num_steps: int
    num_planned_steps: int
    documents: list[int]  # per optimizer step
