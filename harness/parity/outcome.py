"""Rung 6: are the candidate's adapters as good as the baseline's, on documents that neither has seen?

At the workload's own dropout. A seed gives all runs the same documents in the same order and the same first adapter;
one neutral evaluator judges them. Two questions on the paired differences, with one margin (claims.py), over a number
of seeds that a pilot of other seeds has fixed:

- Equivalence (Schuirmann 1987) with the baseline whose adapter is kept in float32, as the candidate's is: the same
  training but for the backend. TRL keeps a 4-bit base's adapter in bfloat16 and so loses small updates. That is a
  property of TRL; it would mask or mimic a difference between the backends.
- Not worse than the stock baseline, with the precision that its backend chose.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from forge.training.system.errors import CheckError, ConfigurationError
from forge.training.system.files import read_json_object, sha256_json, write_json
from harness.measurement.key import identify
from harness.measurement.results import Outcome, RunSpec
from harness.parity.claims import ALPHA, LEAST_SEEDS, MARGIN_NATS, MOST_SEEDS, PILOT_CONFIDENCE, POWER, verdict_on
from harness.parity.session import Ladder, check_same_run
from harness.parity.suite import FIRST_TEST_SEED, PILOT_SEEDS
from harness.stats import Equivalence, tost, tost_pairs_needed
from harness.verdict import Role as VerdictRole
from harness.verdict import Status, Verdict, status_of_run, why_not_completed, worst

# "stock": the baseline's backend as it is, adapter in the precision that it chooses; "baseline": the same, in float32
Role = Literal["baseline", "candidate", "stock"]
PAIRED: tuple[Role, ...] = ("baseline", "candidate")
ROLES: tuple[Role, ...] = (*PAIRED, "stock")


@dataclass(frozen=True)
class SeedPlan:
    """What a pilot fixes. ``sd``: of the paired differences; ``sd_upper``: its upper confidence limit.

    ``num_seeds`` is ``None`` where the spread leaves no affordable number.
    """

    sd: float
    sd_upper: float
    num_seeds: int | None


def plan_seeds(differences: Sequence[float]) -> SeedPlan:
    """How many seeds the test takes, from a pilot's paired differences (nats per token; at least two).

    Enough for the power in claims.py where there is no difference, if the spread is at its upper limit: with the
    pilot's own spread, the test would have that power in only about half of all cases.
    """
    from scipy.special import chdtri

    degrees = len(differences) - 1
    if degrees < 1:
        raise ValueError("one seed shows no spread")
    sd = statistics.stdev(differences)
    upper = sd * math.sqrt(degrees / float(chdtri(degrees, PILOT_CONFIDENCE)))
    needed = LEAST_SEEDS
    if upper > 0:
        needed = max(LEAST_SEEDS, tost_pairs_needed(upper, MARGIN_NATS, POWER, ALPHA) or MOST_SEEDS + 1)
    return SeedPlan(sd, upper, needed if needed <= MOST_SEEDS else None)


def judge_differences(differences: Sequence[float]) -> tuple[Status, str, Equivalence]:
    """PASS: equivalent; FAIL: the whole interval is beyond the margin; else INCONCLUSIVE.

    ``differences``: candidate less baseline by seed, nats per token.
    """
    test, margin = tost(differences, MARGIN_NATS, ALPHA), f"+-{MARGIN_NATS:g}"
    ends = f"{test.low:+.5f} to {test.high:+.5f} nats per token, {len(differences)} seeds"
    interval = f"the {1 - 2 * ALPHA:.0%} interval {ends},"
    if test.is_equivalent:
        return "PASS", f"{interval} lies within {margin}", test
    if test.low >= MARGIN_NATS or test.high <= -MARGIN_NATS:
        side = "worse" if test.low > 0 else "better"
        return "FAIL", f"{interval} lies beyond {margin}: the candidate's adapters are {side}", test
    return "INCONCLUSIVE", f"{interval} reaches beyond {margin}", test


def judge_no_worse(differences: Sequence[float]) -> tuple[Status, str, Equivalence]:
    """PASS: worse by less than the margin, if at all; FAIL: worse by more; else INCONCLUSIVE. One-sided, at ALPHA.

    ``differences``: candidate less baseline by seed, nats per token.
    """
    test = tost(differences, MARGIN_NATS, ALPHA)
    if test.high < MARGIN_NATS:
        return "PASS", f"against the stock baseline {test.mean:+.5f}, at most {test.high:+.5f}", test
    side = "worse" if test.low >= MARGIN_NATS else "perhaps worse"
    reason = f"{side} than the stock baseline's, {test.low:+.5f} to {test.high:+.5f}"
    return "FAIL" if test.low >= MARGIN_NATS else "INCONCLUSIVE", reason, test


# --------------------------------------------------------------------------------------------------------------------


def judge_outcome(ladder: Ladder) -> Verdict:
    """Rung 6, pilot first."""
    pilot = _measured(ladder, PILOT_SEEDS, PAIRED)
    if isinstance(pilot, Verdict):
        return pilot
    plan = plan_seeds(_differences(pilot, "baseline"))
    planned = {"margin_nats": MARGIN_NATS, "pilot_seeds": list(PILOT_SEEDS), **asdict(plan)}
    run_ids = [outcome.run_id for runs in pilot for outcome in runs.values()]
    if plan.num_seeds is None:
        reason = f"paired differences spread by {plan.sd:.4f} nats (at most {plan.sd_upper:.4f}), and more than"
        reason += f" {MOST_SEEDS} seeds would be needed for a margin of {MARGIN_NATS:g}: the workload is too noisy"
        return verdict_on(6, "INCONCLUSIVE", reason, {"plan": planned}, run_ids)
    seeds = tuple(range(FIRST_TEST_SEED, FIRST_TEST_SEED + plan.num_seeds))
    _fix(ladder, {**planned, "seeds": list(seeds), "pilot_run_ids": run_ids})
    runs = _measured(ladder, seeds, ROLES)
    if isinstance(runs, Verdict):
        return runs.model_copy(update={"figures": {**runs.figures, "plan": planned}})
    return judge_runs(runs, seeds, planned)


def judge_runs(runs: Sequence[Mapping[Role, Outcome]], seeds: Sequence[int], planned: dict[str, Any]) -> Verdict:
    """The verdict on complete runs, one of each role per seed. Raises :class:`CheckError` for other work."""
    arms = {role: [read_evaluation(by_role[role]) for by_role in runs] for role in ROLES}
    baseline, candidate, stock = (arms[role] for role in ROLES)
    for of_seed in zip(baseline, candidate, stock, strict=True):
        if others := [run.judged_by for run in of_seed if run.judged_by != of_seed[0].judged_by]:
            raise CheckError(f"two adapters were not judged alike: {of_seed[0].judged_by} | {others[0]}")
    for by_role in runs:
        kept = [adapter_dtype(by_role[role]) for role in PAIRED]
        if kept[0] != kept[1]:
            run_id = by_role["baseline"].run_id
            raise CheckError(f"the adapters were not kept in one precision: {run_id} {kept[0]} | {kept[1]}")
    differences, to_stock = _differences(runs, "baseline"), _differences(runs, "stock")
    status, reason, equivalence = judge_differences(differences)
    stock_status, stock_reason, no_worse = judge_no_worse(to_stock)
    statuses, reasons = [status, stock_status], [reason, stock_reason]
    gains = {role: tost([run.adapter - run.base for run in arms[role]], MARGIN_NATS, ALPHA) for role in ROLES}
    weaker = [role for role in PAIRED if not gains[role].high < -MARGIN_NATS]
    for role in weaker:
        # a test of equality between two arms that learnt nothing proves nothing
        mean = f"{gains[role].mean:+.4f}"
        reasons.append(f"the {role}'s gain over the base, {mean}, is not clearly more than {MARGIN_NATS:g}")
        statuses.append("FAIL" if weaker == ["candidate"] else "INCONCLUSIVE")
    fact_status, fact_reason = judge_facts(baseline, candidate)
    figures: dict[str, Any] = {
        "plan": planned,
        "equivalence": asdict(equivalence),
        "no_worse_than_stock": asdict(no_worse),
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
            "base": _mean([run.rouge_l_base for run in baseline]),
            **{role: _mean([run.rouge_l for run in arms[role]]) for role in ROLES},
        },
        "facts": {role: [run.num_facts_found for run in arms[role]] for role in ROLES},
        "num_facts": baseline[0].num_facts,
    }
    run_ids = [outcome.run_id for by_role in runs for outcome in by_role.values()]
    return verdict_on(6, worst([*statuses, fact_status]), "; ".join([*reasons, fact_reason]), figures, run_ids)


def seed_specs(ladder: Ladder, seed: int, roles: Sequence[Role]) -> dict[Role, RunSpec]:
    """The runs of one seed."""
    backends = {"baseline": ladder.baseline, "candidate": ladder.candidate, "stock": ladder.baseline}
    plans = {"candidate": ladder.plan}
    return {
        role: ladder.spec(
            backends[role], seed, plan=plans.get(role, ()), evaluate=True, float32_adapter=role == "baseline"
        )
        for role in roles
    }


def pilot_specs(ladder: Ladder) -> list[RunSpec]:
    """Every run of the pilot."""
    return [spec for seed in PILOT_SEEDS for spec in seed_specs(ladder, seed, PAIRED).values()]


def _measured(ladder: Ladder, seeds: Sequence[int], roles: Sequence[Role]) -> list[dict[Role, Outcome]] | Verdict:
    """The roles' runs at each seed, or the verdict that ends it."""
    runs: list[dict[Role, Outcome]] = []
    specs = [seed_specs(ladder, seed, roles) for seed in seeds]
    ladder.prefetch([spec for of_seed in specs for spec in of_seed.values()])
    for of_seed in specs:
        outcomes = ladder.outcomes(list(of_seed.values()))
        if outcomes:
            role: VerdictRole = "candidate" if roles[len(outcomes) - 1] == "candidate" else "baseline"
            if status := status_of_run(outcomes[-1].status, role):
                run_ids = [outcome.run_id for outcome in outcomes]
                return verdict_on(6, status, why_not_completed(outcomes[-1], role), run_ids=run_ids)
        if len(outcomes) < len(roles):
            reason = f"{len(runs)} of {len(seeds)} seeds measured ({seeds[0]} to {seeds[-1]})"
            return verdict_on(6, "INCOMPLETE", f"{reason}: {ladder.session.why_missing()}")
        for other in outcomes[1:]:
            check_same_run(outcomes[0], other)
        runs.append(dict(zip(roles, outcomes, strict=True)))
    return runs


def adapter_dtype(outcome: Outcome) -> str:
    """What the trained matrices of a run were kept in."""
    return str(((outcome.record or {}).get("trainable") or {}).get("dtype"))


def _differences(runs: Sequence[Mapping[Role, Outcome]], reference: Role) -> list[float]:
    """Held-out loss of the candidate less the reference's by seed, nats per token."""
    return [
        nats_per_token(by_role["candidate"], "adapter") - nats_per_token(by_role[reference], "adapter")
        for by_role in runs
    ]


def _fix(ladder: Ladder, plan: dict[str, Any]) -> None:
    """Write the plan of the test before its first run. A plan that was written before must be this one.

    Raises :class:`ConfigurationError`.
    """
    keys = [identify(spec).key for spec in pilot_specs(ladder)]
    path = ladder.session.store.judged_path("parity", f"outcome-{sha256_json(keys)[:12]}")
    content = {"schema_version": 1, "pilot_keys": keys, **plan}
    if not path.is_file():
        if ladder.session.measures:
            write_json(path, content)
        return
    stored = read_json_object(path)
    if stored != content:
        changed = ", ".join(name for name in content if stored.get(name) != content[name])
        raise ConfigurationError(
            f"the test of rung 6 has another plan than before it began: {changed} changed",
            remedy=f"what is fixed by a pilot stays fixed; to plan anew, with other pilot seeds, put away {path}",
        )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# --------------------------------------------------------------------------------------------------------------------
# What a run's evaluation says: losses by document, ROUGE, facts


@dataclass(frozen=True)
class AdapterEvaluation:
    """One run's adapter, and its base, on the held-out documents; losses in nats per token, over all of them.

    ``documents``: (name, tokens, nats of the adapter, nats of the base). ``judged_by``: what must be equal for two
    evaluations to be compared.
    """

    adapter: float
    base: float
    documents: tuple[tuple[str, int, float, float], ...]
    rouge_l: float | None
    rouge_l_base: float | None
    num_facts: int
    num_facts_found: int
    num_facts_found_by_base: int
    judged_by: dict[str, Any]


def read_evaluation(outcome: Outcome) -> AdapterEvaluation:
    """Raises :class:`CheckError` where a run was not evaluated on held-out documents."""
    evaluation = outcome.evaluation or {}
    subjects = {row["subject"]: row for row in evaluation.get("subjects", [])}
    if not {"base", "adapter"} <= set(subjects) or not evaluation.get("documents"):
        raise CheckError(f"{outcome.spec.label()} [{outcome.run_id}] was not evaluated on held-out documents")
    facts = evaluation["facts"]
    recited = Counter(fact["subject"] for fact in facts if fact["found"])
    return AdapterEvaluation(
        adapter=nats_per_token(outcome, "adapter"),
        base=nats_per_token(outcome, "base"),
        documents=tuple(
            (row["document"], row["num_tokens"], row["nats"]["adapter"], row["nats"]["base"])
            for row in evaluation["documents"]
        ),
        rouge_l=subjects["adapter"]["rouge_l"],
        rouge_l_base=subjects["base"]["rouge_l"],
        num_facts=len({fact["question"] for fact in facts}),
        num_facts_found=recited["adapter"],
        num_facts_found_by_base=recited["base"],
        judged_by={
            **{name: evaluation[name] for name in ("base_sha256", "validation_examples_sha256", "device", "dtype")},
            "packages": (evaluation.get("environment") or {}).get("packages"),
        },
    )


def nats_per_token(outcome: Outcome, subject: str) -> float:
    """Held-out loss of a subject. Raises :class:`CheckError` where there is none."""
    for row in (outcome.evaluation or {}).get("subjects", []):
        if row["subject"] == subject and row["nats_per_token"] is not None:
            return float(row["nats_per_token"])
    raise CheckError(f"{outcome.spec.label()} [{outcome.run_id}] has no held-out loss of the {subject}")


def compare_documents(baseline: Sequence[AdapterEvaluation], candidate: Sequence[AdapterEvaluation]) -> dict[str, Any]:
    """By document the mean over seeds of both arms, nats per token, and the whole with its error over documents.

    The error is that of a ratio with documents as clusters (Cochran 1977, section 6.4): it says how far the answer
    depends on which documents were held out, which the interval over seeds does not.
    """
    rows: list[dict[str, Any]] = []
    for index, (name, num_tokens, _, base) in enumerate(baseline[0].documents):
        means = [statistics.fmean(run.documents[index][2] for run in arm) for arm in (baseline, candidate)]
        nats = {"base": base, "baseline": means[0], "candidate": means[1]}
        per_token = {subject: value / num_tokens for subject, value in nats.items()}
        rows.append({"document": name, "num_tokens": num_tokens, **per_token})
    total = sum(row["num_tokens"] for row in rows)
    changes = [(row["candidate"] - row["baseline"]) * row["num_tokens"] for row in rows]
    mean = math.fsum(changes) / total
    error = None
    if len(rows) > 1:
        squares = math.fsum((c - mean * row["num_tokens"]) ** 2 for c, row in zip(changes, rows, strict=True))
        error = math.sqrt(len(rows) / (len(rows) - 1) * squares) / total
    return {
        "rows": rows,
        "difference_nats_per_token": mean,
        "standard_error_nats_per_token": error,
        "num_documents_better": sum(1 for change in changes if change < 0),
    }


def judge_facts(baseline: Sequence[AdapterEvaluation], candidate: Sequence[AdapterEvaluation]) -> tuple[Status, str]:
    """PASS: every run of both arms recites every planted fact, and the base none."""
    num_facts = baseline[0].num_facts
    if not num_facts:
        return "FAIL", "no fact was asked for"
    num_known = max(run.num_facts_found_by_base for run in (*baseline, *candidate))
    if num_known:
        return "INCONCLUSIVE", f"the base recites {num_known} of {num_facts} planted facts before it is trained"
    num_short = {
        name: sum(run.num_facts_found < num_facts for run in arm)
        for name, arm in (("baseline", baseline), ("candidate", candidate))
    }
    if not any(num_short.values()):
        return "PASS", "every run recites the planted fact and the base does not"
    runs = " and ".join(f"{num} of {len(baseline)} runs of the {name}" for name, num in num_short.items() if num)
    if num_short["candidate"] > num_short["baseline"]:
        return "FAIL", f"the planted fact is not recited by {runs}"
    return "INCONCLUSIVE", f"the planted fact is not recited by {runs}: the workload does not teach it"
