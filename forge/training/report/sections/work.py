"""What was trained on what, how fast, and in how much memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from forge.training.config.yaml import dump_yaml
from forge.training.report.charts.bars import Bar, bars
from forge.training.report.page.content import Chart, Listing, Part, Row, Section, Table
from forge.training.report.page.numbers import GIB, gib
from forge.training.report.run_files import RunFiles
from forge.training.train.display import summary_rows

_PACKAGES = ("torch", "transformers", "peft", "trl", "unsloth", "bitsandbytes", "accelerate", "datasets")


def build(files: RunFiles) -> Section:
    """Data, base, config and versions."""
    record, inputs = files.record, files.record.inputs
    model = files.config["model"]
    data = [
        ("Base model", f"{_base_name(str(model['path']))}, {model['quantization']}, {model['dtype']}"),
        ("Records", _count(inputs.num_train_records)),
        ("Divided into several examples", _count(inputs.num_divided_records or None)),
        ("Examples", f"{inputs.num_train_examples:,}"),
        ("Tokens per epoch", f"{inputs.num_train_tokens:,}, of which {inputs.num_trained_tokens:,} carry the loss"),
        ("Held-out examples", f"{inputs.num_validation_examples:,}" if inputs.num_validation_examples else "none"),
        ("Trained parameters", _count(record.trainable.num_parameters) if record.trainable else None),
        ("Backend", record.backend),
        ("GPU", _gpu(record.environment)),
        ("Versions", _versions(record.environment)),
        ("Started", record.started_at),
        ("Resumed", ", ".join(f"from step {resume.step:,}" for resume in record.resumes) or None),
    ]
    digests = [
        ("Base weights", inputs.base_sha256),
        ("Tokenizer", inputs.tokenizer_sha256),
        ("Training corpus", inputs.corpus_sha256),
        ("Held-out corpus", inputs.validation_corpus_sha256),
        ("Training examples", inputs.train_examples_sha256),
        ("Held-out examples", inputs.validation_examples_sha256),
        ("Config", record.workload_sha256),
    ]
    parts: tuple[Part, ...] = (
        _table("What was trained on what", data),
        _table("Where it came from, SHA-256", digests, is_folded=True),
        Listing("The whole config", dump_yaml(_without_folders(files.config)), is_folded=True),
        Listing("The plan", dump_yaml(record.plan), is_folded=True),
    )
    return Section("work", "What was trained", "", parts, (*inputs.notes, *record.notes))


def build_result(files: RunFiles) -> Section:
    """The run's own figures: steps, losses, speed, memory."""
    rows = [(name[:1].upper() + name[1:], value) for name, value in summary_rows(files.record)]
    return Section("result", "Result", "", (_table("This run", rows),))


def build_memory(files: RunFiles) -> Section:
    """Peaks by the end of each phase: of the GPU where there is one, else of the process. Empty where not measured."""
    record = files.record
    chart: Chart | None = None
    if record.memory:
        items = [
            Bar(
                phase.phase,
                record.backend,
                phase.peak_allocated_bytes / GIB,
                f"{gib(phase.peak_allocated_bytes)}, {gib(phase.peak_reserved_bytes)} reserved",
                outer=phase.peak_reserved_bytes / GIB,
            )
            for phase in record.memory
        ]
        chart = bars("peak-memory", "Peak GPU memory by the end of each phase", items)
    elif record.process_memory:
        items = [
            Bar(p.phase, record.backend, p.peak_resident_bytes / GIB, gib(p.peak_resident_bytes))
            for p in record.process_memory
        ]
        chart = bars("peak-memory", "Peak memory of the process by the end of each phase", items)
    return Section("memory", "Memory", "", (chart,) if chart is not None else ())


def _table(caption: str, rows: Iterable[tuple[str, str | None]], *, is_folded: bool = False) -> Table:
    known = tuple(Row((name, value)) for name, value in rows if value)
    return Table(caption, ("", ""), known, texts=2, is_folded=is_folded)


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _base_name(path: str) -> str:
    return os.path.basename(path.rstrip("/")) if os.path.isabs(path) else path


def _without_folders(value: Any) -> Any:
    """The config without the folders of this machine: a page is shown to others."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(inner) for inner in value]
    return _base_name(value) if isinstance(value, str) else value


def _gpu(environment: dict[str, Any]) -> str | None:
    gpu = environment.get("gpu")
    return str(gpu["name"]) if isinstance(gpu, dict) and gpu.get("name") else None


def _versions(environment: dict[str, Any]) -> str | None:
    packages = environment.get("packages") or {}
    return ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if packages.get(name)) or None
