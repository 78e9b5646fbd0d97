"""Export fidelity: one verdict per claim, the loss from base to the smallest file as one chain, the export at 7B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge.training.report.charts.bars import Bar, bars
from forge.training.report.page.content import Chart, Row, Section, Table
from forge.training.report.page.numbers import NONE, gib
from harness.report.evidence import Entry, Evidence, figures_of
from harness.report.page.numbers import duration, number, percent
from harness.report.verdicts import Judged, verdict_table


def build(evidence: Evidence, judged: list[Judged]) -> Section:
    """Raises :class:`DataError` for figures that cannot be shown."""
    parts: list[Chart | Table] = [verdict_table("export", judged, "What an export must keep", "Claim")]
    by_name = {verdict.name: (verdict, entry) for verdict, entry in judged}
    chain, entry = by_name["chain"]
    if entry and chain.figures.get("chain"):
        with figures_of(entry):
            parts += _chain(chain.figures, str(entry.info.get("backend")), by_name)
    for entry in timed_exports(evidence):
        with figures_of(entry):
            parts.append(_timed(entry))
    return Section(
        "export",
        "Export: from the adapter to the files",
        intro=(
            "On held-out text, with a model trained in this gate. Divergences are those of each file's predictions in "
            "llama.cpp from the merged weights' in float32."
        ),
        parts=tuple(parts),
    )


def timed_exports(evidence: Evidence) -> list[Entry]:
    """The entries of exports that were only timed."""
    return [entry for entry in evidence.of_kind("export") if entry.info.get("metric") == "export_seconds"]


def _chain(figures: dict[str, Any], backend: str, by_name: Mapping[str, Judged]) -> list[Chart | Table]:
    steps, held_out = figures["chain"], figures["held_out"]
    items = [Bar(step["subject"], backend, step["nats_per_token"], f"{step['nats_per_token']:.4f}") for step in steps]
    claims = {step["subject"]: by_name.get(f"divergence_{step['subject']}") for step in steps}
    claims["merged"] = by_name["merged_against_adapter"]
    rows = tuple(
        Row((step["subject"], f"{step['nats_per_token']:.4f}", _change(step), *_divergence(claims[step["subject"]])))
        for step in steps
    )
    size = f"{held_out['num_tokens']:,} tokens of {held_out['num_documents']} documents"
    columns = (
        *("Model", "Nats per token", "Change (standard error)"),
        *("Mean KL (standard error)", "KL below", "Same top token"),
    )
    caption = "The chain; KL of the merged weights is from the adapter, of each file from the merged weights"
    parts: list[Chart | Table] = [
        bars("export-chain", f"Held-out loss along the export, nats per token ({size})", items),
        Table(caption, columns, rows),
    ]
    four_bit = figures.get("four_bit") or {}
    if four_bit.get("shift_nats_per_token") is not None:
        shift, error = four_bit["shift_nats_per_token"], four_bit["standard_error_nats_per_token"]
        adapter = Row(("adapter on the 4-bit base it was trained on", f"{four_bit['nats_per_token']:.4f}"))
        moved = Row(("shift to the original 16-bit base", f"{shift:+.4f} ({number(error, 2)})"))
        parts.append(Table("Beside the chain", ("What", "Nats per token"), (adapter, moved)))
    return parts


def _change(step: dict[str, Any]) -> str:
    if step["change_nats_per_token"] is None:
        return NONE
    return f"{step['change_nats_per_token']:+.2e} ({number(step['standard_error_nats_per_token'], 2)})"


def _divergence(judged: Judged | None) -> tuple[str, str, str]:
    """KL, its bar and the share of equal top tokens; dashes where no verdict is about it."""
    verdict, entry = judged or (None, None)
    if verdict is None or entry is None or not verdict.figures.get("pair"):
        return NONE, NONE, NONE
    with figures_of(entry):
        pair = verdict.figures["pair"]
        error = pair["standard_error_nats"]
        shown = NONE if error is None else f"{error:.1e}"
        bar = f"{verdict.figures['bar']:g}" if "bar" in verdict.figures else NONE
        return f"{pair['mean_kl_nats']:.2e} ({shown})", bar, percent(pair["same_top_share"], 4)


def _timed(entry: Entry) -> Table:
    rows = tuple(
        Row((str(step["name"]), duration(step["seconds"]), gib(step["num_bytes"]), gib(step["peak_rss_bytes"])))
        for step in entry.info["steps"]
    )
    return Table("The whole export at 7B", ("Step", "Took", "Written", "Peak memory"), rows)
