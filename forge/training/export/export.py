"""A run's adapter -> merged weights -> GGUF files, verified, with all that is needed to use them.

Files appear in the folder only when everything that was asked for is complete and verified. What an earlier export of
the same run made is used and kept: one more quantisation costs only itself. Intermediate files are deleted as soon as
they have been used.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forge.training.adapter.adapter_config import read_adapter_config
from forge.training.adapter.merge import float32_bytes, usable_merge
from forge.training.adapter.provenance import read_own_base, require_own_adapter
from forge.training.config.quantizations import QUANTIZED
from forge.training.data.conversation import Encoder, load_encoder
from forge.training.export import disk_space
from forge.training.export.card import ExportRecord, read_evaluation, write_card
from forge.training.export.chat_template import recognise_chatml
from forge.training.export.folder import RECORD, SUMS, TEXTS, ExportFolder, refuse_other_inputs, remember_digests
from forge.training.export.modelfile import CHATML_STOPS, chatml_template, write_modelfile
from forge.training.export.proof import proof_of
from forge.training.export.source import Source, source_of
from forge.training.export.steps import SPACE_REMEDY, ExportSteps
from forge.training.llamacpp.install import COMMIT, require_llama_cpp
from forge.training.llamacpp.parent import Progress
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

MOST_MERGE_KL = 1e-3  # nats that rounding the merged weights to the base's type may cost
_NOT_CHATML = "the chat template is not ChatML: the Modelfile leaves the template to the GGUF file's own"


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
    imatrix: bool = False,
    checkpoint: str | None = None,
    progress: Progress | None = None,
) -> ExportRecord:
    """Export a completed run, or add what is missing to an export of it that is there.

    ``base_dir``: where the run's base is now. ``force`` makes everything again and removes what the export before made,
    no other file. ``keep_merged`` leaves the merged weights in ``run_dir/merged``; a merge already there is used if it
    is of the same base and adapter. ``imatrix``: quantised by an importance matrix of the training documents.
    ``checkpoint``: of a run that is not finished, see :func:`~forge.training.export.source.source_of`. Everything that
    can be refused is refused first: :class:`ConfigurationError`, :class:`DataError` (also for an export that was made
    from something else), :class:`MachineError` and :class:`DiskError` with the bytes needed. :class:`CheckError` if a
    file fails its checks.
    """
    disk_space.check_quantizations(quantizations, imatrix=imatrix)
    run_dir, say = Path(run_dir), progress or (lambda _: None)
    with source_of(run_dir, checkpoint) as source:
        target = out_dir or run_dir / ("export" if checkpoint is None else f"export-{source.suffix}")
        folder = ExportFolder.look(target)
        base = read_own_base(source.run, base_dir)
        disk_space.check_architecture(base)
        encoder = load_encoder(base.directory, source.run.inputs.template_date)
        require_llama_cpp()
        if not allow_fallback:
            disk_space.check_row_sizes(base, quantizations)
        with locked(run_dir):
            if checkpoint is None:
                source = Source(completed_record(run_dir), source.adapter_dir)  # nobody is training into it any more
            if source.remark:
                say(source.remark)
            adapter_bytes = require_own_adapter(source.run, run_dir, base, source.adapter_dir)
            for directory in (folder.place, run_dir / "merged"):
                clear_leftovers(directory)
            before = None if force else _usable_export(folder, source)
            proof = proof_of(source.run, run_dir, base, encoder)
            work = ExportSteps(
                source, run_dir, base, proof, target, before, say, allow_fallback=allow_fallback, imatrix=imatrix
            )
            record = _make_missing(
                work, folder, quantizations, adapter_bytes, lora=lora, force=force, keep_merged=keep_merged
            )
    if record is not before:
        remember_digests(record, target)
    return record


def _make_missing(
    work: ExportSteps,
    folder: ExportFolder,
    quantizations: Sequence[str],
    adapter_bytes: int,
    *,
    lora: bool,
    force: bool,
    keep_merged: bool,
) -> ExportRecord:
    """Make what of an export is not there yet, and move it in."""
    base, before, say, run_dir = work.base, work.before, work.progress, work.run_dir
    missing = [name for name in quantizations if name not in work.reports]
    lora = lora and (before is None or before.adapter_file is None)
    folder.refuse_taken([*TEXTS, RECORD, SUMS, *work.file_names(missing, lora=lora)])
    work.say_what_stays(quantizations, is_complete=not (missing or lora or keep_merged))
    if before is not None and not (missing or lora or keep_merged):
        say(f"{folder.path} is complete: nothing to do")
        return before
    # a weight that float16 cannot hold; the f16 file of an export before shows that there is none
    work.choose_source(missing)
    has_source = work.source in work.reports or not any(name in QUANTIZED for name in missing)
    needs_merged = keep_merged or not has_source or any(name not in QUANTIZED for name in missing)
    merged = None
    if needs_merged:
        merged = usable_merge(run_dir / "merged", base.directory, work.adapter_dir, work.run.inputs.base_sha256)
    merges = needs_merged and merged is None
    needed = _require_space(run_dir, folder.place, base, missing, adapter_bytes, keep_merged, merges, has_source)
    if merges and base.num_bytes < float32_bytes(base):
        more = disk_space.float32_peak_bytes(base, missing) - needed
        say(f"disk: {needed / 1e9:.2f} GB, {more / 1e9:.2f} GB more if rounding to 16 bits costs what was learnt")
    dropped = () if before is not None else folder.own
    with folder.staged(dropped) as staging:
        try:
            merged_dir = run_dir / "merged" if keep_merged or merged is not None else staging / "merged"
            with work.proof.open_reference():
                if missing:
                    work.measure_reference(staging / "reference")
                if merges:
                    merged = work.merge(merged_dir, force=keep_merged)
                if merged is not None and missing:
                    merged_dir = _spare_from_rounding(work, merged_dir, staging, merged, missing)
            if merged is not None and missing:
                work.convert(merged_dir, staging, missing)
            if merged_dir.parent == staging:
                shutil.rmtree(merged_dir, ignore_errors=True)
            work.quantize(staging, missing)
            adapter_file = work.convert_adapter(staging) if lora else before.adapter_file if before else None
        except CheckError as error:  # the folder that it names is gone by the time that somebody reads it
            raise CheckError(error.message.replace(f"{staging}/", ""), remedy=error.remedy) from error
        shutil.rmtree(staging / "reference", ignore_errors=True)
        shutil.rmtree(staging / "merged-float32", ignore_errors=True)
        work.remove_intermediates(staging)
        record = work.describe(merged, adapter_file, needed)
        _write_texts(
            staging,
            record,
            work.run,
            run_dir,
            base,
            work.proof.encoder,
            [] if force else folder.edited_texts(),
            folder.path,
            say,
        )
    return record


def _spare_from_rounding(
    work: ExportSteps, merged_dir: Path, staging: Path, merged: dict[str, Any], missing: Sequence[str]
) -> Path:
    """Where the weights that files are made from are: in float32 where rounding to the base's type costs too much."""
    base, largest = work.base, merged.get("largest_changed_weight")
    finest = disk_space.source_type(base, largest)
    work.fits_float16 = finest == "f16"
    if work.source not in work.reports:
        work.source = finest
    if not work.proof.has_reference:
        return merged_dir
    cost = work.measure_merge(merged_dir, "base type")
    if cost <= MOST_MERGE_KL or base.num_bytes == float32_bytes(base):
        return merged_dir
    note = f"rounding the merged weights to the base's type costs {cost:.1e} nats"
    work.progress(f"{note}: merged again in float32")
    needed = disk_space.float32_peak_bytes(base, missing)
    if merged_dir.parent == staging:
        shutil.rmtree(merged_dir)
    require_free_bytes(staging, needed, "the merge in float32 and what is made from it", SPACE_REMEDY)
    wide = staging / "merged-float32"
    record = work.merge(wide, force=False, in_float32=True)
    better = work.measure_merge(wide, "float32")
    work.merge_proof["float32_sha256"] = record["merged_sha256"]
    work.notes.append(f"{note}: the files are made from a merge in float32, which costs {better:.1e}")
    work.source = "f32"
    return wide


def _usable_export(folder: ExportFolder, source: Source) -> ExportRecord | None:
    """The export that is there, which must be of the run as it is now. Raises :class:`DataError`."""
    record, run = folder.stored(), source.run
    if record is not None:
        refuse_other_inputs(
            record,
            model=str(run.workload["name"]),
            base_sha256=run.inputs.base_sha256,
            tokenizer_sha256=run.inputs.tokenizer_sha256,
            adapter_sha256=run.adapter_sha256,
            adapter_config_sha256=read_adapter_config(source.adapter_dir).digest(),
            llama_cpp_commit=COMMIT,
        )
    return record


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
        require_free_bytes(run_dir, disk_space.with_margin(base.num_bytes), "the merged model", SPACE_REMEDY)
    needed = disk_space.peak_disk_bytes(
        base,
        quantizations,
        adapter_bytes=adapter_bytes,
        writes_merged=writes_merged and not merges_elsewhere,
        keeps_merged=keeps_merged,
        has_source=has_source,
    )
    require_free_bytes(target.parent, needed, "the export", SPACE_REMEDY)
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
