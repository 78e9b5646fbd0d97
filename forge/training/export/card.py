"""What an export says of itself: its record, ``export.json``, and its model card, ``README.md``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from forge.training.evaluation.record import Evaluation, describe_comparison, figure_rows
from forge.training.export.gguf import GgufReport
from forge.training.llamacpp.install import COMMIT, VERSION
from forge.training.system.command import say, shown_path
from forge.training.system.errors import DataError
from forge.training.system.files import read_json_object
from forge.training.train.record import RunRecord

if TYPE_CHECKING:
    from rich.console import Console

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_LICENSE = re.compile(r"""(?P<key>license|license_name|license_link):\s+["']?(?P<value>[A-Za-z0-9][^\s"']*)["']?""")
_SOURCE = re.compile(r"""source:\s+["']?(\S.*?)["']?""")  # of the bases that Forge makes out of a package
_NUM_SAMPLES = 3
_SAMPLE_CHARACTERS = 400
_PACKAGES = ("torch", "transformers", "peft", "trl", "unsloth", "bitsandbytes", "accelerate", "datasets")


@dataclass(frozen=True)
class Step:
    """One step's cost. ``num_bytes`` is what it wrote; ``peak_rss_bytes`` is its own process's."""

    name: str
    seconds: float
    num_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class ExportRecord:
    """What an export made; ``export.json``. ``merge`` is the record of the merge, with its digests.

    ``quantized_from``: the 16-bit type that the quantised files were made from. ``max_length``: tokens of the longest
    example that it was trained on. ``merge_proof``: the merged weights' divergence from the adapter, by the type that
    they are stored in. ``imatrix``: on what an importance matrix was collected.
    ``steps``: of the export that wrote the record; earlier files took their own.
    """

    model: str
    out_dir: str
    base_sha256: str
    adapter_sha256: str
    merged_sha256: str
    merge: dict[str, Any]
    files: list[GgufReport]
    adapter_file: GgufReport | None
    modelfile_uses: str
    tokenizer_sha256: str | None = None
    quantized_from: str = "f16"
    max_length: int | None = None
    system_prompt: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    merge_proof: dict[str, Any] = field(default_factory=dict)
    imatrix: dict[str, Any] | None = None
    llama_cpp_commit: str = COMMIT
    llama_cpp_python_version: str = VERSION
    needed_disk_bytes: int = 0
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    schema_version: int = 1

    def all_files(self) -> list[GgufReport]:
        """The model's files, and the adapter's where there is one."""
        return [*self.files, *([self.adapter_file] if self.adapter_file else [])]


def print_export(record: ExportRecord, console: Console) -> None:
    """The files and what each step cost."""
    from rich.table import Table

    files = Table(title=f"export: {record.model}", title_justify="left")
    for column in ("file", "GB", "KL to the adapter", "same top token", "tensor types", "sha256"):
        files.add_column(column, overflow="fold")
    for report in record.all_files():
        size, digest = f"{report.num_bytes / 1e9:.3f}", report.sha256[:12]
        files.add_row(report.name, size, *_predictions(report), _types(report), digest)
    steps = Table(title="steps", title_justify="left")
    for column in ("step", "seconds", "GB written", "peak memory, GB"):
        steps.add_column(column, justify="left" if column == "step" else "right")
    for step in record.steps:
        steps.add_row(
            step.name, f"{step.seconds:.1f}", f"{step.num_bytes / 1e9:.3f}", f"{step.peak_rss_bytes / 1e9:.2f}"
        )
    console.print(files)
    console.print(steps)
    if text := _compared_on(record):
        say(console, text)
    for note in record.notes:
        say(console, note, "note: ")
    say(console, shown_path(Path(record.out_dir)), "export: ")


def write_card(run: RunRecord, export: ExportRecord, evaluation: Evaluation | None, base_dir: Path) -> str:
    """The card's Markdown. Only what the records hold; figures not measured are left out, no path of this machine.

    ``base_dir``: the base, whose own card may say its license.
    """
    sections = [
        _opening(run, export, base_dir),
        _files(export),
        _how_to_run(run, export),
        _training(run),
        _results(run, evaluation),
        *_samples(evaluation),
        _chain(run, export),
    ]
    if export.notes:
        sections.append("## Notes\n\n" + "\n".join(f"- {note}" for note in export.notes))
    return "\n\n".join(sections) + "\n"


def read_evaluation(run_dir: Path, export: ExportRecord) -> Evaluation | None:
    """The run's evaluation, None if there is none; one of another adapter is noted and left out."""
    path = run_dir / "evaluation.json"
    if not path.is_file():
        return None
    try:
        evaluation = Evaluation.model_validate(read_json_object(path))
    except ValidationError:
        evaluation = None
    if evaluation is None or evaluation.adapter_sha256 != export.adapter_sha256:
        export.notes.append("evaluation.json is not an evaluation of this adapter: the model card leaves it out")
        return None
    return evaluation


def _opening(run: RunRecord, export: ExportRecord, base_dir: Path) -> str:
    hub_name, license_fields = _hub_name(run, base_dir), _license(base_dir)
    lines = ["---"]
    if hub_name:
        lines.append(f"base_model: {hub_name}")
    lines += [f"{key}: {value}" for key, value in license_fields.items()]
    lines += ["library_name: gguf", "tags: [gguf, lora, forge]", "---", "", f"# {export.model}", ""]
    base = hub_name or _base_name(run)
    lines.append(f"A LoRA adapter trained on {base} and merged into its original weights, as GGUF for llama.cpp.")
    license_name = license_fields.get("license_name") or license_fields.get("license")
    if license_name:
        lines.append(f"The base's license: {license_name}.")
    if source := next((match[1] for line in _front_matter(base_dir) if (match := _SOURCE.fullmatch(line))), None):
        lines.append(f"The base's source: {source}.")
    return "\n".join(lines)


def _hub_name(run: RunRecord, base_dir: Path) -> str | None:
    """The base's name on the hub: as the config has it, else as its config.json does."""
    given = str(run.workload.get("model", {}).get("path") or "")
    names = [given, str(_config(base_dir).get("_name_or_path") or "")]
    return next((name for name in names if _HUB_NAME.fullmatch(name) and not os.path.exists(name)), None)


def _config(base_dir: Path) -> dict[str, Any]:
    try:
        return read_json_object(base_dir / "config.json")
    except DataError:
        return {}


def _license(base_dir: Path) -> dict[str, str]:
    """``license``, ``license_name`` and ``license_link`` as the front matter of the base's own card has them."""
    found = (_LICENSE.fullmatch(line) for line in _front_matter(base_dir))
    return {match["key"]: match["value"] for match in found if match}


def _front_matter(base_dir: Path) -> list[str]:
    """The lines of the base's own card that are for programs."""
    try:
        text = (base_dir / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return [line.strip() for line in front[1].splitlines()] if front else []


def _files(export: ExportRecord) -> str:
    rows = []
    for report in export.all_files():
        size, digest = f"{report.num_bytes:,}", f"`{report.sha256}`"
        rows.append((f"`{report.name}`", size, *_predictions(report), _types(report), digest))
    table = _table(("file", "bytes", "KL to the adapter", "same top token", "tensors", "SHA-256"), rows)
    if compared := _compared_on(export):
        table += f"\n\n{compared}"
    checked = "Each file was loaded with every value checked, by the llama.cpp that made it"
    return f"## Files\n\n{table}\n\n{checked} ({export.llama_cpp_commit}); `sha256sum -c SHA256SUMS` checks your copy."


def _predictions(report: GgufReport) -> tuple[str, str]:
    """Mean KL of the adapter's predictions to the file's, what an importance matrix gained, and the same top tokens."""
    if report.proof is None or report.proof.predictions is None:
        return "", ""
    found, plain = report.proof.predictions, report.proof.other_way
    without = f" ({plain.mean_kl:.1e} without imatrix)" if report.proof.uses_imatrix and plain is not None else ""
    return f"{found.mean_kl:.1e}{without}", f"{found.same_top_share:.1%}"


def _compared_on(export: ExportRecord) -> str:
    """On what the files were compared with the adapter; empty where they were not."""
    proofs = [report.proof for report in export.files if report.proof and report.proof.predictions]
    found = proofs[0].predictions if proofs else None
    if found is None:
        return ""
    text = f"KL in nats per token, on {found.num_predictions:,} tokens of {found.num_documents:,} {proofs[0].text}"
    merges = {name: values["mean_kl"] for name, values in export.merge_proof.items() if isinstance(values, dict)}
    merged = ", ".join(f"{kl:.1e} in {'the ' if name != 'float32' else ''}{name}" for name, kl in merges.items())
    return f"{text}; of the merged weights {merged}." if merged else f"{text}."


def _types(report: GgufReport) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(report.tensor_types.items()))


def _how_to_run(run: RunRecord, export: ExportRecord) -> str:
    name = export.modelfile_uses
    parameters = run.workload.get("export", {}).get("parameters", {})
    lines = ["## How to run", "", "```sh", *use_commands(export.model, name, parameters), "```"]
    system = run.workload.get("data", {}).get("system_prompt")
    if system:
        lines += ["", f"It was trained with the system prompt {system!r}; the Modelfile sets it."]
    if export.adapter_file is not None:
        adapter = export.adapter_file.name
        lines += ["", f"`{adapter}` is the change alone, for the unmerged base as GGUF. It is for llama.cpp only:"]
        lines += [
            "Ollama takes no adapters as GGUF.",
            "",
            "```sh",
            f"llama-cli -m BASE.gguf --lora {adapter} --jinja -cnv",
        ]
        lines.append("```")
    return "\n".join(lines)


def use_commands(model: str, file_name: str, parameters: dict[str, Any]) -> list[str]:
    """What to type in the export's folder: Ollama, then llama.cpp. ``parameters``: the Modelfile's."""
    create, run = f"ollama create {model.lower()} -f Modelfile", f"ollama run {model.lower()}"
    return [create, run, f"llama-cli -m {file_name} -c {parameters.get('num_ctx', 2048)} --jinja -cnv"]


def _training(run: RunRecord) -> str:
    workload, inputs = run.workload, run.inputs
    data, lora, optimizer = workload.get("data", {}), workload.get("lora", {}), workload.get("optimizer", {})
    training, model = workload.get("training", {}), workload.get("model", {})
    peak_bytes = max((phase.peak_allocated_bytes for phase in run.memory), default=0)
    validation = f"{inputs.num_validation_examples:,} held-out examples" if inputs.num_validation_examples else "none"
    rows = [
        ("backend", run.backend),
        ("examples", f"{inputs.num_train_examples:,}; validation: {validation}"),
        ("tokens", f"{inputs.num_train_tokens:,}, of which {inputs.num_trained_tokens:,} carry the loss"),
        ("longest example", f"{data.get('max_length')} tokens; longer documents: {data.get('long_documents')}"),
        ("loss on", data.get("loss_on")),
        ("base weights", f"{model.get('quantization')} quantisation, {model.get('dtype')}"),
        ("LoRA", f"rank {lora.get('rank')}, alpha {lora.get('alpha')}, dropout {lora.get('dropout')}"),
        ("LoRA targets", ", ".join(lora.get("targets", []))),
        ("trained parameters", f"{run.trainable.num_parameters:,}" if run.trainable else None),
        ("optimizer", f"{optimizer.get('name')}, {optimizer.get('schedule')}, peak {optimizer.get('learning_rate')}"),
        ("steps", f"{run.num_steps:,} of {training.get('effective_batch')} examples, seed {run.seed}"),
        ("started", run.started_at),
        ("training time", _unit(run.timing.train_seconds, "s")),
        ("tokens per second", _unit(run.timing.tokens_per_second, "")),
        ("peak GPU memory", f"{peak_bytes / 2**30:.2f} GiB" if peak_bytes else None),
        *_environment(run.environment),
    ]
    return "## Training\n\n" + _table(("", ""), [row for row in rows if row[1]])


def _results(run: RunRecord, evaluation: Evaluation | None) -> str:
    losses = [(name.replace("_", " "), f"{value:.4f}") for name, value in run.losses if isinstance(value, float)]
    text = "## Results\n\nDuring training, nats per trained token:\n\n" + _table(("loss", "nats"), losses)
    if evaluation is None:
        return text
    where = f"On {evaluation.num_documents:,} held-out documents ({evaluation.num_tokens:,} tokens), {evaluation.dtype}"
    text += f"\n\n{where}, outside the training program:\n\n"
    rows = [(name, *cells) for name, cells in figure_rows(evaluation)]
    text += _table(("figure", *(row.subject for row in evaluation.subjects)), rows)
    for pair in evaluation.comparisons:
        text += f"\n\n{describe_comparison(pair)}."
    for pair in evaluation.general_comparisons:
        text += f"\n\nOn general text, {describe_comparison(pair)}."
    if evaluation.facts:
        facts = [(row.question, row.expected, row.subject, "yes" if row.found else "no") for row in evaluation.facts]
        text += "\n\n" + _table(("question", "expected", "model", "said"), facts)
    return text


def _samples(evaluation: Evaluation | None) -> list[str]:
    """A section with what the model answered when it was evaluated, most probable token by token."""
    if evaluation is None:
        return []
    subject = next((name for name in ("merged", "adapter") if any(s.subject == name for s in evaluation.subjects)), "")
    asked = [(row.question, row.answer) for row in evaluation.facts if row.subject == subject]
    asked += [(f"(the instruction of {r.document})", r.answer) for r in evaluation.answers if r.subject == subject]
    if not asked:
        return []
    rows = [(asks, f"{' '.join(says.split()):.{_SAMPLE_CHARACTERS}}") for asks, says in asked[:_NUM_SAMPLES]]
    who = "The merged weights" if subject == "merged" else "Base and adapter"
    return [
        f"## Sample answers\n\n{who}, greedily, before they became GGUF:\n\n" + _table(("question", "answer"), rows)
    ]


def _chain(run: RunRecord, export: ExportRecord) -> str:
    rows = [
        ("base weights", run.inputs.base_sha256),
        ("tokenizer", run.inputs.tokenizer_sha256),
        ("training corpus", run.inputs.corpus_sha256),
        ("training examples", run.inputs.train_examples_sha256),
        ("config", run.workload_sha256),
        ("adapter", export.adapter_sha256),
        ("merged weights", export.merged_sha256),
    ]
    named = [(name, f"`{digest}`") for name, digest in rows if digest]
    return "## Where it came from\n\n" + _table(("artefact", "SHA-256"), named)


def _base_name(run: RunRecord) -> str:
    path = str(run.workload.get("model", {}).get("path") or run.base_path)
    return os.path.basename(path.rstrip("/")) if os.path.isabs(path) else path


def _environment(environment: dict[str, Any]) -> list[tuple[str, str | None]]:
    packages = environment.get("packages") or {}
    versions = ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if packages.get(name))
    gpu = environment.get("gpu")
    if isinstance(gpu, dict):
        gpu = gpu.get("name")
    return [("GPU", str(gpu) if gpu else None), ("versions", versions or None)]


def _unit(value: float | None, unit: str) -> str | None:
    return f"{value:,.1f} {unit}".strip() if value is not None else None


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    cells = ([" ".join(str(cell).replace("|", "\\|").split()) for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
