"""Trials whose runs are quick children: which arm ran, and how each run ends."""

from __future__ import annotations

from typing import Any

from harness.measurement.results import Outcome, RunSpec, Store
from harness.measurement.runner import run_once
from harness.measurement.trial import Trial, run_trial
from tests.support.fake_training import OTHER, SPEC, fake

A, B = SPEC, OTHER  # baseline and candidate: one workload, two plans


class Arms:
    """Runs real quick children through the real runner and notes which arm ran.

    ``script``: for the n-th run from 1, options of its child (:func:`tests.support.fake_training.fake`) and the
    figures of a monitor that stand in for the GPU's.
    """

    def __init__(self, script: dict[int, dict[str, Any]] | None = None) -> None:
        self.script = script or {}
        self.order = ""
        self.num_runs = 0

    def __call__(self, spec: RunSpec, *, store: Store, time_limit_seconds: float) -> Outcome:
        self.order += "A" if spec == A else "B"
        self.num_runs += 1
        options = dict(self.script.get(self.num_runs, {}))
        states = options.pop("gpu", None)
        read_gpu = iter(states).__next__ if states else lambda: None
        if options.pop("kill", False):
            raise KeyboardInterrupt
        limit = options.pop("limit", time_limit_seconds)
        return run_once(
            spec, store=store, time_limit_seconds=limit, command=fake(**options), read_gpu=read_gpu, grace_seconds=0.5
        )


def gpu(**during: Any) -> dict[str, Any]:
    """A script entry: nobody on the GPU before, then this for as long as the child runs."""
    before = {"num_other_processes": 0, "memory_used_bytes": 1 << 28, "throttle_reasons": []}
    return {"sleep": 0.5, "gpu": [before] + [before | during] * 1000}


def measure_trial(store: Store, run: Any, num_pairs: int = 3, name: str = "speed", **more: Any) -> Trial:
    """A trial of :data:`A` against :data:`B`."""
    return run_trial(name, A, B, num_pairs, store, run=run, time_limit_seconds=60, **more)


def ids(trial: Trial) -> list[str]:
    """The two runs of each pair in the order baseline, candidate, by their counts."""
    return [f"{a.run_id[-2:]} {b.run_id[-2:]}" for a, b in trial.pairs]
