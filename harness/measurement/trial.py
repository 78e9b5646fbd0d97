"""Interleaved pairs of two arms, AB BA AB ..., that can be interrupted anywhere and go on.

The two runs of a pair follow one another on one machine, so that what drifts slowly (temperature, clocks)
meets both. The number of pairs is fixed before the first. ``run_trial(name, spec, spec, n, store)`` is the
A/A control.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from forge.training.system.errors import ConfigurationError, DataError, ForgeError
from harness.measurement.gpu_monitor import DISTURBING_REASONS, MOST_DISTURBED_SHARE
from harness.measurement.key import identify
from harness.measurement.metrics import Metric, WorkMismatch, check_same_work, measure
from harness.measurement.results import (
    ROLES,
    OpenPair,
    Order,
    Outcome,
    Pair,
    Role,
    RunSpec,
    SetAside,
    Store,
    TrialState,
)
from harness.measurement.resume import (
    Identities,
    expected_seconds,
    forget_short_timeout,
    found_of_open_pair,
    open_trial,
)
from harness.measurement.runner import TIME_LIMIT_SECONDS, run_once

__all__ = ["Metric", "Trial", "WorkMismatch"]
__all__ += ["check_same_work", "measure", "read_trial", "run_single", "run_trial"]

_MOST_SET_ASIDE = 2  # of one pair
_SPARE = 1.1  # times a pair's expected seconds must be left before the deadline

Announce = Callable[[str], None]


class Run(Protocol):
    """What :func:`harness.measurement.runner.run_once` is to a trial."""

    def __call__(self, spec: RunSpec, *, store: Store, time_limit_seconds: float, is_alone: bool = True) -> Outcome: ...


@dataclass(frozen=True)
class Trial:
    """``pairs``: (baseline, candidate), both completed, in order. ``failure``: the run that ended the trial.

    ``set_aside``: identifiers of runs that do not count, and why. ``stopped``: why pairs are missing.
    """

    name: str
    baseline: RunSpec
    candidate: RunSpec
    num_pairs_planned: int
    pairs: list[tuple[Outcome, Outcome]]
    set_aside: list[tuple[list[str], str]]
    failure: Outcome | None = None
    failed_role: Role | None = None
    stopped: str | None = None
    is_halved: bool = False  # the first run of the next pair is there and waits for its second

    @property
    def is_complete(self) -> bool:
        """Whether every planned pair was measured."""
        return len(self.pairs) == self.num_pairs_planned

    @property
    def baseline_statuses(self) -> list[str]:
        """Statuses of the baseline's runs that count: those in pairs and one that ended the trial."""
        return self._statuses("baseline")

    @property
    def candidate_statuses(self) -> list[str]:
        """Statuses of the candidate's runs that count."""
        return self._statuses("candidate")

    def _statuses(self, role: Role) -> list[str]:
        failed = [self.failure.status] if self.failure is not None and self.failed_role == role else []
        return ["completed"] * len(self.pairs) + failed


def run_trial(
    name: str,
    baseline: RunSpec,
    candidate: RunSpec,
    num_pairs: int,
    store: Store,
    *,
    deadline: float | None = None,
    run: Run = run_once,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
    unseen_seconds: float = 0.0,
    may_halve: bool = False,
    announce: Announce = lambda line: None,
) -> Trial:
    """Measure what is missing of a trial and return it, complete or with the reason in ``stopped``.

    ``deadline``: on :func:`time.monotonic`'s clock; a pair that, by earlier runs, cannot end before it is not
    started (``unseen_seconds``: what a run is taken to need where the store has none of either arm). With
    ``may_halve`` its first run is made all the same where that ends in time: for a session that the next one follows
    at once on this machine, and that measures nothing else. A run that fails (memory, NaN, time, crash) ends the
    trial: further pairs cannot change the verdict.

    Raises :class:`ConfigurationError` for another ``num_pairs`` or other specs than the trial began with,
    :class:`WorkMismatch` where runs differ in their work, and the reason of a run that was refused.
    """
    with store.lock():
        specs: dict[Role, RunSpec] = {"baseline": baseline, "candidate": candidate}
        identities: Identities = {role: identify(spec) for role, spec in specs.items()}
        state = open_trial(name, specs, num_pairs, identities, store, announce)
        state = forget_short_timeout(state, time_limit_seconds, store)

        def run_role(role: Role) -> Outcome:
            outcome = run(specs[role], store=store, time_limit_seconds=time_limit_seconds)
            if outcome.key != identities[role].key:
                raise ConfigurationError(
                    f"trial {name}: what is measured changed since the trial was taken up",
                    remedy="run the same again; pairs of the old state are put away and measured anew",
                )
            return outcome

        while len(_pairs(state, store)) < num_pairs and state.failure is None:
            index = len(state.pairs) + 1
            if sum(aside.index == index for aside in state.set_aside) > _MOST_SET_ASIDE:
                times, reason = _MOST_SET_ASIDE + 1, state.set_aside[-1].reason
                return _trial(state, store, f"pair {index} was disturbed {times} times, the last by {reason}")
            order: Order = "AB" if index % 2 else "BA"
            found = found_of_open_pair(state, identities, store)
            keys = [identities[role].key for role in ROLES[order][len(found) :]]
            needed, first = (expected_seconds(some, identities, store, unseen_seconds) for some in (keys, keys[:1]))
            left = float("inf") if deadline is None else deadline - time.monotonic()
            is_half = may_halve and not found and needed * _SPARE >= left > first * _SPARE
            if keys and needed * _SPARE >= left and not is_half:
                return _trial(state, store, f"no time left for pair {index}, which takes about {needed:.0f} seconds")
            if not found:
                newest = store.run_ids()[-1:]
                opened = OpenPair(index=index, order=order, after=newest[0] if newest else None)
                state = _noted(state, store, open_pair=opened)
            if is_half:
                announce(f"{name}: first half of pair {index} of {num_pairs}, for which the time lasts")
                run_role(ROLES[order][0])
                return replace(
                    _trial(state, store, f"the second half of pair {index} comes first next"), is_halved=True
                )
            state = _measure_pair(state, found, run_role, store, announce)
        return _trial(state, store)


def _measure_pair(
    state: TrialState, found: list[Outcome], run_role: Callable[[Role], Outcome], store: Store, announce: Announce
) -> TrialState:
    """Run what is missing of the open pair and note what became of it."""
    assert state.open_pair is not None
    index, order = state.open_pair.index, state.open_pair.order
    done: dict[Role, str] = {}
    for position, role in enumerate(ROLES[order]):
        if position < len(found):
            outcome = found[position]
        else:
            announce(f"{state.name}: pair {index} of {state.num_pairs}, {getattr(state, role).label()}")
            outcome = run_role(role)
            why = f": {outcome.message}" if outcome.message else ""
            announce(f"  {outcome.status} after {outcome.wall_seconds:.0f} seconds{why}")
        done[role] = outcome.run_id
        disturbance = _disturbance(outcome)
        if disturbance is not None:
            announce(f"  set aside: {disturbance}")
            aside = SetAside(index=index, run_ids=list(done.values()), reason=disturbance)
            return _noted(state, store, open_pair=None, set_aside=[*state.set_aside, aside])
        if outcome.status == "refused":
            refusal = ForgeError(f"{outcome.spec.label()} was refused: {outcome.message}")
            refusal.exit_code = outcome.exit_code if outcome.exit_code in (2, 3, 4, 6, 9) else 4
            raise refusal
        if outcome.status != "completed":
            return _noted(state, store, open_pair=None, failure=outcome.run_id, failed_role=role)
    pair = Pair(index=index, order=order, baseline=done["baseline"], candidate=done["candidate"])
    return _noted(state, store, open_pair=None, pairs=[*state.pairs, pair])


def _noted(state: TrialState, store: Store, **changes: Any) -> TrialState:
    state = state.model_copy(update=changes)
    store.write_trial(state)
    return state


def _disturbance(outcome: Outcome) -> str | None:
    """What from outside makes a run unfit to be compared."""
    if outcome.monitor.num_foreign_processes_max:
        return f"a foreign process on the GPU during {outcome.run_id}"
    throttled = sorted(DISTURBING_REASONS & set(outcome.monitor.throttle_reasons))
    share = outcome.monitor.disturbed_share
    if not throttled or (share is not None and share <= MOST_DISTURBED_SHARE):
        return None
    return f"the GPU slowing down during {outcome.run_id} ({', '.join(throttled)})"


def _pairs(state: TrialState, store: Store) -> list[tuple[Outcome, Outcome]]:
    """The complete pairs, read back; all their runs did the same work."""
    pairs: list[tuple[Outcome, Outcome]] = []
    for pair in state.pairs:
        try:
            baseline, candidate = store.read(pair.baseline), store.read(pair.candidate)
        except DataError as error:
            raise DataError(f"trial {state.name}, pair {pair.index}: {error.message}", remedy=error.remedy) from error
        check_same_work(baseline, candidate)
        if pairs:
            check_same_work(pairs[0][0], baseline)
        pairs.append((baseline, candidate))
    return pairs


def _trial(state: TrialState, store: Store, stopped: str | None = None) -> Trial:
    failure = store.read(state.failure) if state.failure else None
    return Trial(
        name=state.name,
        baseline=state.baseline,
        candidate=state.candidate,
        num_pairs_planned=state.num_pairs,
        pairs=_pairs(state, store),
        set_aside=[(aside.run_ids, aside.reason) for aside in state.set_aside],
        failure=failure,
        failed_role=state.failed_role,
        stopped=stopped if failure is None else f"the {state.failed_role} failed: {failure.status}",
    )


def read_trial(name: str, store: Store, *, specs: tuple[RunSpec, RunSpec] | None = None) -> Trial | None:
    """A stored trial as it stands, measuring nothing; ``None`` if it was never begun.

    With ``specs`` (baseline, candidate), also ``None`` if a run of theirs would now be another measurement: a
    verdict on today's code never rests on yesterday's.
    """
    state = store.read_trial(name)
    if state is None:
        return None
    if specs is not None and [identify(spec).key for spec in specs] != [state.baseline_key, state.candidate_key]:
        return None
    return _trial(state, store)


def run_single(
    spec: RunSpec,
    store: Store,
    *,
    deadline: float | None = None,
    run: Run = run_once,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
    unseen_seconds: float = 0.0,
    announce: Announce = lambda line: None,
) -> Outcome | None:
    """The newest undisturbed outcome of ``spec`` in the store, else a new run; ``None``: no time left for one.

    For what is reported beside the claims. The time needed is that of the spec's longest run so far, else
    ``unseen_seconds``; one that was refused says nothing of it. A run that was stopped for its time counts until it
    may take longer.
    """
    with store.lock():
        stored = store.with_key(identify(spec).key)
        valid = [outcome for outcome in stored if outcome.status != "refused" and _disturbance(outcome) is None]
        valid = [o for o in valid if o.status != "timeout" or time_limit_seconds <= o.wall_seconds + 1]
        if valid:
            return valid[-1]
        needed = max((o.wall_seconds for o in stored if o.status != "refused"), default=unseen_seconds)
        if deadline is not None and time.monotonic() + needed * _SPARE >= deadline:
            return None
        announce(spec.label())
        return run(spec, store=store, time_limit_seconds=time_limit_seconds)
