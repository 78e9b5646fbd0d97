"""A run's adapter -> merged weights -> GGUF files, verified, with all that is needed to use them.

Files appear in the folder only when everything that was asked for is complete and verified. What an earlier export of
the same run made is used and kept: one more quantisation costs only itself. Intermediate files are deleted as soon as
they have been used.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from forge.training.adapter.adapter_config import read_adapter_config
from forge.training.adapter.merge import usable_merge
from forge.training.adapter.provenance import read_own_base, require_own_adapter
from forge.training.config.quantizations import QUANTIZED
from forge.training.data.conversation import Encoder, load_encoder
from forge.training.export import disk_space, gguf
from forge.training.export.card import ExportRecord, Step, read_evaluation, write_card
from forge.training.export.chat_template import recognise_chatml
from forge.training.export.folder import RECORD, SUMS, TEXTS, ExportFolder, refuse_other_inputs, remember_digests
from forge.training.export.modelfile import CHATML_STOPS, chatml_template, write_modelfile
from forge.training.llamacpp.install import COMMIT, require_llama_cpp
from forge.training.llamacpp.parent import Answer, Progress, run_child, time_limit_seconds
from forge.training.models.weights import ModelWeights
from forge.training.system.errors import CheckError
from forge.training.system.files import (
    clear_leftovers,
    existing_folder,
    locked,
    require_free_bytes,
    sha256_file,
    write_json,
    write_text,
)
from forge.training.train.record import RunRecord, completed_record

_INTERMEDIATE = "intermediate.{}.gguf"
_NOT_CHATML = "the chat template is not ChatML: the Modelfile leaves the template to the GGUF file's own"
_SPACE_REMEDY = "free space, choose another place with --out, or ask for fewer quantisations"


def export_run(
    run_dir: Path | str,
    *,
    quantizations: Sequence[str],
    lora: bool = False,
    out_dir: Path | None = None,
    base_dir: Path | None = None,
    force: bool = False,
    keep_merged: bool = False,
    allow_fallback: bool = False,
    progress: Progress | None = None,
) -> ExportRecord:
    """Export a completed run, or add what is missing to an export of it that is there.

    ``base_dir``: where the run's base is now. ``force`` makes everything again and removes what the export before made,
    no other file. ``keep_merged`` leaves the merged weights in ``run_dir/merged``; a merge already there is used if it
    is of the same base and adapter. Everything that can be refused is refused first: :class:`ConfigurationError`,
    :class:`DataError` (also for an export that was made from something else), :class:`MachineError` and
    :class:`DiskError` with the bytes needed. :class:`CheckError` if a file fails its checks.
    """
    disk_space.check_quantizations(quantizations)
    run_dir, say = Path(run_dir), progress or (lambda _: None)
    run = completed_record(run_dir)
    target = out_dir or run_dir / "export"
    folder = ExportFolder.look(target)
    base = read_own_base(run, base_dir)
    disk_space.check_architecture(base)
    encoder = load_encoder(base.directory, run.inputs.template_date)
    require_llama_cpp()
    if not allow_fallback:
        disk_space.check_row_sizes(base, quantizations)
    with locked(run_dir):
        run = completed_record(run_dir)  # nobody can be training into it any more
        adapter_bytes = require_own_adapter(run, run_dir, base)
        for directory in (folder.place, run_dir / "merged"):
            clear_leftovers(directory)
        before = None if force else _usable_export(folder, run, run_dir)
        template = encoder.tokenizer.chat_template
        work = _Export(run, run_dir, base, template, allow_fallback, say, target, before)
        missing = [name for name in quantizations if name not in work.reports]
        lora = lora and (before is None or before.adapter_file is None)
        folder.refuse_taken([*TEXTS, RECORD, SUMS, *work.file_names(missing, lora=lora)])
        if before is not None and not (missing or lora or keep_merged):
            say(f"{target} is complete: nothing to do")
            return before
        # a weight that float16 cannot hold; the f16 file of an export before shows that there is none
        work.source = "f16" if "f16" in work.reports else disk_space.check_range(base, missing)
        has_source = work.source in work.reports or not any(name in QUANTIZED for name in missing)
        needs_merged = keep_merged or not has_source or any(name not in QUANTIZED for name in missing)
        merged = None
        if needs_merged:
            base_sha256 = run.inputs.base_sha256
            merged = usable_merge(run_dir / "merged", base.directory, run_dir / "adapter", base_sha256)
        merges = needs_merged and merged is None
        needed = _require_space(run_dir, folder.place, base, missing, adapter_bytes, keep_merged, merges, has_source)
        dropped = () if before is not None else folder.own
        with folder.staged(dropped) as staging:
            try:
                merged_dir = run_dir / "merged" if keep_merged or merged is not None else staging / "merged"
                if merges:
                    merged = work.merge(merged_dir, force=keep_merged)
                if merged is not None:
                    work.source = disk_space.source_type(base, merged.get("largest_changed_weight"))
                    work.convert(merged_dir, staging, missing)
                if merged_dir.parent == staging:
                    shutil.rmtree(merged_dir, ignore_errors=True)
                work.quantize(staging, missing)
                adapter_file = work.convert_adapter(staging) if lora else before.adapter_file if before else None
            except CheckError as error:  # the folder that it names is gone by the time that somebody reads it
                raise CheckError(error.message.replace(f"{staging}/", ""), remedy=error.remedy) from error
            (staging / _INTERMEDIATE.format(work.source)).unlink(missing_ok=True)
            record = work.describe(merged, adapter_file, needed)
            _write_texts(
                staging, record, run, run_dir, base, encoder, [] if force else folder.edited_texts(), folder.path, say
            )
    remember_digests(record, target)
    return record


def _usable_export(folder: ExportFolder, run: RunRecord, run_dir: Path) -> ExportRecord | None:
    """The export that is there, which must be of the run as it is now. Raises :class:`DataError`."""
    record = folder.stored()
    if record is not None:
        refuse_other_inputs(
            record,
            model=str(run.workload["name"]),
            base_sha256=run.inputs.base_sha256,
            tokenizer_sha256=run.inputs.tokenizer_sha256,
            adapter_sha256=run.adapter_sha256,
            adapter_config_sha256=read_adapter_config(run_dir / "adapter").digest(),
            llama_cpp_commit=COMMIT,
        )
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
        target: Path,
        before: ExportRecord | None,
    ) -> None:
        self.chat_template = chat_template
        self.run, self.run_dir, self.base, self.target, self.before = run, run_dir, base, target, before
        self.allow_fallback, self.progress = allow_fallback, progress
        self.name = str(run.workload["name"])
        self.steps: list[Step] = []
        self.notes: list[str] = list(before.notes) if before else []
        self.reports = {report.file_type: report for report in before.files} if before else {}
        self.source = "f16"  # what quantised files are made from

    def file_names(self, quantizations: Sequence[str], *, lora: bool) -> list[str]:
        """Names of the files that are made."""
        return [*map(self._file_name, quantizations), *([f"{self.name}-lora.gguf"] if lora else [])]

    def describe(
        self, merged: dict[str, Any] | None, adapter_file: gguf.GgufReport | None, needed_bytes: int
    ) -> ExportRecord:
        """The record of everything that the folder will hold."""
        if self.before is not None:
            if merged is not None and merged["merged_sha256"] != self.before.merged_sha256:
                made = ", ".join(name for name in self.reports if self.reports[name] not in self.before.files)
                self.notes.append(f"{made}: of a merge made again, {merged['merged_sha256']}, rounded otherwise")
            merged = self.before.merge
        assert merged is not None
        inputs, data, wanted = self.run.inputs, self.run.workload["data"], self.run.workload["export"]
        return ExportRecord(
            model=self.name,
            out_dir=str(self.target),
            base_sha256=inputs.base_sha256,
            tokenizer_sha256=inputs.tokenizer_sha256,
            adapter_sha256=merged["adapter_sha256"],
            merged_sha256=merged["merged_sha256"],
            merge=merged,
            files=list(self.reports.values()),
            adapter_file=adapter_file,
            modelfile_uses=min(self.reports.values(), key=lambda report: report.num_bytes).name,
            quantized_from=self.source,
            max_length=data.get("max_length"),
            system_prompt=data.get("system_prompt"),
            parameters=dict(wanted.get("parameters") or {}),
            needed_disk_bytes=needed_bytes,
            steps=self.steps,
            notes=self.notes,
        )

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
        """Convert and verify what is not quantised, and the 16-bit file that the rest is quantised from."""
        if self.source != "f16" and "f16" in quantizations:
            raise CheckError(
                "f16 cannot hold a weight of the merged model, which float16's range ends before",
                remedy="take bf16 in its place; quantised files are made from bf16 then",
            )
        converted = {name: staging / self._file_name(name) for name in quantizations if name not in QUANTIZED}
        if len(converted) < len(quantizations) and self.source not in self.reports:
            converted.setdefault(self.source, staging / _INTERMEDIATE.format(self.source))
        for name, path in converted.items():
            convert = partial(gguf.convert_to_gguf, model_name=self.name, chat_template=self.chat_template)
            report = self._make("convert", name, path, partial(convert, merged_dir, path, name))
            if name in quantizations:
                self.reports[name] = report

    def quantize(self, staging: Path, quantizations: Sequence[str]) -> None:
        """Quantise the 16-bit file, which may be of an export before, and verify each result."""
        places = [staging / _INTERMEDIATE.format(self.source)]
        places += [folder / self._file_name(self.source) for folder in (staging, self.target)]
        source = next((path for path in places if path.is_file()), places[0])
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
        model = next(p for p in (staging / smallest.name, self.target / smallest.name) if p.is_file())
        report, answer = gguf.measure_verification(path, adapter=True, base=model)
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
    has_source: bool,
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
        has_source=has_source,
    )
    require_free_bytes(target.parent, needed, "the export", _SPACE_REMEDY)
    return needed


def _write_texts(
    staging: Path,
    record: ExportRecord,
    run: RunRecord,
    run_dir: Path,
    base: ModelWeights,
    encoder: Encoder,
    edited: Sequence[str],
    target: Path,
    say: Progress,
) -> None:
    """Modelfile, card, record and sums. ``edited``: those in ``target`` that are the user's own by now and stay."""
    chatml = recognise_chatml(encoder)
    remarks = list(chatml.remarks) if chatml else [_NOT_CHATML]
    if chatml is None and encoder.is_dated:
        remarks.append(f"the chat template writes the date: trained with {encoder.template_date}, asked with today's")
    record.notes[:] = dict.fromkeys([*record.notes, *remarks])
    modelfile = write_modelfile(
        record.modelfile_uses,
        record.system_prompt,
        record.parameters,
        template=chatml_template(chatml.default_system, chatml.reply_opening) if chatml else None,
        stops=CHATML_STOPS if chatml else (),
        remarks=remarks,
    )
    write_text(staging / "Modelfile", modelfile)
    write_text(staging / "README.md", write_card(run, record, read_evaluation(run_dir, record), base.directory))
    content = asdict(record)
    del content["out_dir"]  # a path of this machine
    write_json(staging / RECORD, content)
    digests = {report.name: report.sha256 for report in record.all_files()}
    digests |= {name: sha256_file(staging / name) for name in (*TEXTS, RECORD)}
    for name in edited:
        say(f"{target / name} was changed by hand and stays as it is; --force writes it again")
        (staging / name).unlink()
        digests[name] = sha256_file(target / name)
    write_text(staging / SUMS, "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))
