"""A run's adapter -> merged weights -> GGUF files, verified, with all that is needed to use them.

The directory appears under its name only when everything in it is complete and verified.
Intermediate files are deleted as soon as they have been used.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from forge.training.adapter.merge import usable_merge
from forge.training.adapter.provenance import read_own_base, require_own_adapter
from forge.training.config.quantizations import QUANTIZED
from forge.training.data.conversation import Encoder, load_encoder
from forge.training.export import disk_space, gguf
from forge.training.export.card import ExportRecord, Step, read_evaluation, write_card
from forge.training.export.chat_template import recognise_chatml
from forge.training.export.modelfile import CHATML_STOPS, chatml_template, write_modelfile
from forge.training.llamacpp.install import require_llama_cpp
from forge.training.llamacpp.parent import Answer, Progress, run_child, time_limit_seconds
from forge.training.models.weights import ModelWeights
from forge.training.system.errors import CheckError
from forge.training.system.files import (
    clear_leftovers,
    existing_folder,
    locked,
    refuse_existing,
    require_free_bytes,
    sha256_file,
    staged_directory,
    write_json,
    write_text,
)
from forge.training.train.record import RunRecord, completed_record

_INTERMEDIATE = "intermediate.f16.gguf"
_NOT_CHATML = "the chat template is not ChatML: the Modelfile leaves the template to the GGUF file's own"
_SPACE_REMEDY = "free space, choose another place with --out, or ask for fewer quantisations"


def export_run(
    run_dir: Path | str,
    *,
    quantizations: Sequence[str],
    lora: bool = False,
    out_dir: Path | None = None,
    force: bool = False,
    keep_merged: bool = False,
    allow_fallback: bool = False,
    progress: Progress | None = None,
) -> ExportRecord:
    """Export a completed run. ``keep_merged`` leaves the merged weights in ``run_dir/merged``.

    A merge already there is used if it is of the same base and adapter. Everything that can be
    refused is refused first: :class:`ConfigurationError`, :class:`DataError`, :class:`MachineError`
    and :class:`DiskError` with the bytes needed. :class:`CheckError` if a file fails its checks.
    """
    run_dir = Path(run_dir)
    run = completed_record(run_dir)
    target = (out_dir or run_dir / "export").absolute()
    refuse_existing(target, force)
    disk_space.check_quantizations(quantizations)
    base = read_own_base(run)
    disk_space.check_architecture(base)
    encoder = load_encoder(base.directory, run.inputs.template_date)
    require_llama_cpp()
    if not allow_fallback:
        disk_space.check_row_sizes(base, quantizations)
    with locked(run_dir):
        run = completed_record(run_dir)  # nobody can be training into it any more
        adapter_bytes = require_own_adapter(run, run_dir, base)
        for directory in (target, (run_dir / "merged").absolute()):
            clear_leftovers(directory)
        merged = usable_merge(run_dir / "merged", base.directory, run_dir / "adapter", run.inputs.base_sha256)
        needed = _require_space(run_dir, target, base, quantizations, adapter_bytes, keep_merged, merged is None)
        template = encoder.tokenizer.chat_template
        work = _Export(run, run_dir, base, template, allow_fallback, progress or (lambda _: None))
        with staged_directory(target, force=force) as staging:
            merged_dir = run_dir / "merged" if keep_merged or merged is not None else staging / "merged"
            if merged is None:
                merged = work.merge(merged_dir, force=keep_merged)
            work.convert(merged_dir, staging, quantizations)
            if merged_dir.parent == staging:
                shutil.rmtree(merged_dir)
            work.quantize(staging, quantizations)
            adapter_file = work.convert_adapter(staging) if lora else None
            (staging / _INTERMEDIATE).unlink(missing_ok=True)
            record = ExportRecord(
                model=work.name,
                out_dir=str(target),
                base_sha256=run.inputs.base_sha256,
                adapter_sha256=merged["adapter_sha256"],
                merged_sha256=merged["merged_sha256"],
                merge=merged,
                files=[work.reports[name] for name in quantizations],
                adapter_file=adapter_file,
                modelfile_uses=min(work.reports.values(), key=lambda report: report.num_bytes).name,
                needed_disk_bytes=needed,
                steps=work.steps,
                notes=work.notes,
            )
            _write_texts(staging, record, run, run_dir, encoder)
    return record


class _Export:
    """The steps, each in a process of its own, and what they cost."""

    def __init__(
        self,
        run: RunRecord,
        run_dir: Path,
        base: ModelWeights,
        chat_template: str,
        allow_fallback: bool,
        progress: Progress,
    ) -> None:
        self.run, self.run_dir, self.base, self.chat_template = run, run_dir, base, chat_template
        self.allow_fallback, self.progress = allow_fallback, progress
        self.name = str(run.workload["name"])
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self.reports: dict[str, gguf.GgufReport] = {}

    def merge(self, merged_dir: Path, *, force: bool) -> dict[str, Any]:
        """Merge the adapter into the run's base, which must be the one it was trained on."""
        self.progress("merge: comparing the base with the run's")
        arguments = {
            "base_dir": str(self.base.directory.absolute()),
            "adapter_dir": str((self.run_dir / "adapter").absolute()),
            "out_dir": str(merged_dir.absolute()),
            "force": force,
            "expected_base_sha256": self.run.inputs.base_sha256,
        }
        answer = run_child(
            "merge",
            arguments,
            doing=f"merge {self.run_dir / 'adapter'}",
            limit_seconds=time_limit_seconds(4 * self.base.num_bytes),
            progress=self.progress,
        )
        self._count("merge", answer, self.base.num_bytes)
        return answer.value

    def convert(self, merged_dir: Path, staging: Path, quantizations: Sequence[str]) -> None:
        """Convert and verify what is not quantised, and the f16 file that the rest is quantised from."""
        converted = {name: staging / self._file_name(name) for name in quantizations if name not in QUANTIZED}
        if len(converted) < len(quantizations):
            converted.setdefault("f16", staging / _INTERMEDIATE)
        for name, path in converted.items():
            convert = partial(gguf.convert_to_gguf, model_name=self.name, chat_template=self.chat_template)
            report = self._make("convert", name, path, partial(convert, merged_dir, path, name))
            if name in quantizations:
                self.reports[name] = report

    def quantize(self, staging: Path, quantizations: Sequence[str]) -> None:
        """Quantise the f16 file and verify each result; delete the f16 file if nobody asked for it."""
        source = staging / (self._file_name("f16") if "f16" in self.reports else _INTERMEDIATE)
        for name in quantizations:
            if name in QUANTIZED:
                path = staging / self._file_name(name)
                self.reports[name] = self._make("quantise", name, path, partial(gguf.quantize, source, path, name))

    def convert_adapter(self, staging: Path) -> gguf.GgufReport:
        """The adapter as GGUF, checked by applying it to the smallest model file: the shapes are those of the base."""
        self.progress("convert the adapter")
        path = staging / f"{self.name}-lora.gguf"
        answer = gguf.convert_lora_to_gguf(self.run_dir / "adapter", self.base.directory, path)
        self._count("convert adapter", answer, path.stat().st_size)
        smallest = min(self.reports.values(), key=lambda report: report.num_bytes)
        report, answer = gguf.measure_verification(path, adapter=True, base=staging / smallest.name)
        self._count("verify adapter", answer, 0)
        return report

    def _make(self, verb: str, quantization: str, path: Path, step: Callable[[], Answer]) -> gguf.GgufReport:
        """Make one file and verify it."""
        self.progress(f"{verb} to {quantization}")
        # asked again before every file: others write to the disk too
        num_bytes = disk_space.with_margin(disk_space.file_bytes(self.base, quantization))
        require_free_bytes(path.parent, num_bytes, f"the {quantization} file", _SPACE_REMEDY)
        self._count(f"{verb} {quantization}", step(), path.stat().st_size)
        self.progress(f"verify {path.name}")
        report, answer = gguf.measure_verification(path)
        self._count(f"verify {quantization}", answer, 0)
        if report.file_type != quantization:
            raise CheckError(f"{path.name} says it is {report.file_type}, not {quantization}")
        if report.fallbacks and not self.allow_fallback:
            raise CheckError(
                f"{path.name}: {len(report.fallbacks)} tensors are not {quantization}: {report.fallbacks[0]}, ...",
                remedy="leave this quantisation out, or accept larger types with --allow-fallback",
            )
        if report.fallbacks:
            self.notes.append(f"{path.name}: {len(report.fallbacks)} tensors in larger types: {report.tensor_types}")
        return report

    def _file_name(self, quantization: str) -> str:
        return f"{self.name}.{quantization}.gguf"

    def _count(self, name: str, answer: Answer, num_bytes: int) -> None:
        self.steps.append(Step(name, round(answer.seconds, 3), num_bytes, answer.peak_rss_bytes))


def _require_space(
    run_dir: Path,
    target: Path,
    base: ModelWeights,
    quantizations: Sequence[str],
    adapter_bytes: int,
    keeps_merged: bool,
    writes_merged: bool,
) -> int:
    """The most bytes at any time where the export is written, free there; the merge may be elsewhere."""
    is_elsewhere = existing_folder(target.parent).stat().st_dev != run_dir.stat().st_dev
    merges_elsewhere = keeps_merged and writes_merged and is_elsewhere
    if merges_elsewhere:
        require_free_bytes(run_dir, disk_space.with_margin(base.num_bytes), "the merged model", _SPACE_REMEDY)
    needed = disk_space.peak_disk_bytes(
        base,
        quantizations,
        adapter_bytes=adapter_bytes,
        writes_merged=writes_merged and not merges_elsewhere,
        keeps_merged=keeps_merged,
    )
    require_free_bytes(target.parent, needed, "the export", _SPACE_REMEDY)
    return needed


def _write_texts(staging: Path, record: ExportRecord, run: RunRecord, run_dir: Path, encoder: Encoder) -> None:
    chatml = recognise_chatml(encoder)
    remarks = list(chatml.remarks) if chatml else [_NOT_CHATML]
    if chatml is None and encoder.is_dated:
        remarks.append(f"the chat template writes the date: trained with {encoder.template_date}, asked with today's")
    record.notes.extend(remarks)
    modelfile = write_modelfile(
        record.modelfile_uses,
        run.workload["data"].get("system_prompt"),
        run.workload["export"].get("parameters"),
        template=chatml_template(chatml.default_system, chatml.reply_opening) if chatml else None,
        stops=CHATML_STOPS if chatml else (),
        remarks=remarks,
    )
    write_text(staging / "Modelfile", modelfile)
    write_text(staging / "README.md", write_card(run, record, read_evaluation(run_dir, record)))
    content = asdict(record)
    del content["out_dir"]  # a path of this machine
    write_json(staging / "export.json", content)
    digests = {report.name: report.sha256 for report in record.all_files()}
    digests |= {name: sha256_file(staging / name) for name in ("Modelfile", "README.md", "export.json")}
    write_text(staging / "SHA256SUMS", "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))
