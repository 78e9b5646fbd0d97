"""Interleaved pairs of two arms, AB BA AB ..., that can be interrupted anywhere and resumed.

The two runs of a pair follow one another on one machine, so that what drifts slowly (temperature, clocks) meets both.
The number of pairs is fixed before the first. ``run_trial(name, spec, spec, n, store)`` is the A/A control.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from forge.training.system.errors import ConfigurationError, DataError
from harness.measurement.gpu_monitor import DISTURBING_REASONS, MOST_DISTURBED_SHARE
from harness.measurement.key import explain, identify
from harness.measurement.metrics import check_same_work
from harness.measurement.results import ROLES, OpenPair, Outcome, Pair, Role, RunSpec, SetAside, Store, TrialState
from harness.measurement.runner import TIME_LIMIT_SECONDS, run_once

_MOST_SET_ASIDE = 2  # of one pair
_SPARE = 1.1  # something is started only if 1.1 times its expected time is left

Announce = Callable[[str], None]


class Run(Protocol):
    """What :func:`harness.measurement.runner.run_once` is to a trial."""

    def __call__(self, spec: RunSpec, *, store: Store, time_limit_seconds: float, is_alone: bool = True) -> Outcome: ...


@dataclass(frozen=True)
class Trial:
    """``pairs``: (baseline, candidate), both completed, in order. ``failure``: the run that ended the trial.

    ``set_aside``: identifiers of runs that do not count, and why. ``stopped``: why pairs are missing.
    """

    pairs: list[tuple[Outcome, Outcome]]
    set_aside: list[tuple[list[str], str]]
    failure: Outcome | None = None
    failed_role: Role | None = None
    stopped: str | None = None

    def statuses(self, role: Role) -> list[str]:
        """Statuses of an arm's runs that count: those in pairs and one that ended the trial."""
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
    announce: Announce = lambda line: None,
) -> Trial:
    """Measure what is missing of a trial and return it, complete or with the reason in ``stopped``.

    ``deadline``: on :func:`time.monotonic`'s clock; a pair that, by earlier runs, cannot end before it is not started
    (``unseen_seconds``: what a run is taken to need where the store has none of either arm). A run that fails (memory,
    NaN, time, crash) ends the trial for good: further pairs cannot change the verdict. One that was refused (full disk,
    another process on the GPU) ends it until the next call.

    Raises :class:`ConfigurationError` for another ``num_pairs`` or other specs than the trial began with, or where what
    is measured changes in between, :class:`WorkMismatch` where runs differ in their work.
    """
    with store.lock():
        specs: dict[Role, RunSpec] = {"baseline": baseline, "candidate": candidate}
        state = _open_trial(_new_trial(name, baseline, candidate, num_pairs), store, announce)
        state = _forget_short_timeout(state, time_limit_seconds, store)

        def run_role(role: Role) -> Outcome:
            outcome = run(specs[role], store=store, time_limit_seconds=time_limit_seconds)
            if outcome.key != state.keys[role]:
                raise ConfigurationError(
                    f"trial {name}: what is measured changed while it was measured",
                    remedy="run the same again; pairs of the old state are put away and measured anew",
                )
            return outcome

        while len(_pairs(state, store)) < num_pairs and state.failure is None:
            index = len(state.pairs) + 1
            if sum(aside.index == index for aside in state.set_aside) > _MOST_SET_ASIDE:
                times, reason = _MOST_SET_ASIDE + 1, state.set_aside[-1].reason
                return _trial(state, store, f"pair {index} was disturbed {times} times, the last by {reason}")
            finished = _finished_pair(state, store)
            if not finished:
                needed = _expected_seconds(state, store, unseen_seconds)
                if _is_too_late(deadline, needed):
                    why = f"no time left for pair {index}, which takes about {needed:.0f} seconds"
                    return _trial(state, store, why)
                newest = store.run_ids()[-1:]
                opened = OpenPair(index=index, order="AB" if index % 2 else "BA", after=newest[0] if newest else None)
                state = _noted(state, store, open_pair=opened)
            state, refused = _measure_pair(state, finished, run_role, store, announce)
            if refused is not None:
                return _trial(state, store, f"{refused.spec.label()} was refused: {refused.message}")
        return _trial(state, store)


def _is_too_late(deadline: float | None, needed: float) -> bool:
    return deadline is not None and time.monotonic() + needed * _SPARE >= deadline


def _measure_pair(
    state: TrialState, finished: list[Outcome], run_role: Callable[[Role], Outcome], store: Store, announce: Announce
) -> tuple[TrialState, Outcome | None]:
    """Run the open pair, unless it was ``finished`` before, and note what became of it; the run that was refused."""
    assert state.open_pair is not None
    index, order = state.open_pair.index, state.open_pair.order
    run_ids: dict[Role, str] = {}
    for position, role in enumerate(ROLES[order]):
        if finished:
            outcome = finished[position]
        else:
            announce(f"{state.name}: pair {index} of {state.num_pairs}, {getattr(state, role).label()}")
            outcome = run_role(role)
            why = f": {outcome.message}" if outcome.message else ""
            announce(f"  {outcome.status} after {outcome.wall_seconds:.0f} seconds{why}")
        run_ids[role] = outcome.run_id
        disturbance = _disturbance(outcome)
        if disturbance is not None:
            announce(f"  set aside: {disturbance}")
            aside = SetAside(index=index, run_ids=list(run_ids.values()), reason=disturbance)
            return _noted(state, store, open_pair=None, set_aside=[*state.set_aside, aside]), None
        if outcome.status == "refused":
            return state, outcome
        if outcome.status != "completed":
            return _noted(state, store, open_pair=None, failure=outcome.run_id, failed_role=role), None
    pair = Pair(index=index, order=order, baseline=run_ids["baseline"], candidate=run_ids["candidate"])
    return _noted(state, store, open_pair=None, pairs=[*state.pairs, pair]), None


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
    if specs is not None and [identify(spec).key for spec in specs] != [*state.keys.values()]:
        return None
    return _trial(state, store)


# --------------------------------------------------------------------------------------------------------------------
# Resuming a trial: is it still the same one, and what counts of an interrupted pair


def _new_trial(name: str, baseline: RunSpec, candidate: RunSpec, num_pairs: int) -> TrialState:
    if num_pairs < 1:
        raise ConfigurationError(f"trial {name} is asked for {num_pairs} pairs", remedy="at least one pair")
    identities = identify(baseline), identify(candidate)
    return TrialState(
        name=name,
        baseline=baseline.portable(),
        candidate=candidate.portable(),
        num_pairs=num_pairs,
        baseline_key=identities[0].key,
        candidate_key=identities[1].key,
        baseline_parts=identities[0].parts,
        candidate_parts=identities[1].parts,
    )


def _open_trial(new: TrialState, store: Store, announce: Announce) -> TrialState:
    """The stored trial if it is this one; ``new`` where there is none or what it measures has changed.

    A trial is put away when the code or the GPU changes, and taken up again when they are as they were: the sessions of
    one gate may get different GPU models.

    Raises :class:`ConfigurationError` for another number of pairs or other specs than it began with.
    """
    name = new.name
    old = store.read_trial(name)
    if old is not None:
        if _is_same(old, new, str(store.trial_path(name))):
            return old
        announce(f"{name}: put away, because what is measured has changed:")
        for line in _changes(old, new):
            announce(line)
        store.put_away_trial(name)
    for path, state in reversed(store.trials_put_away(name)):
        if state.keys == new.keys and _is_same(state, new, str(path)):
            announce(f"{name}: taken up again with {len(state.pairs)} of {new.num_pairs} pairs, as it was put away")
            store.take_up_trial(path, state)
            return state
    store.write_trial(new)
    return new


def _is_same(old: TrialState, new: TrialState, place: str) -> bool:
    """Whether the stored trial is resumed. The number of pairs and the arms are fixed before the first pair."""
    remedy = f"adding pairs until it passes would prove nothing, so both are fixed; to start over delete {place}"
    parts = ((old.baseline_parts, new.baseline_parts), (old.candidate_parts, new.candidate_parts))
    is_same_machine = all(before[part] == now[part] for before, now in parts for part in ("code", "gpu"))
    if is_same_machine and (old.baseline, old.candidate) != (new.baseline, new.candidate):
        changes = "\n".join(_changes(old, new))
        raise ConfigurationError(f"trial {old.name} began with other arms:\n{changes}", remedy=remedy)
    if old.keys == new.keys and old.num_pairs != new.num_pairs:
        raise ConfigurationError(
            f"trial {old.name} began with {old.num_pairs} pairs and is now asked for {new.num_pairs}", remedy=remedy
        )
    return old.keys == new.keys


def _changes(old: TrialState, new: TrialState) -> list[str]:
    lines = explain(old.baseline_parts, new.baseline_parts, "  baseline ")
    return lines + explain(old.candidate_parts, new.candidate_parts, "  candidate ")


def _forget_short_timeout(state: TrialState, time_limit_seconds: float, store: Store) -> TrialState:
    """A run that was stopped for its time ends no trial once it may take longer."""
    if state.failure is None:
        return state
    failure = store.read(state.failure)
    if failure.status != "timeout" or time_limit_seconds <= failure.wall_seconds + 1:
        return state
    aside = SetAside(index=0, run_ids=[failure.run_id], reason="stopped at a time limit that was raised since")
    return _noted(state, store, failure=None, failed_role=None, set_aside=[*state.set_aside, aside])


def _finished_pair(state: TrialState, store: Store) -> list[Outcome]:
    """Both runs of a pair that were stored before the gate was killed, in their order; else empty.

    A pair of which only the first run is there is measured anew: the two runs of a pair follow one another.
    """
    opened, ids = state.open_pair, store.run_ids()
    if opened is None or (opened.after is not None and opened.after not in ids):
        return []
    since = ids[ids.index(opened.after) + 1 :] if opened.after is not None else ids
    if len(since) != 2 or set(since) & _counted_elsewhere(store):
        return []
    outcomes = [store.read(run_id) for run_id in since]
    keys = [state.keys[role] for role in ROLES[opened.order]]
    is_pair = [outcome.key for outcome in outcomes] == keys and outcomes[0].machine == outcomes[1].machine
    return outcomes if is_pair and all(outcome.status != "refused" for outcome in outcomes) else []


def _counted_elsewhere(store: Store) -> set[str]:
    """Runs that some trial has taken or set aside already."""
    taken: set[str] = set()
    for state in (*store.trials(), *(state for _, state in store.trials_put_away())):
        taken |= {run_id for pair in state.pairs for run_id in (pair.baseline, pair.candidate)}
        taken |= {run_id for aside in state.set_aside for run_id in aside.run_ids}
        taken |= {state.failure} if state.failure else set()
    return taken


def _expected_seconds(state: TrialState, store: Store, unseen: float) -> float:
    """What a pair takes: each arm's longest run so far; one without a run takes as long as the other, or ``unseen``."""
    longest = [
        max((outcome.wall_seconds for outcome in store.with_key(key)), default=None) for key in state.keys.values()
    ]
    known = max((seconds for seconds in longest if seconds is not None), default=unseen)
    return sum(known if seconds is None else seconds for seconds in longest)


# --------------------------------------------------------------------------------------------------------------------
# One run beside the trials


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
        stored = [outcome for outcome in store.with_key(identify(spec).key) if outcome.status != "refused"]
        valid = [
            outcome
            for outcome in stored
            if _disturbance(outcome) is None
            and (outcome.status != "timeout" or time_limit_seconds <= outcome.wall_seconds + 1)
        ]
        if valid:
            return valid[-1]
        if _is_too_late(deadline, max((outcome.wall_seconds for outcome in stored), default=unseen_seconds)):
            return None
        announce(spec.label())
        return run(spec, store=store, time_limit_seconds=time_limit_seconds)
