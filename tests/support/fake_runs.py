"""Quick children in place of training runs, with their outcomes and trials; the runner is the real one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.measurement.results import Monitor, Outcome, RunSpec, Store
from harness.measurement.runner import run_once
from harness.measurement.trial import Trial, run_trial
from tests.support.records import make_record, make_steps

SPEC = RunSpec(backend="trl", workload="smoke")
OTHER = RunSpec(backend="trl", workload="smoke", plan_overrides=("micro_batch=2",))

# No import but the standard library's: a trial's test starts many of them.
_CHILD = """
import json, sys, time
run_dir, options = sys.argv[1], json.loads(sys.argv[2])
time.sleep(options["sleep"])
for name in ("run.json", "steps.jsonl"):
    with open(f"{run_dir}/{name}", "w") as stream:
        stream.write(options[name])
sys.exit(options["exit_code"])
"""


def fake(
    *, sleep: float = 0.0, record: dict[str, Any] | None = None, steps: dict[str, Any] | None = None, exit_code: int = 0
) -> Callable[[RunSpec, Path], list[str]]:
    """A command for :func:`harness.measurement.runner.run_once`. ``sleep``: seconds; the rest as in make_outcome."""
    options = {
        "sleep": sleep,
        "run.json": make_record(**(record or {})).model_dump_json(),
        "steps.jsonl": "".join(json.dumps(line) + "\n" for line in make_steps(**(steps or {}))),
        "exit_code": exit_code,
    }
    return lambda spec, run_dir: [sys.executable, "-I", "-S", "-c", _CHILD, str(run_dir), json.dumps(options)]


def make_outcome(record: dict[str, Any] | None = None, steps: dict[str, Any] | None = None, **fields: Any) -> Outcome:
    """A completed outcome; ``record`` and ``steps``: changes for :func:`make_record` and :func:`make_steps`."""
    return Outcome.model_validate(
        {
            **{"run_id": "0123456789ab-0001", "key": "0123456789ab", "key_parts": {}, "spec": SPEC},
            **{"status": "completed", "exit_code": 0, "started_at": "2026-11-24T12:00:00+00:00", "wall_seconds": 3.0},
            **{"machine": "0" * 16, "monitor": Monitor(), "log_tail": ""},
            "record": make_record(**(record or {})).model_dump(mode="json"),
            "steps": make_steps(**(steps or {})),
            **fields,
        }
    )


class Arms:
    """Runs quick children through the real runner and notes which arm ran: A for :data:`SPEC`, else B.

    ``script``: for the n-th run from 1, options of :func:`fake`, and the figures of a monitor in the GPU's place.
    """

    def __init__(self, script: dict[int, dict[str, Any]] | None = None) -> None:
        self.script = script or {}
        self.order = ""

    def __call__(self, spec: RunSpec, *, store: Store, time_limit_seconds: float) -> Outcome:
        self.order += "A" if spec == SPEC else "B"
        options = dict(self.script.get(len(self.order), {}))
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
    """A trial of the baseline :data:`SPEC` against the candidate :data:`OTHER`."""
    return run_trial(name, SPEC, OTHER, num_pairs, store, run=run, time_limit_seconds=60, **more)


def ids(trial: Trial) -> list[str]:
    """The two runs of each pair in the order baseline, candidate, by their counts."""
    return [f"{a.run_id[-2:]} {b.run_id[-2:]}" for a, b in trial.pairs]
