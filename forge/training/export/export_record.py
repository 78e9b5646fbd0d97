"""ExportRecord: what an export made and what each step cost. Written as ``export.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from forge.training.export.gguf import GgufReport
from forge.training.llamacpp.install import COMMIT, VERSION

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Step:
    """One step's cost. ``num_bytes`` is what it wrote; ``peak_rss_bytes`` is its own process's."""

    name: str
    seconds: float
    num_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class ExportRecord:
    """What an export made; ``export.json``. ``merge`` is the record of the merge, with its digests."""

    model: str
    out_dir: str
    base_sha256: str
    adapter_sha256: str
    merged_sha256: str
    merge: dict[str, Any]
    files: list[GgufReport]
    adapter_file: GgufReport | None
    modelfile_uses: str
    llama_cpp_commit: str = COMMIT
    llama_cpp_python_version: str = VERSION
    needed_disk_bytes: int = 0
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without ``out_dir``: a path of this machine."""
        content = asdict(self)
        del content["out_dir"]
        return content


def print_export(record: ExportRecord, console: Console) -> None:
    """The files and what each step cost."""
    from rich.table import Table

    files = Table(title=f"export: {record.model}", title_justify="left")
    for column in ("file", "GB", "tensor types", "sha256"):
        files.add_column(column)
    for report in [*record.files, record.adapter_file]:
        if report is not None:
            types = ", ".join(f"{count} {name}" for name, count in sorted(report.tensor_types.items()))
            files.add_row(report.name, f"{report.num_bytes / 1e9:.3f}", types, report.sha256[:12])
    steps = Table(title="steps", title_justify="left")
    for column in ("step", "seconds", "GB written", "peak memory, GB"):
        steps.add_column(column, justify="left" if column == "step" else "right")
    for step in record.steps:
        steps.add_row(
            step.name, f"{step.seconds:.1f}", f"{step.num_bytes / 1e9:.3f}", f"{step.peak_rss_bytes / 1e9:.2f}"
        )
    console.print(files)
    console.print(steps)
    for note in record.notes:
        console.print(f"note: {note}", markup=False)
    example = f'forge chat {record.out_dir}/{record.modelfile_uses} "..."'
    console.print(f"next: {example}", markup=False)
