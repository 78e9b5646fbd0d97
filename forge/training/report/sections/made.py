"""The files that the run made, and how to use them."""

from __future__ import annotations

import shlex
from typing import Any

from forge.training.export.card import use_commands
from forge.training.report.page.content import Listing, Part, Row, Section, Table
from forge.training.report.run_files import RunFiles


def build(files: RunFiles) -> Section:
    """The adapter and the exported files with size and SHA-256. Empty for a run without an adapter."""
    rows, record = [], files.record
    adapter = files.run_dir / "adapter" / "adapter_model.safetensors"
    if record.adapter_sha256 is not None and adapter.is_file():
        rows.append(_row("adapter/adapter_model.safetensors", adapter.stat().st_size, record.adapter_sha256))
    for report in _exported(files.export):
        rows.append(_row(str(report.get("name")), report.get("num_bytes"), str(report.get("sha256"))))
    if not rows:
        return Section("files", "Files")
    parts: list[Part] = [Table("Files of this run", ("File", "Size", "SHA-256"), tuple(rows), texts=3)]
    if files.export is not None and files.export.get("modelfile_uses"):
        parts.append(Listing("How to use them: type this in the export's folder", "\n".join(_commands(files))))
    system = files.config["data"].get("system_prompt")
    notes = (f"It was trained with the system prompt “{system}”; the Modelfile sets it.",) if system else ()
    return Section("files", "Files", "", tuple(parts), notes)


def _exported(export: dict[str, Any] | None) -> list[dict[str, Any]]:
    if export is None:
        return []
    adapter = export.get("adapter_file")
    return [*export["files"], *([adapter] if isinstance(adapter, dict) else [])]


def _row(name: str, num_bytes: object, sha256: str) -> Row:
    return Row((name, _size(num_bytes) if isinstance(num_bytes, int) else "", sha256))


def _size(num_bytes: int) -> str:
    """In the largest unit that it fills: 4.683 GB, 71.2 MB, 34.1 kB."""
    for unit, scale, decimals in (("GB", 1e9, 3), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.{decimals}f} {unit}"
    return f"{num_bytes} bytes"


def _commands(files: RunFiles) -> list[str]:
    assert files.export is not None
    model, name = str(files.export.get("model") or files.name), str(files.export["modelfile_uses"])
    create, run, llama = use_commands(model, name, files.config["export"].get("parameters") or {})
    lines = ["# Ollama", create, run, "", "# llama.cpp", llama]
    return [*lines, "", "# Forge", shlex.join(["forge", "chat", name])]
