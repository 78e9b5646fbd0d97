"""What the probe ``divergence`` answers, judged. Pure functions: an answer and bars in.

``confidence``: of the two-sided interval over documents. ``figures``: parts of the answer, and the bar.
"""

from __future__ import annotations

from harness.export.answers import DivergenceAnswer, Pair, Step
from harness.stats import t_quantile
from harness.verdict import Judged, Status, by_faults


def judge_merged_against_adapter(
    answer: DivergenceAnswer, *, mean_kl_nats: float, loss_margin_nats: float, least_effect: float, confidence: float
) -> Judged:
    """KL to the adapter below ``mean_kl_nats``, and the loss within ``loss_margin_nats``.

    ``least_effect``: the KL between adapter and base must be so many times that, or there was nothing to lose. The
    shift from a 4-bit base is in the figures, and not judged.
    """
    pair, step = _pair(answer, "adapter", "merged"), _step(answer, "merged")
    effect = _pair(answer, "adapter", "base")["mean_kl_nats"]
    four_bit = answer["four_bit"]
    status, reason = _below(pair, mean_kl_nats, answer, confidence)
    change = step["change_nats_per_token"] or 0.0
    half_width = _half_width(step["standard_error_nats_per_token"], answer, confidence)
    if status == "PASS" and (half_width is None or abs(change) + half_width >= loss_margin_nats):
        status, reason = "FAIL", f"the loss moves by {change:+.2e} nats per token"
    if status == "PASS" and pair["mean_kl_nats"] * least_effect > effect:
        status, reason = "INCONCLUSIVE", f"the adapter itself moves the base by only {effect:.2e} nats: nothing to lose"
    if status == "PASS" and four_bit is not None and "why" in four_bit:
        status, reason = "INCOMPLETE", f"the shift from the 4-bit base is not known: {four_bit['why']}"
    figures = {"pair": pair, "step": step, "adapter_effect_kl_nats": effect, "four_bit": four_bit, "bar": mean_kl_nats}
    return status, reason, figures


def judge_file(answer: DivergenceAnswer, *, kind: str, mean_kl_nats: float, confidence: float) -> Judged:
    """A GGUF file of type ``kind``: KL to the merged weights below ``mean_kl_nats``, and every tensor of that type."""
    if kind not in answer["files"]:
        return "INCOMPLETE", f"there is no {kind} file", {}
    report, pair = answer["files"][kind], _pair(answer, "merged", kind)
    figures = {"pair": pair, "step": _step(answer, kind), "file": report, "bar": mean_kl_nats}
    if report["fallbacks"]:
        reason = f"{len(report['fallbacks'])} tensors are of another type, {report['fallbacks'][0]} for one"
        return "FAIL", reason, figures
    return *_below(pair, mean_kl_nats, answer, confidence), figures


def judge_chain(answer: DivergenceAnswer, *, confidence: float) -> Judged:
    """Held-out loss from base to the smallest file. Judged is that the adapter lowered it."""
    step = _step(answer, "adapter")
    half_width = _half_width(step["standard_error_nats_per_token"], answer, confidence)
    reason = " -> ".join(f"{row['subject']} {row['nats_per_token']:.4f}" for row in answer["chain"])
    status: Status = "FAIL"
    if half_width is None:
        status, reason = "INCONCLUSIVE", "one document has no spread"
    elif (step["change_nats_per_token"] or 0.0) + half_width < 0:
        status = "PASS"
    return status, reason, {name: answer[name] for name in ("chain", "held_out", "base", "four_bit")}


def judge_greedy(answer: DivergenceAnswer) -> Judged:
    """Greedy text of the first file, which is to be f16, against the merged weights'."""
    greedy = answer["greedy"]
    texts = greedy["answers"]
    faults = [] if greedy["subject"] == "f16" else [f"compared was {greedy['subject']}"]
    faults += [] if texts and all(text["num_tokens"] for text in texts) else ["an answer is empty, or there is none"]
    faults += [
        f"parts at token {text['parts_at']}, where the merged weights' choice leads by {text['lead_nats']:.2e} nats"
        for text in texts
        if not text["is_equal"]
    ]
    return *by_faults(faults, f"{len(texts)} answers of up to {greedy['num_tokens']} tokens"), {"greedy": greedy}


def judge_lora_route(
    answer: DivergenceAnswer, *, to_adapter_kl_nats: float, to_merged_kl_nats: float, confidence: float
) -> Judged:
    """Base and adapter as GGUF files of their own: KL to the adapter in float32 and to the merged weights."""
    if not any(row["subject"] == "base and LoRA" for row in answer["pairs"]):
        return "INCOMPLETE", "not measured: --controls", {}
    to_adapter, to_merged = _pair(answer, "adapter", "base and LoRA"), _pair(answer, "merged", "base and LoRA")
    bars = ((to_adapter, to_adapter_kl_nats), (to_merged, to_merged_kl_nats))
    results = [_below(pair, bar, answer, confidence) for pair, bar in bars]
    status, reason = next((result for result in results if result[0] != "PASS"), results[0])
    return status, reason, {"to_adapter": to_adapter, "to_merged": to_merged}


def _below(pair: Pair, bar: float, answer: DivergenceAnswer, confidence: float) -> tuple[Status, str]:
    """Whether a mean KL lies below its bar with its whole two-sided interval over documents."""
    mean, half_width = pair["mean_kl_nats"], _half_width(pair["standard_error_nats"], answer, confidence)
    if mean >= bar:
        return "FAIL", f"mean KL {mean:.2e} nats, the bar is {bar:g}"
    if half_width is None:
        return "INCONCLUSIVE", f"mean KL {mean:.2e} nats of one document: no spread"
    spread = f"standard error {pair['standard_error_nats']:.1e}, {confidence:.0%} below {mean + half_width:.2e}"
    status: Status = "PASS" if mean + half_width < bar else "INCONCLUSIVE"
    return status, f"mean KL {mean:.2e} nats, {spread}; the bar is {bar:g}"


def _half_width(standard_error: float | None, answer: DivergenceAnswer, confidence: float) -> float | None:
    """Of the two-sided interval over the documents, by Student's t."""
    if standard_error is None:
        return None
    return t_quantile((1 + confidence) / 2, max(1, answer["held_out"]["num_documents"] - 1)) * standard_error


def _pair(answer: DivergenceAnswer, reference: str, subject: str) -> Pair:
    return next(row for row in answer["pairs"] if (row["reference"], row["subject"]) == (reference, subject))


def _step(answer: DivergenceAnswer, subject: str) -> Step:
    return next(row for row in answer["chain"] if row["subject"] == subject)
