"""One session of the parity ladder: its runs and verdicts, as they are asked for.

A rung is judged once its predecessor has passed, from runs that the store has or that are made now. What a session
has no time for is INCOMPLETE; the next session goes on from the store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from forge.training.backends import Backend
from forge.training.config.workload import GateSection, load_workload
from forge.training.system.errors import CheckError, ForgeError, MachineError
from harness.documents import write_documents
from harness.measurement.probe import run_probe
from harness.measurement.results import Outcome, RunSpec, Store
from harness.measurement.runner import TIME_LIMIT_SECONDS, run_once
from harness.measurement.trial import Run, run_single
from harness.parity.claims import Rung, blocked_by
from harness.parity.durations import Durations, micro_batch
from harness.parity.side_by_side import Job, run_side_by_side
from harness.parity.suite import (
    BASELINE,
    CANDIDATE,
    CORES_LEFT,
    DOCUMENTS_SIDE_BY_SIDE,
    LAYOUTS,
    MOST_SIDE_BY_SIDE,
    NUM_POSITIONS,
    PROBE_EXPECTED_SECONDS,
    PROBE_SECONDS,
    STEP_LAYOUTS,
    WORKLOAD,
)
from harness.trained_base import BASE, shared_folder, trained_base


@dataclass
class Ladder:
    """One session. ``train``: the gate's documents; ``deadline``: on :func:`time.monotonic`'s clock.

    ``base``: a name or directory. ``measures``: whether runs may be made; if not, verdicts rest on what the store has.
    ``layouts``: plans of the baseline's runs on rung 4. ``num_side_by_side``: processes at a time; 1: one after the
    other, each alone. ``overrides``: of the workload, for all arms alike.
    """

    store: Store
    train: Path
    base: str = BASE
    baseline: Backend = BASELINE
    candidate: Backend = CANDIDATE
    step_layouts: tuple[str, ...] = STEP_LAYOUTS
    num_positions: int = NUM_POSITIONS
    layouts: tuple[tuple[str, ...], ...] = LAYOUTS
    num_side_by_side: int = max(1, min(MOST_SIDE_BY_SIDE, len(os.sched_getaffinity(0)) - CORES_LEFT))
    overrides: tuple[str, ...] = ()
    deadline: float | None = None
    measures: bool = True
    run: Run = run_once
    time_limit_seconds: float = TIME_LIMIT_SECONDS
    announce: Callable[[str], None] = lambda line: None
    _verdicts: dict[int, Rung] = field(default_factory=dict)
    _missed: dict[int, Rung] = field(default_factory=dict)
    _failed: set[Any] = field(default_factory=set)  # probes that failed beside others

    # ----------------------------------------------------------------------------------------------------------------
    # Verdicts

    def verdict(self, number: int) -> Rung:
        """The verdict on a rung, judged once a session; INCOMPLETE where one below is no PASS."""
        if number not in self._verdicts:
            below = self.verdict(number - 1) if number > 1 else None
            if below is not None and below.status != "PASS":
                self._missed[number] = self._missed.get(number - 1, below)  # the lowest, not a chain of reasons
                self._verdicts[number] = blocked_by(self._missed[number], number)
            else:
                self._verdicts[number] = self._judge(number)
        return self._verdicts[number]

    def _judge(self, number: int) -> Rung:
        from harness.parity.first_step import judge as first_step
        from harness.parity.outcome import judge as outcome
        from harness.parity.trajectory import judge as trajectory  # they know the ladder

        judges: dict[int, Callable[[Ladder], Rung]] = {
            1: first_step.judge_inputs,
            2: first_step.judge_first_step,
            3: first_step.judge_step_equivalence,
            4: trajectory.judge_noise,
            5: trajectory.judge_trajectory,
            6: outcome.judge_outcome,
        }
        try:
            return judges[number](self)
        except CheckError as error:  # other work, other weights: found, not failed to look
            return Rung(number=number, status="FAIL", reason=str(error))
        except ForgeError as error:
            return Rung(number=number, status="INCOMPLETE", reason=str(error))

    # ----------------------------------------------------------------------------------------------------------------
    # Measuring

    def probes(
        self, name: str, asked: Sequence[tuple[Backend, tuple[str, ...]]], *, is_prefetch: bool = False
    ) -> list[Any]:
        """What ``harness.parity.probes.NAME`` answers in a process for each backend and arguments; ``None``: no time.

        A probe that failed is the :class:`ForgeError` that says so. Several run side by side, and one that fails there
        once more alone: then, not in a prefetch, it is believed.
        """

        def job(one: tuple[Backend, tuple[str, ...]], is_alone: bool) -> Job[dict[str, Any] | None]:
            return Job(
                lambda: run_probe(
                    f"harness.parity.probes.{name}",
                    *one,
                    self.store,
                    time_limit_seconds=PROBE_SECONDS,
                    deadline=self.deadline if self.measures else 0.0,
                    announce=self.announce,
                    expected_seconds=PROBE_EXPECTED_SECONDS,
                    is_alone=is_alone,
                )
            )

        most = self.num_side_by_side
        beside = [one for one in dict.fromkeys(asked) if one not in self._failed]
        with self.store.lock():
            results = run_side_by_side([job(one, most == 1) for one in beside], most=most, room=most)
            found = dict(zip(beside, results, strict=True))
            if most > 1:
                self._failed |= {one for one, result in found.items() if isinstance(result, ForgeError)}
                if not is_prefetch:
                    alone = [one for one in dict.fromkeys(asked) if one in self._failed]
                    again = run_side_by_side([job(one, True) for one in alone], most=1, room=1)
                    found.update(zip(alone, again, strict=True))
        return [found.get(one) for one in asked]

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
        """A run of the ladder's workload."""
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
            workload=WORKLOAD,
            overrides=overrides,
            plan_overrides=plan,
            evaluate=evaluate,
            float32_adapter=float32_adapter,
        )

    def outcome(self, spec: RunSpec, *, beside_others: bool = False) -> Outcome | None:
        """The run of ``spec``, from the store or made now; ``None``: neither.

        Whether there is time: durations.py.
        """
        outcome = run_single(
            spec,
            self.store,
            deadline=self.deadline if self.measures else 0.0,
            run=partial(self.run, is_alone=False) if beside_others else self.run,
            time_limit_seconds=self.time_limit_seconds,
            unseen_seconds=self._durations.expected_seconds(spec),
            announce=self.announce,
        )
        if outcome is not None:
            self._durations.note(outcome)
        return outcome

    def prefetch(self, specs: Sequence[RunSpec]) -> None:
        """Make what the store lacks of ``specs``, side by side; one that finds no memory beside others is made later.

        Whether they count is for the rungs to say, each of which stands on the one below: nothing is judged here.
        """
        if self.num_side_by_side == 1 or not self.measures:
            return

        longest_first = sorted(specs, key=self._durations.expected_seconds, reverse=True)
        with self.store.lock():
            jobs = [Job(partial(self.outcome, spec, beside_others=True), micro_batch(spec)) for spec in longest_first]
            found = run_side_by_side(jobs, most=self.num_side_by_side, room=DOCUMENTS_SIDE_BY_SIDE)
        for error in found:
            if isinstance(error, ForgeError):
                raise error

    def outcomes(self, specs: Sequence[RunSpec]) -> list[Outcome]:
        """The runs of ``specs`` up to the first that is missing or failed, which is included if it failed."""
        self.prefetch(specs)
        found: list[Outcome] = []
        for spec in specs:
            outcome = self.outcome(spec)
            if outcome is None:
                break
            found.append(outcome)
            if outcome.status != "completed":
                break
        return found

    @cached_property
    def _durations(self) -> Durations:
        return Durations(self.store)

    # ----------------------------------------------------------------------------------------------------------------
    # What all runs share

    @cached_property
    def gate(self) -> GateSection:
        """What the workload fixes of rung 6."""
        return load_workload(WORKLOAD, self.overrides).gate

    @cached_property
    def documents(self) -> tuple[Path, Path]:
        """What is trained on and what is held out."""
        return write_documents(self.train, shared_folder(self.store))

    @cached_property
    def base_dir(self) -> Path:
        """The base's directory, made now if need be (`small`: some minutes on a GPU), alike on every machine of a kind.

        By its directory and not its name a base is in the key of every run by content: one with other weights, as
        another kind of machine would train it, begins the ladder anew.
        """
        directory = trained_base(self.base, self.store, measures=self.measures, announce=self.announce)
        if directory is None:
            raise MachineError(
                f"the base {self.base} is not made, and this session leaves the ladder out",
                remedy="leave parity in --gate-only, or leave that option out",
            )
        return directory
