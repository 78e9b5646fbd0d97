"""How the losses went, on what was trained and on what was held out."""

from __future__ import annotations

from forge.training.report.charts.curves import curves
from forge.training.report.page.content import Chart, Part, Row, Section, Table
from forge.training.report.run_files import RunFiles

_AXES = ("optimizer step", "nats per trained token")


def build(files: RunFiles) -> Section:
    """Empty where no step was logged."""
    log = files.log
    if not log.losses:
        return Section("losses", "Losses")
    parts: list[Part] = [_chart(files)]
    if log.validation:
        best = log.best
        rows = [
            Row((f"{step:,}", f"{loss:.4f}", "best" if best is not None and step == best[0] else ""))
            for step, loss in log.validation
        ]
        table = Table("Held-out loss, nats per trained token", ("Step", "Loss", ""), tuple(rows), texts=0)
        parts.append(Table(table.caption, table.columns, table.rows, texts=1, is_folded=len(rows) > 12, is_beside=True))
    intro = "The loss of each step's own examples, and the loss on documents that were never trained on: "
    intro += "while both fall, the model learns; once only the first falls, it memorises."
    intro = intro if log.validation else "The loss of each step's own examples; nothing was evaluated while it trained."
    return Section("losses", "Losses", intro, tuple(parts))


def _chart(files: RunFiles) -> Chart:
    log = files.log
    series = [("train", "train", log.losses)]
    said = f"Train: {log.losses[0][1]:.4f} at step {log.losses[0][0]}, {log.losses[-1][1]:.4f} at the last"
    if log.validation:
        series.append(("held-out", "held-out", log.validation))
        said += f". Held-out: {log.validation[0][1]:.4f} at first, {log.validation[-1][1]:.4f} at last"
    return curves("loss", "Loss by step", series, *_AXES, f"{said}.")
