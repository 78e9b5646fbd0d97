"""Rung 6: are the candidate's adapters worth as much as the baseline's, on documents that neither has seen?

At the workload's own dropout and each stack's own precision. A seed gives both arms the same documents in the same
order and the same first adapter; one neutral evaluator judges both. Equivalence is tested on the paired differences
(Schuirmann 1987) with a margin written down beforehand, over a number of seeds that a pilot of other seeds has fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from forge.training.errors import CheckError, ConfigurationError
from forge.training.files import read_json_object, sha256_json, write_json
from harness.claims import Status
from harness.identity import identify
from harness.parity.agenda import FIRST_TEST_SEED, MOST_SEEDS, PILOT_SEEDS
from harness.parity.evaluated import Arm, compare_documents, hold_facts, nats_per_token, read_arm
from harness.parity.same_run import check_same_run
from harness.parity.verdicts import Rung, not_completed
from harness.stats import Equivalence, tost, tost_pairs_needed
from harness.store import Outcome, RunSpec

if TYPE_CHECKING:
    from harness.parity.ladder import Ladder

POWER = 0.9
ALPHA = 0.05
PILOT_CONFIDENCE = 0.8  # of the upper limit that the spread of so few pilot seeds is given (Browne 1995)


@dataclass(frozen=True)
class SeedPlan:
    """What a pilot fixes. ``sd``: of the paired differences; ``sd_upper``: its upper confidence limit.

    ``num_seeds`` is ``None`` where the spread leaves no affordable number.
    """

    sd: float
    sd_upper: float
    num_seeds: int | None


def plan_seeds(differences: Sequence[float], margin: float, *, least: int, most: int) -> SeedPlan:
    """How many seeds the test takes, from a pilot's paired differences (nats a token; at least two).

    Aimed at :data:`POWER` where there is no difference, if the spread is at its upper limit: with the pilot's own
    spread as it is, the test would have that power in only about half of all cases.
    """
    from scipy.special import chdtri

    degrees = len(differences) - 1
    if degrees < 1:
        raise ValueError("one seed shows no spread")
    mean = math.fsum(differences) / len(differences)
    sd = math.sqrt(math.fsum((difference - mean) ** 2 for difference in differences) / degrees)
    upper = sd * math.sqrt(degrees / float(chdtri(degrees, PILOT_CONFIDENCE)))
    needed = max(least, tost_pairs_needed(upper, margin, POWER, ALPHA) or most + 1) if upper > 0 else least
    return SeedPlan(sd, upper, needed if needed <= most else None)


def judge_differences(differences: Sequence[float], margin: float) -> tuple[Status, str, Equivalence]:
    """PASS: equivalent; FAIL: the interval lies beyond the margin; else INCONCLUSIVE.

    ``differences``: candidate less baseline by seed, nats a token.
    """
    found = tost(differences, margin, ALPHA)
    ends = (
        f"the {1 - 2 * ALPHA:.0%} interval {found.low:+.5f} to {found.high:+.5f} nats a token, {len(differences)} seeds"
    )
    if found.is_equivalent:
        return "PASS", f"{ends}, lies within +-{margin:g}", found
    if found.low >= margin or found.high <= -margin:
        side = "worse" if found.low > 0 else "better"
        return "FAIL", f"{ends}, lies beyond +-{margin:g}: the candidate's adapters are {side}", found
    return "INCONCLUSIVE", f"{ends}, reaches beyond +-{margin:g}", found


# --------------------------------------------------------------------------------------------------------------------


def judge_outcome(ladder: Ladder) -> Rung:
    """Rung 6, pilot first."""
    margin = ladder.gate.equivalence_margin_nats
    pilot = _pairs(ladder, PILOT_SEEDS)
    if isinstance(pilot, Rung):
        return pilot
    plan = plan_seeds(_differences(pilot), margin, least=ladder.gate.min_seeds, most=MOST_SEEDS)
    planned = {"margin_nats": margin, "pilot_seeds": list(PILOT_SEEDS), **asdict(plan)}
    run_ids = [outcome.run_id for pair in pilot for outcome in pair]
    if plan.num_seeds is None:
        reason = f"paired differences spread by {plan.sd:.4f} nats (at most {plan.sd_upper:.4f}), and more than"
        reason += f" {MOST_SEEDS} seeds would be needed for a margin of {margin:g}: the workload is too noisy"
        return Rung(number=6, status="INCONCLUSIVE", reason=reason, figures={"plan": planned}, run_ids=run_ids)
    seeds = tuple(range(FIRST_TEST_SEED, FIRST_TEST_SEED + plan.num_seeds))
    _fix(ladder, {**planned, "seeds": list(seeds), "pilot_run_ids": run_ids})
    pairs = _pairs(ladder, seeds)
    if isinstance(pairs, Rung):
        return pairs.model_copy(update={"figures": {"plan": planned}})
    return judge_pairs(pairs, seeds, margin, planned)


def judge_pairs(
    pairs: Sequence[tuple[Outcome, Outcome]], seeds: Sequence[int], margin: float, planned: dict[str, Any]
) -> Rung:
    """The verdict on complete pairs (baseline, candidate), one a seed. Raises :class:`CheckError` for other work."""
    arms = [[read_arm(pair[side]) for pair in pairs] for side in (0, 1)]
    for baseline, candidate in zip(*arms, strict=True):
        _check_same_judging(baseline, candidate)
    differences = [b.adapter - a.adapter for a, b in zip(*arms, strict=True)]
    status, reason, found = judge_differences(differences, margin)
    gains = [tost([arm.adapter - arm.base for arm in side], margin, ALPHA) for side in arms]
    figures: dict[str, Any] = {
        "plan": planned,
        "equivalence": asdict(found),
        "seeds": [
            {
                "seed": seed,
                "baseline": a.adapter,
                "candidate": b.adapter,
                "base": a.base,
                "difference": b.adapter - a.adapter,
            }
            for seed, a, b in zip(seeds, *arms, strict=True)
        ],
        "gain_over_base": {name: asdict(gain) for name, gain in zip(("baseline", "candidate"), gains, strict=True)},
        "documents": compare_documents(*arms),
        "rouge_l": {
            "base": _mean([arm.rouge_l_base for arm in arms[0]]),
            "baseline": _mean([arm.rouge_l for arm in arms[0]]),
            "candidate": _mean([arm.rouge_l for arm in arms[1]]),
        },
        "facts": [[arm.num_facts_found for arm in side] for side in arms],
        "num_facts": arms[0][0].num_facts,
    }
    weaker = [
        (name, gain) for name, gain in zip(("baseline", "candidate"), gains, strict=True) if not gain.high < -margin
    ]
    for name, gain in weaker:
        # a test of equality between two arms that learnt nothing proves nothing
        reason += f"; the {name}'s gain over the base, {gain.mean:+.4f}, is not clearly more than {margin:g}"
        status = _worse(status, "FAIL" if name == "candidate" and len(weaker) == 1 else "INCONCLUSIVE")
    fact_status, told = hold_facts(*arms)
    run_ids = [outcome.run_id for pair in pairs for outcome in pair]
    return Rung(
        number=6, status=_worse(status, fact_status), reason=f"{reason}; {told}", figures=figures, run_ids=run_ids
    )


def _worse(a: Status, b: Status) -> Status:
    order: tuple[Status, ...] = ("PASS", "INCOMPLETE", "INCONCLUSIVE", "FAIL")
    return max(a, b, key=order.index)


def pair_specs(ladder: Ladder, seeds: Sequence[int]) -> list[list[RunSpec]]:
    """The baseline's run and the candidate's at each seed."""
    arms = (ladder.baseline, ladder.candidate)
    return [[ladder.spec(backend, seed, evaluate=True) for backend in arms] for seed in seeds]


def _pairs(ladder: Ladder, seeds: Sequence[int]) -> list[tuple[Outcome, Outcome]] | Rung:
    """Both arms' runs at each seed, or the verdict that ends it."""
    pairs: list[tuple[Outcome, Outcome]] = []
    specs = pair_specs(ladder, seeds)
    ladder.prefetch([spec for pair in specs for spec in pair])
    for both in specs:
        outcomes = ladder.outcomes(both)
        if outcomes and outcomes[-1].status != "completed":
            role = "baseline" if len(outcomes) == 1 else "candidate"
            return not_completed(6, outcomes[-1], role, [outcome.run_id for outcome in outcomes])
        if len(outcomes) < 2:
            reason = f"{len(pairs)} of {len(seeds)} seeds measured ({seeds[0]} to {seeds[-1]})"
            return Rung(number=6, status="INCOMPLETE", reason=reason)
        check_same_run(outcomes[0], outcomes[1])
        pairs.append((outcomes[0], outcomes[1]))
    return pairs


def _differences(pairs: Sequence[tuple[Outcome, Outcome]]) -> list[float]:
    return [nats_per_token(candidate, "adapter") - nats_per_token(baseline, "adapter") for baseline, candidate in pairs]


def _check_same_judging(a: Arm, b: Arm) -> None:
    if a.judged_by != b.judged_by:
        raise CheckError(f"the two adapters were not judged alike: {a.judged_by} | {b.judged_by}")


def _fix(ladder: Ladder, plan: dict[str, Any]) -> None:
    """Write the plan of the test before its first run; a plan that is there already must be this one."""
    keys = [identify(spec).key for pair in pair_specs(ladder, PILOT_SEEDS) for spec in pair]
    path = ladder.store.directory / "parity" / f"outcome-{sha256_json(keys)[:12]}.json"
    content = {"schema_version": 1, "pilot_keys": keys, **plan}
    if not path.is_file():
        if ladder.measures:
            write_json(path, content)
        return
    stored = read_json_object(path)
    if stored != content:
        changed = ", ".join(name for name in content if stored.get(name) != content[name])
        raise ConfigurationError(
            f"the test of rung 6 was planned otherwise before it began: {changed} changed",
            remedy=f"what is fixed by a pilot stays fixed; to plan anew, with other pilot seeds, put away {path}",
        )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
