"""What the survival probe is asked: three runs per backend, each in a process of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from forge.training.backends import Backend
from harness.measurement.environment import work_arguments
from harness.measurement.results import RunSpec
from harness.session import Session
from harness.verdict import Claim, Verdict

BACKENDS: tuple[Backend, ...] = ("trl", "unsloth")
_LIMIT_SECONDS = 540.0
_EXPECTED_SECONDS = 150.0  # of the longest of them, its base included

# 4-bit weights, the paged 8-bit optimizer and dropout: everything whose state a resume must bring back
_SMALL = (
    *("model.quantization=nf4", "model.dtype=bfloat16", "optimizer.name=paged_adamw_8bit", "lora.dropout=0.1"),
    *("training.max_steps=40", "training.save_every_steps=10", "training.evaluate_every_steps=16", "report_to=[]"),
)
_PADDED = ("micro_batch=8", "padding=longest", "grouping=none")


def verdict(session: Session, claim: Claim, backend: Backend) -> Verdict:
    """The verdict on a claim for a backend. ``figures``: the probe's answer, as answers.py describes it."""
    claim = replace(claim, name=f"{claim.name}_{backend}", statement=f"{backend}: {claim.statement}")
    return session.verdict(claim, lambda: _answer(session, claim.probe, backend))


def _answer(session: Session, run: str, backend: Backend) -> dict[str, Any] | None:
    """``small``: the smoke config's trained base in 4 bits, killed and stopped. ``large``: a 7B run that is stopped.

    ``tight``: eight documents of up to 2,048 tokens, padded into one micro-batch, in 8 GiB. ``None``: not measured.
    """
    of_7b = (
        f"model.path={session.model}",
        f"data.train={session.train}",
        "data.validation=null",
        "data.validation_share=0",
        "report_to=[]",
    )
    tight = (*of_7b, "data.sample=32", "data.max_length=2048", "training.max_steps=4")
    workload, overrides, plan_overrides, options = {
        "small": ("smoke", _SMALL, (), ()),
        "large": ("genome_8k", (*of_7b, "data.sample=64"), (), ("--stop-only", "--after-steps", "3")),
        "tight": ("genome_8k", tight, _PADDED, ("--cap-gib", "8")),
    }[run]
    work = RunSpec(backend=backend, workload=workload, overrides=overrides, plan_overrides=plan_overrides)
    return session.probe(
        "harness.reliability.probes.survival",
        backend,
        (*work_arguments(work), *options),
        expected_seconds=_EXPECTED_SECONDS,
        limit_seconds=_LIMIT_SECONDS,
        resumes=run == "small",
        work=work,
    )
