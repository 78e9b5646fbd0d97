"""Synthetic verdicts for the synthetic gate: every one that parity, export and reliability leave, once, and a PASS.

The figures are plausible and none was measured; those of an export come from the real judges.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.export.claims import CLAIMS, KINDS
from harness.parity.suite import BASELINE, CANDIDATE
from harness.report.verdicts import EXPECTED

Info = tuple[str, str, dict[str, Any]]  # kind, metric, what else the entry holds
_STEP = "step_begin substep_end pre_optimizer_step optimizer_step step_end log"
_SAME = {"identical": True, "largest": 0.0, "relative": 0.0, "largest_loss": 0.0, "first_different_step": None}
_RESUMED = {"difference": _SAME, "resumed_from_step": 10, "num_steps": 40, "same_labels": True}
_SMALL = {"noise": _SAME, "killed": _RESUMED, "stopped": _RESUMED, "events": [_STEP, f"{_STEP} evaluate save"]}
_LARGE = {"stop_seconds": 5.25, "state": "interrupted", "checkpoint_problem": None, "checkpoint_bytes": 162_000_000}
_TIGHT = {
    **{"cap_gib": 8.0, "micro_batch": 2, "resumes": [{"after": "out_of_memory"}], "num_steps": 4},
    **{"num_planned_steps": 4, "documents": [8, 8, 8, 8]},
}
ANSWERS: dict[str, dict[str, Any]] = {"resume": _SMALL, "callbacks": _SMALL, "stop": _LARGE, "memory": _TIGHT}
_EXPORT_STEPS = [{"name": "merge", "seconds": 36.2, "num_bytes": 15 << 30, "peak_rss_bytes": 9 << 30}]


def verdicts() -> Iterator[Info]:
    """All that a whole gate leaves beside claims on speed and memory."""
    exported = {
        claim.name: claim for claim in CLAIMS if claim.name.startswith(("merged_against", "chain", "divergence"))
    }
    arms = {"workload": "parity", "arm": CANDIDATE, "backend": CANDIDATE, "baseline": BASELINE}
    for kind in ("parity", "export", "reliability"):
        for missing in EXPECTED[kind]:
            name, _, backend = missing.name.rpartition("_")
            measured = ANSWERS.get(name, {})
            if kind == "export":
                claim = exported.get(missing.name)
                measured = claim.verdict(_divergence()).figures if claim else {}
            passed = {"status": "PASS", "reason": "synthetic data", "figures": {**missing.figures, **measured}}
            info = {**arms, "backend": backend} if kind == "reliability" else arms
            yield kind, missing.name, {**info, "verdict": missing.model_copy(update=passed).to_dict()}
    yield "export", "export_seconds", {"workload": "legacy_256", "backend": CANDIDATE, "steps": _EXPORT_STEPS}


def _divergence() -> dict[str, Any]:
    """As the probe prints it."""
    losses = {"base": 3.41, "adapter": 2.52, "merged": 2.5201, "f16": 2.5201, "q8_0": 2.5204, "q4_k_m": 2.533}
    divergences = {"f16": 4e-7, "q8_0": 3e-4, "q4_k_m": 0.02}
    pairs = [("adapter", "base", 0.8), ("adapter", "merged", 2e-5), *(("merged", *one) for one in divergences.items())]
    chain: list[dict[str, Any]] = []
    for subject, loss in losses.items():
        change = loss - chain[-1]["nats_per_token"] if chain else None
        row = {"subject": subject, "nats_per_token": loss, "change_nats_per_token": change}
        chain.append({**row, "standard_error_nats_per_token": None if change is None else abs(change) / 20 + 1e-5})
    return {
        "held_out": {"num_documents": 32, "num_tokens": 8192},
        "base": {},
        "four_bit": {
            "nats_per_token": 2.51,
            "shift_nats_per_token": 0.0125,
            "standard_error_nats_per_token": 0.001,
        },
        "files": {kind: {"fallbacks": [], "file_type": kind} for kind in KINDS},
        "pairs": [
            {
                **{"reference": reference, "subject": subject, "mean_kl_nats": mean},
                **{"standard_error_nats": mean / 50, "same_top_share": 0.9871},
            }
            for reference, subject, mean in pairs
        ],
        "chain": chain,
    }
