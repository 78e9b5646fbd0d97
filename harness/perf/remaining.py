"""Remaining measurements of this suite, with expected minutes: ``python -m harness.perf.remaining [STORE]``.

Nothing is measured and no GPU needed. Seconds are those of the store's own runs of that arm, else of suite.py
(one H200). A session is what ``--gate-seconds`` allows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.training.backends import load_plan
from forge.training.config.workload import load_workload
from forge.training.system.errors import ForgeError
from forge.training.system.files import read_json_object
from harness.measurement.key import code_sha256, source_sha256
from harness.measurement.results import Outcome, Store
from harness.perf import suite
from harness.perf.suite import TRIALS, Arm


@dataclass(frozen=True)
class Item:
    """``units``: seconds of each thing that is begun as a whole: a pair, a run, a probe."""

    name: str
    num_done: int
    units: tuple[float, ...]


def remaining(store: Store) -> list[Item]:
    """Every item of :data:`harness.perf.suite.ORDER`, in that order. Raises :class:`DataError` for a damaged store."""
    outcomes = [outcome for outcome in store.outcomes() if outcome.status != "refused"]
    probes = [read_json_object(path) for path in store.probe_paths()]
    seen: set[tuple[str, Arm]] = set()
    items = []
    for name in suite.ORDER:
        if name in TRIALS:
            planned = TRIALS[name]
            pair = [(planned.workload, planned.baseline), (planned.workload, planned.candidate)]
            state = store.read_trial(name)
            done, total = len(state.pairs) if state else 0, planned.num_pairs
            units = [sum(_seconds(outcomes, *run) for run in pair)] * (total - done)
            seen |= {(workload, _alike(arm)) for workload, arm in pair}
        elif name in ("singles", "ablation"):
            runs = (*suite.SINGLES, suite.FP16) if name == "singles" else suite.ABLATION
            new = [run for run in runs if (run[0], _alike(run[1])) not in seen]
            seen |= {(workload, _alike(arm)) for workload, arm in new}
            missing = [run for run in new if not any(map(_is_current, _runs_of(outcomes, *run)))]
            done, units = len(runs) - len(missing), [_seconds(outcomes, *run) for run in missing]
        elif name == "matmul_peak":
            done = int(any(_is_of("matmul_peak", probe) for probe in probes))
            units = [suite.PEAK_TAKES_SECONDS] * (1 - done)
        else:
            current = [probe for probe in probes if _is_of("max_context", probe)]
            measured = {(probe["backend"], probe["budget_gib"]) for probe in current}
            done = len(suite.CONTEXT_TAKES_SECONDS.keys() & measured)
            units = [seconds for probe, seconds in suite.CONTEXT_TAKES_SECONDS.items() if probe not in measured]
        items.append(Item(name, done, tuple(units)))
    return items


def num_sessions(units: Iterable[float], seconds: float) -> int:
    """Sessions of so many seconds that the units take in their order; none is begun that its session cannot end."""
    count, left = 0, 0.0
    for unit in units:
        if unit > left:
            count, left = count + 1, seconds
        left -= unit
    return count


def _alike(arm: Arm) -> Arm:
    return Arm("", arm.backend, arm.plan, arm.overrides)  # two names for one layout are one run


def _runs_of(outcomes: list[Outcome], workload: str, arm: Arm) -> list[Outcome]:
    return [
        outcome
        for outcome in outcomes
        if (outcome.spec.workload, outcome.spec.backend) == (workload, arm.backend)
        and outcome.spec.plan_overrides == arm.plan
        and set(arm.overrides) <= set(outcome.spec.overrides)
    ]


def _is_current(outcome: Outcome) -> bool:
    """Whether today's training code would carry it out by the same plan; what else is in its key takes the GPU."""
    spec, parts = outcome.spec, outcome.key_parts
    plan = load_plan(load_workload(spec.workload), spec.backend, spec.plan_overrides)
    return parts.get("plan") == plan.model_dump(mode="json") and parts.get("code") == code_sha256()


def _is_of(name: str, probe: dict[str, Any]) -> bool:
    """Whether it is an answer of today's probe of that name, by today's training code."""
    wanted = {"probe": name, "source": source_sha256(f"harness.perf.probes.{name}"), "code": code_sha256()}
    return all(probe.get("key_parts", {}).get(name) == value for name, value in wanted.items())


def _seconds(outcomes: list[Outcome], workload: str, arm: Arm) -> float:
    known = [outcome.wall_seconds for outcome in _runs_of(outcomes, workload, arm) if outcome.status == "completed"]
    return statistics.median(known) if known else suite.EXPECTED_SECONDS[workload]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("python -m harness.perf.remaining", description="What remains to be measured.")
    parser.add_argument("store", nargs="?", type=Path, default=Path("runs/gate/store"), metavar="STORE")
    parser.add_argument("--seconds", type=float, default=470.0, help="of measuring in one session (default 470)")
    options = parser.parse_args(arguments)
    try:
        items = remaining(Store(options.store))
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    so_far: list[float] = []
    print(f"{'':28}{'done':>5}{'left':>5}{'minutes':>9}   sessions of {options.seconds:g} s up to here")
    for item in items:
        so_far += item.units
        minutes = sum(item.units) / 60
        up_to = num_sessions(so_far, options.seconds)
        print(f"{item.name:28}{item.num_done:5}{len(item.units):5}{minutes:9.1f}   {up_to}")
    print(f"{'together':28}{'':10}{sum(so_far) / 60:9.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
