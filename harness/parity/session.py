"""What every rung of the parity ladder stands on: its runs and probes, its documents and its base.

Runs and probes come from the store or are made now, several side by side. What a session has no time for is made in a
later one. The rungs themselves are in rungs.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from forge.training.backends import Backend, load_plan
from forge.training.config.workload import load_workload
from forge.training.system.errors import ForgeError, MachineError
from harness.documents import write_documents
from harness.measurement.metrics import WorkMismatch, check_same_work, training_steps
from harness.measurement.results import Outcome, RunSpec, Store
from harness.parity import suite
from harness.parity.claims import SAME_LEARNING_RATE
from harness.parity.side_by_side import Job, run_side_by_side
from harness.session import Session
from harness.trained_base import BASE, shared_folder, trained_base
from harness.verdict import Verdict

ProbeCall = tuple[Backend, tuple[str, ...]]  # whose interpreter, and the arguments


@dataclass
class Ladder:
    """One session's ladder. ``base``: a name that `forge base` knows, or a directory.

    ``plan``: what differs in the candidate's plan from the workload's. ``step_layouts``: the candidate's, on rungs 2
    and 3; ``dropout_layouts``: on rung 3 where Forge's layers train. ``layouts``: of the baseline's runs on rung 4.
    ``num_side_by_side``: processes at a time; 1: one after the other, each alone. ``overrides``: of the workload, for
    all arms alike. ``verdicts``: what rungs.py has judged so far, by number.
    """

    session: Session
    base: str = BASE
    baseline: Backend = suite.BASELINE
    candidate: Backend = suite.CANDIDATE
    plan: tuple[str, ...] = ()
    step_layouts: tuple[str, ...] = suite.STEP_LAYOUTS
    dropout_layouts: tuple[str, ...] = suite.DROPOUT_LAYOUTS
    num_positions: int = suite.NUM_POSITIONS
    layouts: tuple[tuple[str, ...], ...] = suite.LAYOUTS
    num_side_by_side: int = max(1, min(suite.MOST_SIDE_BY_SIDE, len(os.sched_getaffinity(0)) - suite.CORES_LEFT))
    overrides: tuple[str, ...] = ()
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    # ----------------------------------------------------------------------------------------------------------------
    # What all runs share

    @property
    def folder(self) -> Path:
        """For documents, bases and tensors: beside the store and not in it, because a store may be committed."""
        return shared_folder(self.session.store)

    @property
    def has_forge_layers(self) -> bool:
        """Whether the candidate's plan has Forge's layers train."""
        return load_plan(load_workload(suite.WORKLOAD, self.overrides), self.candidate, self.plan).kernels == "forge"

    @cached_property
    def documents(self) -> tuple[Path, Path]:
        """The documents trained on, and those held out."""
        return write_documents(self.session.train, self.folder)

    @cached_property
    def base_dir(self) -> Path:
        """The base's directory, made now if need be (`small`: some minutes on a GPU), alike on every machine of a kind.

        By its directory and not its name a base is in the key of every run by content: one with other weights, as
        another kind of machine would train it, begins the ladder anew.
        """
        session = self.session
        directory = trained_base(self.base, session.store, measures=session.measures, announce=session.announce)
        if directory is None:
            raise MachineError(
                f"the base {self.base} is not made, and this session leaves the ladder out",
                remedy="leave parity in --gate-only, or leave that option out",
            )
        return directory

    # ----------------------------------------------------------------------------------------------------------------
    # Probes and runs

    @property
    def may_prefetch(self) -> bool:
        """Whether something is measured before it is asked for: only where processes run side by side."""
        return self.num_side_by_side > 1 and self.session.measures

    def probes(
        self, name: str, calls: Sequence[ProbeCall], *, is_prefetch: bool = False
    ) -> list[dict[str, Any] | ForgeError | None]:
        """What ``harness.parity.probes.NAME`` answers to each call; ``None``: not measured.

        A probe that failed is the :class:`ForgeError` that says so. Several run side by side, and one that fails there
        is run again alone: only that failure is believed. ``is_prefetch``: such a failure is left for later.
        """

        def job(call: ProbeCall, is_alone: bool) -> Job[dict[str, Any] | None]:
            return Job(
                lambda: self.session.probe(
                    f"harness.parity.probes.{name}",
                    *call,
                    expected_seconds=suite.PROBE_EXPECTED_SECONDS,
                    limit_seconds=suite.PROBE_SECONDS,
                    is_alone=is_alone,
                )
            )

        most, distinct = self.num_side_by_side, list(dict.fromkeys(calls))
        with self.session.store.lock():
            beside = run_side_by_side([job(call, most == 1) for call in distinct], most=most, memory=most)
            answers = dict(zip(distinct, beside, strict=True))
            if most > 1 and not is_prefetch:
                again = [call for call, answer in answers.items() if isinstance(answer, ForgeError)]
                alone = run_side_by_side([job(call, True) for call in again], most=1, memory=1)
                answers.update(zip(again, alone, strict=True))
        return [answers[call] for call in calls]

    def spec(
        self,
        backend: Backend,
        seed: int,
        *,
        plan: tuple[str, ...] = (),
        changes: tuple[str, ...] = (),
        evaluate: bool = False,
        float32_adapter: bool = False,
    ) -> RunSpec:
        """A run of the ladder's workload. ``plan`` and ``changes``: ``key=value`` of the plan and of the workload."""
        train, validation = self.documents
        overrides = (
            f"model.path={self.base_dir}",
            f"data.train={train}",
            f"data.validation={validation}",
            f"training.seed={seed}",
            *self.overrides,
            *changes,
        )
        return RunSpec(
            backend=backend,
            workload=suite.WORKLOAD,
            overrides=overrides,
            plan_overrides=plan,
            evaluate=evaluate,
            float32_adapter=float32_adapter,
        )

    def outcome(self, spec: RunSpec, *, beside_others: bool = False) -> Outcome | None:
        """The run of ``spec``, from the store or made now; ``None``: not measured."""
        outcome = self.session.run(
            spec, expected_seconds=self._durations.expected_seconds(spec), is_alone=not beside_others
        )
        if outcome is not None:
            self._durations.note(outcome)
        return outcome

    def prefetch(self, specs: Sequence[RunSpec]) -> None:
        """Make what the store lacks of ``specs``, side by side; one that finds no memory beside others is made later.

        Nothing is judged here: whether these runs count is for the rungs to say.
        """
        if not self.may_prefetch:
            return
        longest_first = sorted(specs, key=self._durations.expected_seconds, reverse=True)
        with self.session.store.lock():
            jobs = [Job(partial(self.outcome, spec, beside_others=True), _micro_batch(spec)) for spec in longest_first]
            results = run_side_by_side(jobs, most=self.num_side_by_side, memory=suite.DOCUMENTS_SIDE_BY_SIDE)
        for error in results:
            if isinstance(error, ForgeError):
                raise error

    def outcomes(self, specs: Sequence[RunSpec]) -> list[Outcome]:
        """The runs of ``specs`` up to the first that is missing or failed, which is included if it failed."""
        self.prefetch(specs)
        outcomes: list[Outcome] = []
        for spec in specs:
            outcome = self.outcome(spec)
            if outcome is None:
                break
            outcomes.append(outcome)
            if outcome.status != "completed":
                break
        return outcomes

    @cached_property
    def _durations(self) -> _Durations:
        return _Durations(self.session.store)


class _Durations:
    """How long a run takes: the longest of its arm, micro-batch and evaluation so far, else by its micro-batches."""

    def __init__(self, store: Store) -> None:
        self._longest: dict[tuple[str, int, bool], float] = {}
        for outcome in store.outcomes():
            if Path(outcome.spec.workload).stem == suite.WORKLOAD:
                self.note(outcome)

    def note(self, outcome: Outcome) -> None:
        """Take a run into account; one that left no record says nothing."""
        if outcome.record is not None and outcome.status == "completed":
            size = int(outcome.record["plan"].get("micro_batch", 1))
            kind = (outcome.spec.backend, size, outcome.spec.evaluate)
            self._longest[kind] = max(self._longest.get(kind, 0.0), outcome.wall_seconds)

    def expected_seconds(self, spec: RunSpec) -> float:
        """Of a run that has not been made."""
        size = _micro_batch(spec)
        longest = self._longest.get((spec.backend, size, spec.evaluate))
        if longest is not None:
            return longest
        training = load_workload(spec.workload, spec.overrides).training
        num_micro_batches = (training.max_steps or 0) * (training.effective_batch // size)
        seconds = suite.RUN_EXPECTED_SECONDS + suite.MICRO_BATCH_EXPECTED_SECONDS * num_micro_batches
        return seconds + suite.EVALUATION_EXPECTED_SECONDS * spec.evaluate


def _micro_batch(spec: RunSpec) -> int:
    """Documents per micro-batch, by workload and plan."""
    return load_plan(load_workload(spec.workload, spec.overrides), spec.backend, spec.plan_overrides).micro_batch


def check_same_run(first: Outcome, second: Outcome) -> None:
    """Raise :class:`WorkMismatch` with both values where work or the learning rate of a step differs or is missing.

    Rung 1 compares the optimizers and schedulers that the trainers hold before the first step; this is what became of
    them in the runs of rungs 4 to 6.
    """
    check_same_work(first, second)
    sides: list[list[Any]] = [[step.get("learning_rate") for step in training_steps(run)] for run in (first, second)]
    for number, (a, b) in enumerate(zip(*sides, strict=True), 1):
        if a is None or b is None or not math.isclose(a, b, rel_tol=SAME_LEARNING_RATE):
            runs = " | ".join(f"{run.spec.label()} [{run.run_id}]" for run in (first, second))
            raise WorkMismatch(
                f"not the same schedule: {runs}\n  learning_rate, step {number}: {a} | {b}",
                remedy="look at the optimizer's settings of both arms (rung 1 lists them)",
            )
