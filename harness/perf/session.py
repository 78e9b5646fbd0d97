"""One session of measuring what harness/perf/suite.py lists.

A session measures what is missing until its time is up, in the order of :data:`ORDER`: first what
the claims need. Everything lands in a store, so a gate may be spread over as many sessions and
machines (of one kind) as it takes; a trial that is not finished is INCOMPLETE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from forge.training.config.workload import Workload, load_workload
from forge.training.system.errors import ConfigurationError, ForgeError
from harness.measurement.environment import work_arguments
from harness.measurement.metrics import Metric
from harness.measurement.probe import run_probe
from harness.measurement.results import Outcome, RunSpec, Store
from harness.measurement.runner import TIME_LIMIT_SECONDS
from harness.measurement.trial import Trial, measure, read_trial, run_single, run_trial
from harness.perf.claims import Claim, Verdict, judge
from harness.perf.suite import (
    CEILING_SECONDS,
    CEILING_TAKES_SECONDS,
    CONTEXT_BUDGETS_GIB,
    CONTEXT_LOAD_SECONDS,
    CONTEXT_SECONDS,
    CONTEXT_TAKES_SECONDS,
    CONTEXT_WORKLOAD,
    EXPECTED_SECONDS,
    FP16,
    LADDER,
    LEGACY,
    MODEL,
    ORDER,
    SINGLES,
    TRIALS,
    TRL,
    UNSLOTH,
    Arm,
)

_PAST = 0.0  # a deadline that leaves time for nothing but looking into the store


@dataclass
class Gate:
    """One session. ``deadline``: on :func:`time.monotonic`'s clock; nothing is begun that cannot end before it."""

    store: Store
    train: Path
    model: str = MODEL
    deadline: float | None = None
    run_seconds: float = TIME_LIMIT_SECONDS  # at which a run is stopped, which is an outcome
    may_halve: bool = False  # pairs, where the next session follows at once on this machine
    only: tuple[str, ...] = ORDER
    announce: Callable[[str], None] = lambda line: None
    errors: dict[str, ForgeError] = field(default_factory=dict)
    _singles: dict[RunSpec, Outcome | None] = field(default_factory=dict)
    _probes: dict[tuple[str, ...], dict[str, Any] | None] = field(default_factory=dict)
    _trials: dict[str, Trial | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.only) - set(ORDER))
        if unknown:
            raise ConfigurationError(f"the gate measures no {unknown[0]!r}", remedy=f"known: {', '.join(ORDER)}")
        if not self.train.is_file():
            raise ConfigurationError(
                f"the gate trains on real documents, and {self.train} is no file",
                remedy="name the JSONL that `python -m forge.training dataset` wrote: --gate-train FILE",
            )

    # ----------------------------------------------------------------------------------------------------------------
    # Specs

    def workload(self, name: str) -> Workload:
        """The workload as the gate runs it."""
        return load_workload(name, self._overrides(name))

    def spec(self, workload: str, arm: Arm) -> RunSpec:
        """A run of ``arm``: the workload's first ``gate.num_steps`` steps on a sample of as many documents."""
        overrides = (*self._overrides(workload), *arm.overrides)
        return RunSpec(backend=arm.backend, workload=workload, overrides=overrides, plan_overrides=arm.plan)

    def _overrides(self, workload: str) -> tuple[str, ...]:
        own = load_workload(workload)
        steps = own.gate.num_steps
        return (
            f"model.path={self.model}",
            f"data.train={self.train}",
            "data.validation=null",
            f"data.sample={steps * own.training.effective_batch}",
            f"training.max_steps={steps}",
            "training.save_every_steps=null",
            "training.save_every_minutes=null",
            "report_to=[]",
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Measuring

    def measure_all(self) -> None:
        """Measure what is missing, until the deadline, in the order of ``only``.

        An error ends its item and is kept in ``errors``.
        """
        for name in self.only:
            try:
                self._measure(name)
            except ForgeError as error:
                self.errors[name] = error
                self.announce(f"{name}: {error}")

    def _measure(self, name: str) -> None:
        if name in TRIALS:
            planned = TRIALS[name]
            trial = run_trial(
                name,
                self.spec(planned.workload, planned.baseline),
                self.spec(planned.workload, planned.candidate),
                self.num_pairs(name),
                self.store,
                deadline=self.deadline,
                time_limit_seconds=self.run_seconds,
                unseen_seconds=EXPECTED_SECONDS[planned.workload],
                may_halve=self.may_halve,
                announce=self.announce,
            )
            if trial.is_halved:
                self.deadline = _PAST  # anything measured in between would part the halves
            self._trials[name] = trial
        elif name in ("singles", "ladder"):
            for workload, arm in (*SINGLES, FP16) if name == "singles" else LADDER:
                self._single(workload, arm, self.deadline)
        elif name == "ceiling":
            self._ceiling(self.deadline)
        else:
            failures = []
            for arm in (LEGACY, TRL, UNSLOTH):
                for budget_gib in CONTEXT_BUDGETS_GIB:
                    try:
                        self._context(arm, budget_gib, self.deadline)
                    except ForgeError as error:  # of one card, and the others are measured all the same
                        failures.append(error)
            if failures:
                raise failures[0]

    def _single(self, workload: str, arm: Arm, deadline: float | None) -> Outcome | None:
        spec = self.spec(workload, arm)
        if spec not in self._singles:
            self._singles[spec] = run_single(
                spec,
                self.store,
                deadline=deadline,
                time_limit_seconds=self.run_seconds,
                unseen_seconds=EXPECTED_SECONDS[workload],
                announce=self.announce,
            )
        return self._singles[spec]

    def _ceiling(self, deadline: float | None) -> dict[str, Any] | None:
        return self._probe(
            "harness.perf.probes.matmul_peak", UNSLOTH, (), CEILING_TAKES_SECONDS, CEILING_SECONDS, deadline
        )

    def _context(self, arm: Arm, budget_gib: float, deadline: float | None) -> dict[str, Any] | None:
        work, seconds = self.spec(CONTEXT_WORKLOAD, arm), CONTEXT_SECONDS[budget_gib]
        asked = (*work_arguments(work), "--budget", f"{budget_gib:g}", "--seconds", f"{seconds:g}")
        expected = CONTEXT_TAKES_SECONDS[arm.backend, budget_gib]
        return self._probe(
            "harness.perf.probes.max_context", arm, asked, expected, seconds + CONTEXT_LOAD_SECONDS, deadline, work
        )

    def _probe(
        self,
        module: str,
        arm: Arm,
        arguments: tuple[str, ...],
        expected_seconds: float,
        most_seconds: float,
        deadline: float | None,
        work: RunSpec | None = None,
    ) -> dict[str, Any] | None:
        asked = (module, arm.name, *arguments)
        if asked not in self._probes:
            self._probes[asked] = run_probe(
                module,
                arm.backend,
                arguments,
                self.store,
                expected_seconds=expected_seconds,
                time_limit_seconds=most_seconds,
                deadline=deadline,
                announce=self.announce,
                work=work,
            )
        return self._probes[asked]

    # ----------------------------------------------------------------------------------------------------------------
    # What there is

    def num_pairs(self, name: str) -> int:
        """Pairs of a trial, fixed before its first."""
        planned = TRIALS[name]
        return planned.num_pairs or load_workload(planned.workload).gate.num_pairs

    def num_warmup_steps(self, workload: str) -> int:
        """Steps of a run that are not timed."""
        return load_workload(workload).gate.num_warmup_steps

    def trial(self, name: str) -> Trial | None:
        """A trial as it stands; ``None``: never begun, or of other code, data or packages. Raises what ended it."""
        if name in self.errors:
            raise self.errors[name]
        if name in self._trials:
            return self._trials[name]
        planned = TRIALS[name]
        specs = tuple(self.spec(planned.workload, arm) for arm in (planned.baseline, planned.candidate))
        return read_trial(name, self.store, specs=(specs[0], specs[1]))

    def single(self, workload: str, arm: Arm) -> Outcome | None:
        """A run beside the trials, of this session or in the store; ``None`` where there is none."""
        if {"singles", "ladder"} & set(self.errors):  # an arm that cannot even be asked what it would run
            return self._singles.get(self.spec(workload, arm))
        return self._single(workload, arm, _PAST)

    def ceiling(self) -> dict[str, Any] | None:
        """The ceiling probe's answer, of this session or in the store; ``None`` where there is none."""
        return None if "ceiling" in self.errors else self._ceiling(_PAST)

    def context(self, arm: Arm, budget_gib: float) -> dict[str, Any] | None:
        """The context probe's answer for a backend's arm in a budget, likewise."""
        try:
            return self._context(arm, budget_gib, _PAST)
        except ForgeError:  # an arm that cannot even be asked what it would run
            if "context" in self.errors:
                return None
            raise

    def why_missing(self, name: str) -> str:
        """Why an item of :data:`ORDER` has no result, for people."""
        if name in self.errors:
            return self.errors[name].message
        if name not in self.only:
            return "left out of this session (--gate-only), and the store has none"
        return "no time was left for it in this session"

    def verdict(self, claim: Claim) -> Verdict:
        """The verdict on a claim by the pairs there are."""
        trial = self.trial(claim.trial)
        planned, warmup = self.num_pairs(claim.trial), self.num_warmup_steps(TRIALS[claim.trial].workload)
        pairs = trial.pairs if trial else []
        metric = cast(Metric, claim.metric)
        sides = [[measure(pair[side], metric, num_warmup_steps=warmup) for pair in pairs] for side in (0, 1)]
        return judge(
            claim,
            *sides,
            num_pairs_planned=planned,
            baseline_statuses=trial.baseline_statuses if trial else [],
            candidate_statuses=trial.candidate_statuses if trial else [],
        )

    @cached_property
    def arms(self) -> dict[tuple[str, str], list[Outcome]]:
        """The complete runs of every arm on every workload, A/A control left out: what is reported side by side."""
        found: dict[tuple[str, str], list[Outcome]] = {}
        for name, planned in TRIALS.items():
            if name == "control_aa" or name in self.errors:
                continue
            trial = self.trial(name)
            for pair in trial.pairs if trial else []:
                for arm, outcome in zip((planned.baseline, planned.candidate), pair, strict=True):
                    if arm.name == UNSLOTH.name and name.endswith("_fastest_legacy"):
                        continue  # the candidate's own trial has its runs
                    found.setdefault((planned.workload, arm.name), []).append(outcome)
        for workload, arm in SINGLES:
            single = self.single(workload, arm)
            if single is not None:
                found.setdefault((workload, arm.name), []).append(single)
        return found
