"""Rung 6: are the candidate's adapters worth as much as the baseline's, on documents that neither has seen?

At the workload's own dropout. A seed gives all runs the same documents in the same order and the same first adapter;
one neutral evaluator judges them. Two questions on the paired differences, with one margin written down beforehand,
over a number of seeds that a pilot of other seeds has fixed:

- Equivalence (Schuirmann 1987) with the baseline whose adapter is kept in float32, as the candidate's is: the same
  training but for the stack. TRL keeps a 4-bit base's adapter in bfloat16, which costs it small updates; that is its
  own, and would hide or feign what the stacks do otherwise.
- Not worse than the stock baseline, with the precision that its stack chose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from forge.training.system.errors import CheckError, ConfigurationError
from forge.training.system.files import read_json_object, sha256_json, write_json
from harness.measurement.key import identify
from harness.measurement.results import Outcome, RunSpec
from harness.parity.claims import Rung, not_completed
from harness.parity.outcome.evaluated import Arm, compare_documents, hold_facts, nats_per_token, read_arm
from harness.parity.same_run import check_same_run
from harness.parity.suite import FIRST_TEST_SEED, MOST_SEEDS, PILOT_SEEDS
from harness.perf.claims import Status
from harness.stats import Equivalence, tost, tost_pairs_needed

if TYPE_CHECKING:
    from harness.parity.session import Ladder

# "stock": the baseline's stack as it is, adapter in the precision that it chooses; "baseline": the same, in float32
Role = Literal["baseline", "candidate", "stock"]
PAIRED: tuple[Role, ...] = ("baseline", "candidate")
ROLES: tuple[Role, ...] = (*PAIRED, "stock")

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


def judge_no_worse(differences: Sequence[float], margin: float) -> tuple[Status, str, Equivalence]:
    """PASS: worse by less than the margin, if at all; FAIL: worse by more; else INCONCLUSIVE. One-sided, at ALPHA.

    ``differences``: candidate less baseline by seed, nats a token.
    """
    found = tost(differences, margin, ALPHA)
    if found.high < margin:
        return "PASS", f"against the stock baseline {found.mean:+.5f}, at most {found.high:+.5f}", found
    side = "worse" if found.low >= margin else "perhaps worse"
    reason = f"{side} than the stock baseline's, {found.low:+.5f} to {found.high:+.5f}"
    return "FAIL" if found.low >= margin else "INCONCLUSIVE", reason, found


# --------------------------------------------------------------------------------------------------------------------


def judge_outcome(ladder: Ladder) -> Rung:
    """Rung 6, pilot first."""
    margin = ladder.gate.equivalence_margin_nats
    pilot = _measured(ladder, PILOT_SEEDS, PAIRED)
    if isinstance(pilot, Rung):
        return pilot
    plan = plan_seeds(_differences(pilot, "baseline"), margin, least=ladder.gate.min_seeds, most=MOST_SEEDS)
    planned = {"margin_nats": margin, "pilot_seeds": list(PILOT_SEEDS), **asdict(plan)}
    run_ids = [outcome.run_id for runs in pilot for outcome in runs.values()]
    if plan.num_seeds is None:
        reason = f"paired differences spread by {plan.sd:.4f} nats (at most {plan.sd_upper:.4f}), and more than"
        reason += f" {MOST_SEEDS} seeds would be needed for a margin of {margin:g}: the workload is too noisy"
        return Rung(number=6, status="INCONCLUSIVE", reason=reason, figures={"plan": planned}, run_ids=run_ids)
    seeds = tuple(range(FIRST_TEST_SEED, FIRST_TEST_SEED + plan.num_seeds))
    _fix(ladder, {**planned, "seeds": list(seeds), "pilot_run_ids": run_ids})
    runs = _measured(ladder, seeds, ROLES)
    if isinstance(runs, Rung):
        return runs.model_copy(update={"figures": {"plan": planned}})
    return judge_runs(runs, seeds, margin, planned)


def judge_runs(
    runs: Sequence[Mapping[Role, Outcome]], seeds: Sequence[int], margin: float, planned: dict[str, Any]
) -> Rung:
    """The verdict on complete runs, one of each role a seed. Raises :class:`CheckError` for other work."""
    arms = {role: [read_arm(by_role[role]) for by_role in runs] for role in ROLES}
    baseline, candidate, stock = (arms[role] for role in ROLES)
    for of_seed in zip(baseline, candidate, stock, strict=True):
        _check_same_judging(*of_seed)
    for by_role in runs:
        _check_same_precision(by_role["baseline"], by_role["candidate"])
    differences, to_stock = _differences(runs, "baseline"), _differences(runs, "stock")
    status, reason, found = judge_differences(differences, margin)
    stock_status, stock_reason, stock_found = judge_no_worse(to_stock, margin)
    status, reason = _worse(status, stock_status), f"{reason}; {stock_reason}"
    gains = {role: tost([arm.adapter - arm.base for arm in arms[role]], margin, ALPHA) for role in ROLES}
    figures: dict[str, Any] = {
        "plan": planned,
        "equivalence": asdict(found),
        "no_worse_than_stock": asdict(stock_found),
        "precision": {role: sorted({adapter_dtype(by_role[role]) for by_role in runs}) for role in ROLES},
        "seeds": [
            {
                "seed": seed,
                **{role: arms[role][index].adapter for role in ROLES},
                "base": baseline[index].base,
                "difference": differences[index],
                "difference_to_stock": to_stock[index],
            }
            for index, seed in enumerate(seeds)
        ],
        "gain_over_base": {role: asdict(gain) for role, gain in gains.items()},
        "documents": compare_documents(baseline, candidate),
        "rouge_l": {
            "base": _mean([arm.rouge_l_base for arm in baseline]),
            **{role: _mean([arm.rouge_l for arm in arms[role]]) for role in ROLES},
        },
        "facts": {role: [arm.num_facts_found for arm in arms[role]] for role in ROLES},
        "num_facts": baseline[0].num_facts,
    }
    weaker = [role for role in PAIRED if not gains[role].high < -margin]
    for role in weaker:
        # a test of equality between two arms that learnt nothing proves nothing
        reason += f"; the {role}'s gain over the base, {gains[role].mean:+.4f}, is not clearly more than {margin:g}"
        status = _worse(status, "FAIL" if weaker == ["candidate"] else "INCONCLUSIVE")
    fact_status, told = hold_facts(baseline, candidate)
    run_ids = [outcome.run_id for by_role in runs for outcome in by_role.values()]
    return Rung(
        number=6, status=_worse(status, fact_status), reason=f"{reason}; {told}", figures=figures, run_ids=run_ids
    )


def _worse(a: Status, b: Status) -> Status:
    order: tuple[Status, ...] = ("PASS", "INCOMPLETE", "INCONCLUSIVE", "FAIL")
    return max(a, b, key=order.index)


def seed_specs(ladder: Ladder, seed: int, roles: Sequence[Role]) -> dict[Role, RunSpec]:
    """The runs of one seed."""
    backends = {"baseline": ladder.baseline, "candidate": ladder.candidate, "stock": ladder.baseline}
    return {
        role: ladder.spec(backends[role], seed, evaluate=True, float32_adapter=role == "baseline") for role in roles
    }


def pilot_specs(ladder: Ladder) -> list[RunSpec]:
    """Every run of the pilot."""
    return [spec for seed in PILOT_SEEDS for spec in seed_specs(ladder, seed, PAIRED).values()]


def _measured(ladder: Ladder, seeds: Sequence[int], roles: Sequence[Role]) -> list[dict[Role, Outcome]] | Rung:
    """The roles' runs at each seed, or the verdict that ends it."""
    found: list[dict[Role, Outcome]] = []
    specs = [seed_specs(ladder, seed, roles) for seed in seeds]
    ladder.prefetch([spec for of_seed in specs for spec in of_seed.values()])
    for of_seed in specs:
        outcomes = ladder.outcomes(list(of_seed.values()))
        if outcomes and outcomes[-1].status != "completed":
            return not_completed(6, outcomes[-1], roles[len(outcomes) - 1], [outcome.run_id for outcome in outcomes])
        if len(outcomes) < len(roles):
            reason = f"{len(found)} of {len(seeds)} seeds measured ({seeds[0]} to {seeds[-1]})"
            return Rung(number=6, status="INCOMPLETE", reason=reason)
        for other in outcomes[1:]:
            check_same_run(outcomes[0], other)
        found.append(dict(zip(roles, outcomes, strict=True)))
    return found


def adapter_dtype(outcome: Outcome) -> str:
    """What the trained matrices of a run were kept in."""
    return str(((outcome.record or {}).get("trainable") or {}).get("dtype"))


def _check_same_precision(baseline: Outcome, candidate: Outcome) -> None:
    kept = [adapter_dtype(outcome) for outcome in (baseline, candidate)]
    if kept[0] != kept[1]:
        raise CheckError(f"the adapters were not kept in one precision: {baseline.run_id} {kept[0]} | {kept[1]}")


def _differences(runs: Sequence[Mapping[Role, Outcome]], reference: Role) -> list[float]:
    """Held-out loss of the candidate less the reference's by seed, nats a token."""
    return [
        nats_per_token(by_role["candidate"], "adapter") - nats_per_token(by_role[reference], "adapter")
        for by_role in runs
    ]


def _check_same_judging(first: Arm, *others: Arm) -> None:
    for other in others:
        if first.judged_by != other.judged_by:
            raise CheckError(f"two adapters were not judged alike: {first.judged_by} | {other.judged_by}")


def _fix(ladder: Ladder, plan: dict[str, Any]) -> None:
    """Write the plan of the test before its first run; a plan that is there already must be this one."""
    keys = [identify(spec).key for spec in pilot_specs(ladder)]
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
