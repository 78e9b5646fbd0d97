"""What the probe ``divergence`` found, judged: the same for a tiny run on a CPU and for the gate's.

Pure functions: the probe's JSON in, a finding out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.export.findings import Finding, by_faults, stated
from harness.export.statements import BARS
from harness.perf.claims import CONFIDENCE, Status

# Merging rounds every changed weight to 16 bits: no more may be lost by it than by the finest quantisation.
MERGE_BAR = BARS["q8_0"]
# What is the same numbers by another route, in float32 but for llama.cpp's float16 products.
ROUTE_BAR = BARS["f16"]
EQUIVALENCE_MARGIN_NATS = 0.01  # of a held-out loss, as for the adapters themselves


def judge_merged_against_adapter(found: Mapping[str, Any]) -> Finding:
    """``found``: what the probe ``divergence`` printed. The shift from a 4-bit base is in the figures, not judged."""
    pair, step = _pair(found, "adapter", "merged"), _step(found, "merged")
    effect = _pair(found, "adapter", "base")["mean_kl_nats"]
    figures = {"pair": pair, "step": step, "adapter_effect_kl_nats": effect, "four_bit": found["four_bit"]}
    figures["bar"] = MERGE_BAR
    status, reason = _below(pair, MERGE_BAR, found)
    change, error = step["change_nats_per_token"], step["standard_error_nats_per_token"]
    if status == "PASS" and (error is None or abs(change) + _quantile(found) * error >= EQUIVALENCE_MARGIN_NATS):
        status, reason = "FAIL", f"the loss moves by {change:+.2e} nats a token"
    if status == "PASS" and pair["mean_kl_nats"] * 100 > effect:
        status, reason = "INCONCLUSIVE", f"the adapter itself moves the base by only {effect:.2e} nats: nothing to lose"
    if status == "PASS" and "why" in (found["four_bit"] or {}):
        status, reason = "INCOMPLETE", f"the shift from the 4-bit base is not known: {found['four_bit']['why']}"
    return stated("merged_against_adapter", status, reason, figures)


def judge_file(found: Mapping[str, Any], kind: str) -> Finding:
    """A GGUF file of type ``kind``: KL to the merged weights below its bar, and really of that type."""
    name = f"divergence_{kind}"
    if kind not in found["files"]:
        return stated(name, "INCOMPLETE", f"there is no {kind} file")
    report, pair = found["files"][kind], _pair(found, "merged", kind)
    figures = {"pair": pair, "step": _step(found, kind), "file": report, "bar": BARS[kind]}
    if report["fallbacks"]:
        others = f"{len(report['fallbacks'])} tensors are of another type, {report['fallbacks'][0]} for one"
        return stated(name, "FAIL", others, figures)
    status, reason = _below(pair, BARS[kind], found)
    return stated(name, status, reason, figures)


def judge_chain(found: Mapping[str, Any]) -> Finding:
    """Held-out loss from base to the smallest file. Judged is that the adapter learned."""
    chain = found["chain"]
    step = _step(found, "adapter")
    error = step["standard_error_nats_per_token"]
    figures = {"chain": chain, "held_out": found["held_out"], "base": found["base"], "four_bit": found["four_bit"]}
    reason = " -> ".join(f"{row['subject']} {row['nats_per_token']:.4f}" for row in chain)
    status: Status = "FAIL"
    if error is None:
        status, reason = "INCONCLUSIVE", "one document has no spread"
    elif step["change_nats_per_token"] + _quantile(found) * error < 0:
        status = "PASS"
    return stated("chain", status, reason, figures)


def judge_greedy(found: Mapping[str, Any]) -> Finding:
    """Greedy text of the first file, f16, against the merged weights'."""
    answers = found["greedy"]["answers"]
    parted = [row for row in answers if not row["is_equal"]]
    subject = found["greedy"]["subject"]
    faults = [] if subject == "f16" else [f"compared was {subject}"]
    faults += [] if answers and all(row["num_tokens"] for row in answers) else ["an answer is empty, or there is none"]
    faults += [
        f"parts at token {row['parts_at']}, where the merged weights' choice leads by {row['lead_nats']:.2e} nats"
        for row in parted
    ]
    good = f"{len(answers)} answers of up to {found['greedy']['num_tokens']} tokens"
    return stated("greedy", *by_faults(faults, good), {"greedy": found["greedy"]})


def judge_lora_route(found: Mapping[str, Any]) -> Finding:
    """Base and adapter as GGUF files of their own, against the adapter in float32 and against the merged weights."""
    names = {(row["reference"], row["subject"]) for row in found["pairs"]}
    if ("adapter", "base and LoRA") not in names:
        return stated("lora_route", "INCOMPLETE", "not measured: --controls")
    exact, merged = _pair(found, "adapter", "base and LoRA"), _pair(found, "merged", "base and LoRA")
    results = [_below(exact, ROUTE_BAR, found), _below(merged, MERGE_BAR, found)]
    status, reason = next((result for result in results if result[0] != "PASS"), results[0])
    figures = {"to_adapter": exact, "to_merged": merged}
    return stated("lora_route", status, reason, figures)


def _below(pair: Mapping[str, Any], bar: float, found: Mapping[str, Any]) -> tuple[Status, str]:
    """Whether a mean KL lies below its bar with its whole two-sided interval over documents."""
    mean, error = pair["mean_kl_nats"], pair["standard_error_nats"]
    if mean >= bar:
        return "FAIL", f"mean KL {mean:.2e} nats, the bar is {bar:g}"
    if error is None:
        return "INCONCLUSIVE", f"mean KL {mean:.2e} nats of one document: no spread"
    high = mean + _quantile(found) * error
    told = f"mean KL {mean:.2e} nats, standard error {error:.1e}, {CONFIDENCE:.0%} below {high:.2e}; the bar is {bar:g}"
    return ("PASS" if high < bar else "INCONCLUSIVE"), told


def _quantile(found: Mapping[str, Any]) -> float:
    """Student's t for a two-sided interval over the documents."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, max(1, found["held_out"]["num_documents"] - 1)))


def _pair(found: Mapping[str, Any], reference: str, subject: str) -> dict[str, Any]:
    return next(row for row in found["pairs"] if (row["reference"], row["subject"]) == (reference, subject))


def _step(found: Mapping[str, Any], subject: str) -> dict[str, Any]:
    return next(row for row in found["chain"] if row["subject"] == subject)
