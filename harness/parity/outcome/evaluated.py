"""What a run's evaluation says, as rung 6 needs it: losses by document, ROUGE, facts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forge.training.system.errors import CheckError
from harness.measurement.results import Outcome
from harness.verdict import Status


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
        num_facts_found=sum(fact["found"] for fact in facts if fact["subject"] == "adapter"),
        num_facts_found_by_base=sum(fact["found"] for fact in facts if fact["subject"] == "base"),
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
        means = [math.fsum(run.documents[index][2] for run in arm) / len(arm) for arm in (baseline, candidate)]
        rows.append(
            {"document": name, "num_tokens": num_tokens}
            | {"base": base / num_tokens, "baseline": means[0] / num_tokens, "candidate": means[1] / num_tokens}
        )
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
