"""What the survival probe is asked: three runs per backend, each in a process of its own."""

from __future__ import annotations

from typing import Any

from forge.training.backends import Backend
from harness.measurement.environment import work_arguments
from harness.measurement.results import RunSpec
from harness.reliability.answers import LargeRun, SmallRun, TightRun
from harness.session import Session

BACKENDS: tuple[Backend, ...] = ("trl", "unsloth")
_LIMIT_SECONDS = 540.0
_EXPECTED_SECONDS = 150.0  # of the longest of them, its base included

# 4-bit weights, the paged 8-bit optimizer and dropout: everything whose state a resume must bring back
_SMALL = (
    *("model.quantization=nf4", "model.dtype=bfloat16", "optimizer.name=paged_adamw_8bit", "lora.dropout=0.1"),
    *("training.max_steps=40", "training.save_every_steps=10", "training.evaluate_every_steps=16", "report_to=[]"),
)


def small_run(session: Session, backend: Backend) -> SmallRun | None:
    """The smoke config's trained base in 4 bits, killed and stopped; ``None``: not measured."""
    work = RunSpec(backend=backend, workload="smoke", overrides=_SMALL)
    answer: SmallRun | None = _ask(session, work, resumes=True)
    return answer


def large_run(session: Session, backend: Backend) -> LargeRun | None:
    """A 7B run that is stopped; ``None``: not measured."""
    work = RunSpec(backend=backend, workload="genome_8k", overrides=_of_7b(session, 64))
    answer: LargeRun | None = _ask(session, work, "--stop-only", "--after-steps", "3")
    return answer


def tight_run(session: Session, backend: Backend) -> TightRun | None:
    """Eight documents of up to 2,048 tokens, padded into one micro-batch, in 8 GiB; ``None``: not measured."""
    settings = (*_of_7b(session, 32), "data.max_length=2048", "training.max_steps=4")
    layout = ("micro_batch=8", "padding=longest", "grouping=none")
    work = RunSpec(backend=backend, workload="genome_8k", overrides=settings, plan_overrides=layout)
    answer: TightRun | None = _ask(session, work, "--cap-gib", "8")
    return answer


def _of_7b(session: Session, num_documents: int) -> tuple[str, ...]:
    data = (f"data.train={session.train}", "data.validation=null", f"data.sample={num_documents}")
    return (f"model.path={session.model}", *data, "report_to=[]")


def _ask(session: Session, work: RunSpec, *options: str, resumes: bool = False) -> Any:
    return session.probe(
        "harness.reliability.probes.survival",
        work.backend,
        (*work_arguments(work), *options),
        expected_seconds=_EXPECTED_SECONDS,
        limit_seconds=_LIMIT_SECONDS,
        resumes=resumes,
        work=work,
    )
