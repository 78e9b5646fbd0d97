"""Taking up a trial where it was left: is it still the same one, and what of an interrupted pair counts."""

from __future__ import annotations

from collections.abc import Callable

from forge.training.system.errors import ConfigurationError
from harness.measurement.gpu_monitor import machine_id
from harness.measurement.key import Identity, explain
from harness.measurement.results import ROLES, Outcome, Role, RunSpec, SetAside, Store, TrialState

Identities = dict[Role, Identity]


def open_trial(
    name: str,
    specs: dict[Role, RunSpec],
    num_pairs: int,
    identities: Identities,
    store: Store,
    announce: Callable[[str], None],
) -> TrialState:
    """The stored trial if it is this one; a new one where there is none or what it measured has changed.

    A trial is put away when the code or the GPU changes, and taken up again when they are as they were: a gate in
    stretches may meet another GPU model in between.

    Raises :class:`ConfigurationError` for another number of pairs or other specs than it began with.
    """
    if num_pairs < 1:
        raise ConfigurationError(f"trial {name} is asked for {num_pairs} pairs", remedy="at least one pair")
    new = TrialState(
        name=name,
        baseline=specs["baseline"].portable(),
        candidate=specs["candidate"].portable(),
        num_pairs=num_pairs,
        baseline_key=identities["baseline"].key,
        candidate_key=identities["candidate"].key,
        baseline_parts=identities["baseline"].parts,
        candidate_parts=identities["candidate"].parts,
    )
    old = store.read_trial(name)
    if old is not None and _holds(old, new, str(store.trial_path(name))):
        return old
    if old is not None:
        announce(f"{name}: put away, because what is measured has changed:")
        for line in _changes(old, new):
            announce(line)
        store.put_away_trial(name)
    for path, state in reversed(store.trials_put_away(name)):
        if _keys(state) == _keys(new) and _holds(state, new, str(path)):
            announce(f"{name}: taken up again with {len(state.pairs)} of {num_pairs} pairs, as it was put away")
            store.take_up_trial(path, state)
            return state
    store.write_trial(new)
    return new


def _holds(old: TrialState, new: TrialState, place: str) -> bool:
    """Whether the stored trial goes on. The number of pairs and the arms are fixed before the first pair."""
    remedy = (
        f"fixed before the first pair, for adding pairs until it passes proves nothing; to start over delete {place}"
    )
    same_specs = (old.baseline, old.candidate) == (new.baseline, new.candidate)
    if not same_specs and all(
        before[part] == now[part]
        for before, now in ((old.baseline_parts, new.baseline_parts), (old.candidate_parts, new.candidate_parts))
        for part in ("code", "gpu")
    ):
        raise ConfigurationError(
            f"trial {old.name} began with other arms:\n" + "\n".join(_changes(old, new)), remedy=remedy
        )
    if _keys(old) != _keys(new):
        return False
    if old.num_pairs != new.num_pairs:
        raise ConfigurationError(
            f"trial {old.name} began with {old.num_pairs} pairs and is now asked for {new.num_pairs}", remedy=remedy
        )
    return True


def _keys(state: TrialState) -> tuple[str, str]:
    return state.baseline_key, state.candidate_key


def _changes(old: TrialState, new: TrialState) -> list[str]:
    lines = explain(old.baseline_parts, new.baseline_parts, "  baseline ")
    return lines + explain(old.candidate_parts, new.candidate_parts, "  candidate ")


def forget_short_timeout(state: TrialState, time_limit_seconds: float, store: Store) -> TrialState:
    """A run that was stopped for its time ends no trial once it may take longer."""
    if state.failure is None:
        return state
    failure = store.read(state.failure)
    if failure.status != "timeout" or time_limit_seconds <= failure.wall_seconds + 1:
        return state
    aside = SetAside(index=0, run_ids=[failure.run_id], reason="stopped at a time limit that was raised since")
    state = state.model_copy(update={"failure": None, "failed_role": None, "set_aside": [*state.set_aside, aside]})
    store.write_trial(state)
    return state


def found_of_open_pair(state: TrialState, identities: Identities, store: Store) -> list[Outcome]:
    """What counts of a pair that was interrupted: nothing, its first run, or both (killed before it was noted).

    A lone first run counts only as the store's newest and from this machine as it is booted now, so that
    its pair's second follows it closely.
    """
    opened, ids = state.open_pair, store.run_ids()
    if opened is None or (opened.after is not None and opened.after not in ids):
        return []
    since = ids[ids.index(opened.after) + 1 :] if opened.after is not None else ids
    if not 1 <= len(since) <= 2 or set(since) & _counted_elsewhere(store):
        return []
    found = [store.read(run_id) for run_id in since]
    wanted = [identities[role].key for role in ROLES[opened.order]]
    machine = machine_id() if len(found) == 1 else found[0].machine
    if all(
        o.key == key and o.machine == machine and o.status != "refused" for o, key in zip(found, wanted, strict=False)
    ):
        return found
    return []


def _counted_elsewhere(store: Store) -> set[str]:
    """Runs that some trial has taken or set aside already."""
    taken: set[str] = set()
    for state in (*store.trials(), *(state for _, state in store.trials_put_away())):
        taken |= {run_id for pair in state.pairs for run_id in (pair.baseline, pair.candidate)}
        taken |= {run_id for aside in state.set_aside for run_id in aside.run_ids}
        taken |= {state.failure} if state.failure else set()
    return taken


def expected_seconds(keys: list[str], identities: Identities, store: Store, unseen: float = 0.0) -> float:
    """What runs of these keys took at most so far; an arm not seen yet as long as the other, else ``unseen``."""
    longest = {
        identity.key: max((outcome.wall_seconds for outcome in store.with_key(identity.key)), default=None)
        for identity in identities.values()
    }
    known = max((seconds for seconds in longest.values() if seconds is not None), default=unseen)
    return sum(known if (seconds := longest[key]) is None else seconds for key in keys)
