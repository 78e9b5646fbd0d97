"""The page of one run, ``report.html`` in its directory: what it was, learned, answers and made.

Computed from the run's own files (:mod:`.run_files`). What is not there has no section.
"""

from __future__ import annotations

from pathlib import Path

from forge.training.report.run_files import RunFiles, read_run_files
from forge.training.system.errors import MachineError
from forge.training.system.files import write_text

NAME = "report.html"


def write_report(run_dir: Path | str, *, export_dir: Path | None = None) -> Path:
    """Write the page again and return its path. ``export_dir``: where the export is, if not in the run.

    Raises :class:`DataError` where there is no run, :class:`MachineError` without what draws, :class:`DiskError`.
    """
    run_dir = Path(run_dir)
    files = read_run_files(run_dir, export_dir)
    try:
        text = render_run(files)
    except ModuleNotFoundError as error:
        remedy = "install requirements-cpu.txt or requirements-gpu.txt"
        raise MachineError(f"{error.name} is not installed", remedy=remedy) from error
    write_text(run_dir / NAME, text)
    return run_dir / NAME


def render_run(files: RunFiles) -> str:
    """The page's HTML."""
    from forge.training.report.page.content import Section
    from forge.training.report.page.render import TEMPLATES, Page, render_page
    from forge.training.report.sections import answers, held_out, losses, made, work

    sections = (
        work.build_result(files),
        losses.build(files),
        answers.build(files),
        held_out.build(files),
        made.build(files),
        work.build_memory(files),
        work.build(files),
        Section("left-out", "Left out", " ".join(f"{note}." for note in files.notes)),
    )
    lead = _lead(files)
    page = Page(
        kicker="Forge, training run",
        heading=files.name,
        lead=lead,
        headline=lead,
        facts=tuple(fact for fact in _facts(files) if fact),
        sections=tuple(section for section in sections if section.parts or section.intro),
    )
    style = (TEMPLATES / "run.css").read_text(encoding="utf-8")
    return render_page(page, ("train", "held-out", files.record.backend), style=style)


def _lead(files: RunFiles) -> str:
    record = files.record
    if record.status == "completed":
        text = f"Trained to the end, {record.num_steps:,} steps."
    else:
        what = {"running": "Still training, or killed", "out_of_memory": "Out of GPU memory"}
        name = what.get(record.status, record.status[:1].upper() + record.status[1:])
        step = max([record.num_steps, *(step for step, _ in files.log.losses[-1:])])
        text = f"{name} at step {step:,} of {record.num_planned_steps:,}. " + (record.message or "")
    description = str(files.config.get("description") or "").strip()
    return f"{description} {text}".strip()


def _facts(files: RunFiles) -> list[str]:
    record = files.record
    gpu = record.environment.get("gpu")
    return [
        f"backend {record.backend}",
        str(gpu["name"]) if isinstance(gpu, dict) and gpu.get("name") else "CPU",
        record.started_at[:10],
        f"seed {record.seed}",
    ]
