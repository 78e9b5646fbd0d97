"""Export fidelity: a verdict a claim, the loss from base to the smallest file as one chain, the export at 7B."""

from __future__ import annotations

from typing import Any

from harness.report.charts.bars import Bar, bars
from harness.report.evidence import Entry, Evidence
from harness.report.page.content import Chart, Row, Section, Table
from harness.report.page.numbers import NONE, duration, gib, number, percent
from harness.report.stated import Stated, figures_of, read_stated, verdict_table


def build(evidence: Evidence) -> Section:
    """Raises :class:`DataError` for a verdict that cannot be read."""
    found = read_stated(evidence, "export")
    by_name = {one.name: one for one in found}
    parts: list[Chart | Table] = [verdict_table(found, "What an export must keep", "Claim")]
    if by_name["chain"].figures.get("chain"):
        with figures_of(by_name["chain"].entry):
            parts += _chain(by_name["chain"], by_name)
    for entry in timed_exports(evidence):
        with figures_of(entry.name):
            parts += _timed(entry)
    return Section(
        "export",
        "Export: from the adapter to the files",
        paragraphs=(
            "On held-out text, of a model trained in this gate. Divergences are those of each file's predictions in "
            "llama.cpp from the merged weights' in float32.",
        ),
        parts=tuple(parts),
    )


def timed_exports(evidence: Evidence) -> list[Entry]:
    """The entries of exports that were only timed."""
    return [entry for entry in evidence.of_kind("export") if entry.info.get("metric") == "export_seconds"]


def _chain(stated: Stated, found: dict[str, Stated]) -> list[Chart | Table]:
    steps, held_out = stated.figures["chain"], stated.figures["held_out"]
    items = [Bar(s["subject"], "unsloth", s["nats_per_token"], f"{s['nats_per_token']:.4f}") for s in steps]
    judged = {s["subject"]: found.get(f"divergence_{s['subject']}") for s in steps}
    judged["merged"] = found["merged_against_adapter"]
    rows = tuple(
        Row((s["subject"], f"{s['nats_per_token']:.4f}", _change(s), *_divergence(judged[s["subject"]]))) for s in steps
    )
    size = f"{held_out['num_tokens']:,} tokens of {held_out['num_documents']} documents"
    columns = (
        "Model",
        "Nats a token",
        "Change (standard error)",
        "Mean KL (standard error)",
        "KL below",
        "Same top token",
    )
    parts: list[Chart | Table] = [
        bars("export-chain", f"Held-out loss along the export, nats a token ({size})", items),
        Table(
            "The chain; KL of the merged weights is from the adapter, of each file from the merged weights",
            columns,
            rows,
        ),
    ]
    four_bit = stated.figures.get("four_bit") or {}
    if four_bit.get("shift_nats_per_token") is not None:
        shift, error = four_bit["shift_nats_per_token"], four_bit["standard_error_nats_per_token"]
        row = Row(("adapter on the 4-bit base it was trained on", f"{four_bit['nats_per_token']:.4f}"))
        moved = Row(("shift to the original 16-bit base", f"{shift:+.4f} ({number(error, 2)})"))
        parts.append(Table("Beside the chain", ("What", "Nats a token"), (row, moved)))
    return parts


def _change(step: dict[str, Any]) -> str:
    if step["change_nats_per_token"] is None:
        return NONE
    return f"{step['change_nats_per_token']:+.2e} ({number(step['standard_error_nats_per_token'], 2)})"


def _divergence(judged: Stated | None) -> tuple[str, str, str]:
    """KL, its bar and the share of equal top tokens; dashes where no verdict is about it."""
    if judged is None or not judged.figures.get("pair"):
        return NONE, NONE, NONE
    with figures_of(judged.entry):
        pair = judged.figures["pair"]
        error = pair["standard_error_nats"]
        shown = NONE if error is None else f"{error:.1e}"
        bar = f"{judged.figures['bar']:g}" if "bar" in judged.figures else NONE
        return f"{pair['mean_kl_nats']:.2e} ({shown})", bar, percent(pair["same_top_share"], 4)


def _timed(entry: Entry) -> list[Chart | Table]:
    rows = tuple(
        Row((str(step["name"]), duration(step["seconds"]), gib(step["num_bytes"]), gib(step["peak_rss_bytes"])))
        for step in entry.info["steps"]
    )
    return [Table("The whole export at 7B", ("Step", "Took", "Written", "Peak memory"), rows)]
