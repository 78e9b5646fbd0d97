"""The steps of an export, each in a process of its own, and what they cost. Their order is :mod:`.export`'s."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from forge.training.config.quantizations import GGUF_TYPES, QUANTIZED
from forge.training.evaluation.divergence import Divergence
from forge.training.export import disk_space, gguf
from forge.training.export.card import ExportRecord, Step
from forge.training.export.proof import Proof, importance_sequences
from forge.training.export.source import Source
from forge.training.llamacpp.parent import Answer, Progress, run_child, time_limit_seconds
from forge.training.models.weights import ModelWeights
from forge.training.system.errors import CheckError, MachineError
from forge.training.system.files import require_free_bytes

SPACE_REMEDY = "free space, choose another place with --out, or ask for fewer quantisations"
_INTERMEDIATE = "intermediate.{}.gguf"


class ExportSteps:
    """The steps, each in a process of its own, and what they cost."""

    def __init__(
        self,
        source: Source,
        run_dir: Path,
        base: ModelWeights,
        proof: Proof,
        target: Path,
        before: ExportRecord | None,
        progress: Progress,
        *,
        allow_fallback: bool,
        imatrix: bool,
    ) -> None:
        self.run, self.adapter_dir, self.run_dir, self.base = source.run, source.adapter_dir, run_dir, base
        self.proof, self.target, self.before, self.progress = proof, target, before, progress
        self.allow_fallback, self.uses_imatrix = allow_fallback, imatrix
        self.name = str(self.run.workload["name"])
        self.steps: list[Step] = []
        self.notes: list[str] = list(before.notes) if before else [source.remark] if source.remark else []
        self.merge_proof: dict[str, Any] = dict(before.merge_proof) if before else {}
        self.imatrix: dict[str, Any] | None = before.imatrix if before else None
        self.reports = {report.file_type: report for report in before.files} if before else {}
        self.source = "f16"  # what quantised files are made from
        self.fits_float16 = True  # every merged weight
        self._matrix: Path | None = None

    def file_names(self, quantizations: Sequence[str], *, lora: bool) -> list[str]:
        """Names of the files that are made."""
        return [*map(self._file_name, quantizations), *([f"{self.name}-lora.gguf"] if lora else [])]

    def choose_source(self, missing: Sequence[str]) -> None:
        """What quantised files are made from: the finest file that is there, else what will be made.

        A bf16 file is as coarse as the merge that was not used where rounding cost too much.
        """
        self.source = next((name for name in ("f32", "f16") if name in self.reports), "")
        if not self.source:
            self.source = disk_space.check_range(self.base, missing)
            if self.source == "bf16" and "float32" in self.merge_proof:
                self.source = "f32"

    def say_what_stays(self, quantizations: Sequence[str], *, is_complete: bool) -> None:
        """Files that are there and are not made again."""
        stays = [name for name in quantizations if name in self.reports]
        if self.reports and not is_complete:
            self.progress(f"{', '.join(self.reports)}: there already, and kept as it is")
        for name in stays:
            proof = self.reports[name].proof
            if self.uses_imatrix and GGUF_TYPES[name].uses_imatrix and (proof is None or not proof.uses_imatrix):
                self.progress(f"{name} was made without an importance matrix: --force makes everything again")

    def remove_intermediates(self, staging: Path) -> None:
        """What was only a step on the way."""
        for path in (*staging.glob(_INTERMEDIATE.format("*")), staging / "importance.npz"):
            path.unlink(missing_ok=True)

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
            merge_proof=self.merge_proof,
            imatrix=self.imatrix,
            needed_disk_bytes=needed_bytes,
            steps=self.steps,
            notes=self.notes,
        )

    def measure_reference(self, folder: Path) -> None:
        """The adapter's own predictions, which everything that is made is compared with."""
        try:
            answer = self.proof.measure_reference(self.adapter_dir, folder, self.progress)
        except MachineError as error:
            self.notes.append(f"predictions are not compared: {error.message}")
            self.progress(self.notes[-1])
            return
        self._count("adapter's predictions", answer, sum(path.stat().st_size for path in folder.iterdir()))
        if self.before is not None and (stored := self.before.merge_proof):
            self.proof.merge_kl = float((stored.get("float32") or stored["base type"])["mean_kl"])

    def measure_merge(self, merged_dir: Path, dtype: str) -> float:
        """Mean KL of the adapter's predictions to those of merged weights that are stored as ``dtype``."""
        self.progress("compare the merged weights with the adapter")
        found, answer = self.proof.measure_merge(merged_dir)
        self.merge_proof[dtype] = asdict(found)
        self._count(f"compare the merge ({dtype})", answer, 0)
        return found.mean_kl

    def merge(self, merged_dir: Path, *, force: bool, in_float32: bool = False) -> dict[str, Any]:
        """Merge the adapter into the run's base, which must be the one it was trained on."""
        self.progress("merge: comparing the base with the run's")
        arguments = {
            "base_dir": str(self.base.directory.absolute()),
            "adapter_dir": str(self.adapter_dir.absolute()),
            "out_dir": str(merged_dir.absolute()),
            "force": force,
            "in_float32": in_float32,
            "expected_base_sha256": self.run.inputs.base_sha256,
        }
        answer = run_child(
            "merge",
            arguments,
            doing=f"merge {self.adapter_dir}",
            limit_seconds=time_limit_seconds(4 * self.base.num_bytes),
            progress=self.progress,
        )
        name = "merge in float32" if in_float32 else "merge"
        self._count(name, answer, int(answer.value["num_bytes"]))
        return answer.value

    def convert(self, merged_dir: Path, staging: Path, quantizations: Sequence[str]) -> None:
        """Convert and verify what is not quantised, and the 16-bit file that the rest is quantised from."""
        if not self.fits_float16 and "f16" in quantizations:
            raise CheckError(
                "f16 cannot hold a weight of the merged model, which float16's range ends before",
                remedy="take bf16 in its place; quantised files are made from bf16 then",
            )
        converted = {name: staging / self._file_name(name) for name in quantizations if name not in QUANTIZED}
        if len(converted) < len(quantizations) and self.source not in self.reports:
            converted.setdefault(self.source, staging / _INTERMEDIATE.format(self.source))
        for name, path in converted.items():
            convert = partial(
                gguf.convert_to_gguf, model_name=self.name, chat_template=self.proof.encoder.tokenizer.chat_template
            )
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
                if self.uses_imatrix and GGUF_TYPES[name].uses_imatrix:
                    self.reports[name] = self._quantize_by_importance(source, path, name, staging)
                else:
                    self.reports[name] = self._make("quantise", name, path, partial(gguf.quantize, source, path, name))

    def _quantize_by_importance(self, source: Path, path: Path, name: str, staging: Path) -> gguf.GgufReport:
        """Quantise with the importance matrix and without; the file whose predictions are nearer is kept and proven."""
        matrix = self._importance(source, staging)
        if GGUF_TYPES[name].needs_imatrix or not self.proof.has_reference:
            quantize = partial(gguf.quantize, source, path, name, imatrix=matrix)
            return self._make("quantise", name, path, quantize, uses_imatrix=True)
        ways: list[tuple[Path, Divergence]] = []
        for way, given in (("without", None), ("with", matrix)):
            made = staging / f"{way}-imatrix.{name}.gguf"
            self.progress(f"quantise to {name} {way} the importance matrix, to compare")
            self._count(f"quantise {name} {way} imatrix", gguf.quantize(source, made, name, imatrix=given), 0)
            found, answer = self.proof.measure_file(made)
            self._count(f"compare {name} {way} imatrix", answer, 0)
            ways.append((made, found))
        helps = ways[1][1].mean_kl <= ways[0][1].mean_kl
        (kept, nearer), (left, farther) = ways[::-1] if helps else ways
        if not helps:
            self.notes.append(
                f"{path.name}: the importance matrix does not help (KL {farther.mean_kl:.2e} with it, "
                f"{nearer.mean_kl:.2e} without): made without it"
            )
        left.unlink()
        take = partial(self._rename, kept, path)
        return self._make("take", name, path, take, uses_imatrix=helps, measured=nearer, other_way=farther)

    def _rename(self, made: Path, path: Path) -> Answer:
        made.rename(path)
        return Answer({}, 0.0, 0)

    def _importance(self, source: Path, staging: Path) -> Path:
        """The importance matrix of the run's own training documents, collected once per export."""
        if self._matrix is None:
            sequences = importance_sequences(self.run, self.run_dir, self.base)
            self._matrix = staging / "importance.npz"
            num_tokens = sum(map(len, sequences))
            self.progress(f"importance matrix: {num_tokens:,} tokens of the training documents")
            answer = gguf.collect_importance(source, self._matrix, sequences, self.progress)
            self.imatrix = {**answer.value, "text": "training documents", "num_sequences": len(sequences)}
            self._count("importance matrix", answer, self._matrix.stat().st_size)
        return self._matrix

    def convert_adapter(self, staging: Path) -> gguf.GgufReport:
        """The adapter as GGUF, checked by applying it to the smallest model file: the shapes are those of the base."""
        self.progress("convert the adapter")
        path = staging / f"{self.name}-lora.gguf"
        answer = gguf.convert_lora_to_gguf(self.adapter_dir, self.base.directory, path)
        self._count("convert adapter", answer, path.stat().st_size)
        smallest = min(self.reports.values(), key=lambda report: report.num_bytes)
        model = next(p for p in (staging / smallest.name, self.target / smallest.name) if p.is_file())
        report, answer = gguf.measure_verification(path, adapter=True, base=model)
        self._count("verify adapter", answer, 0)
        return report

    def _make(
        self,
        verb: str,
        quantization: str,
        path: Path,
        step: Callable[[], Answer],
        *,
        uses_imatrix: bool = False,
        measured: Divergence | None = None,
        other_way: Divergence | None = None,
    ) -> gguf.GgufReport:
        """Make one file, verify it and prove it. ``measured``: its predictions, where they were compared before."""
        self.progress(f"{verb} to {quantization}")
        # asked again before every file: others write to the disk too
        num_bytes = disk_space.with_margin(disk_space.file_bytes(self.base, quantization))
        require_free_bytes(path.parent, num_bytes, f"the {quantization} file", SPACE_REMEDY)
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
        self.progress(f"compare {path.name} with the adapter")
        started = time.monotonic()
        proof, peak_bytes = self.proof.prove(
            path, quantization, measured=measured, uses_imatrix=uses_imatrix, other_way=other_way
        )
        self._count(f"prove {quantization}", Answer({}, time.monotonic() - started, peak_bytes), 0)
        if not path.name.startswith("intermediate."):
            self.notes += [f"{path.name}: {flag}" for flag in proof.flags]
        return replace(report, proof=proof)

    def _file_name(self, quantization: str) -> str:
        return f"{self.name}.{quantization}.gguf"

    def _count(self, name: str, answer: Answer, num_bytes: int) -> None:
        self.steps.append(Step(name, round(answer.seconds, 3), num_bytes, answer.peak_rss_bytes))
