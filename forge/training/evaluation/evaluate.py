"""Judge a run on held-out documents: base, adapter and merged model, in a process without Unsloth.

The adapter is put on the original 16-bit weights, as it is exported, not on the 4-bit ones it was
trained on (``adapter-nf4`` is that).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forge.training.evaluation import neutral_model as neutral
from forge.training.evaluation.record import Evaluation, compare, print_evaluation
from forge.training.system.errors import ConfigurationError, DataError
from forge.training.system.files import disk_errors, locked, refuse_existing, write_json
from forge.training.system.oom import memory_errors
from forge.training.train.record import RunRecord, completed_record

if TYPE_CHECKING:
    from forge.training.evaluation.bench import Bench, Measured
    from forge.training.models.weights import ModelWeights

__all__ = ["SUBJECTS", "evaluate_run", "print_evaluation"]
SUBJECTS = ("base", "adapter", "adapter-nf4", "merged")
_PAIRS = (("adapter", "base"), ("merged", "base"), ("merged", "adapter"), ("adapter", "adapter-nf4"))
Progress = Callable[[str], None]


def evaluate_run(
    run_dir: Path | str,
    *,
    subjects: Sequence[str] = ("base", "adapter", "merged"),
    device: str | None = None,
    max_documents: int | None = None,
    force: bool = False,
    merged_dir: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure ``subjects`` on a completed run's held-out documents and write ``run_dir/evaluation.json``.

    ``device``: cpu or cuda, by default CUDA where there is a GPU. ``merged_dir``: the merged model;
    by default ``run_dir/merged``, or a merge made now and removed afterwards. Raises :class:`ConfigurationError`,
    :class:`DataError` (run, base, tokenizer, adapter or examples are not what the record says; a loss is
    not finite), :class:`MachineError`, :class:`GpuMemoryError`, :class:`DiskError`, :class:`LockedError`.
    """
    neutral.refuse_unsloth()
    run_dir = Path(run_dir)
    run = completed_record(run_dir)
    unknown = [name for name in subjects if name not in SUBJECTS]
    if unknown or not subjects:
        message = f"unknown subject {unknown[0]!r}" if unknown else "no subject was asked for"
        raise ConfigurationError(message, remedy=f"choose from {', '.join(SUBJECTS)}")
    refuse_existing(run_dir / "evaluation.json", force)
    with locked(run_dir), memory_errors("the evaluation"):
        from forge.training.adapter.provenance import read_own_base, require_own_adapter, require_own_base
        from forge.training.evaluation.bench import prepare_bench

        run = completed_record(run_dir)  # nobody can be training into it any more
        _clear_leftovers(run_dir)
        base = read_own_base(run)
        require_own_adapter(run, run_dir, base)
        require_own_base(base.directory, run.inputs.base_sha256)
        bench = prepare_bench(run, run_dir, max_documents)
        placement = neutral.choose_placement(base, bench.longest, device)
        models = _Models(run, run_dir, base, placement, merged_dir, progress or (lambda _: None))
        measured = models.measure_each(subjects, bench)
        evaluation = _summarise(run, bench, measured, models)
        write_json(run_dir / "evaluation.json", evaluation.model_dump(mode="json"))
    return evaluation


def _clear_leftovers(run_dir: Path) -> None:
    """Remove what a killed evaluation left: the lock is ours."""
    for left in (*run_dir.glob(".merged.*.part"), *run_dir.glob(".evaluation.json.*.part")):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@dataclass
class _Models:
    """Loads one model after another and has each measured; base and adapter share the same weights."""

    run: RunRecord
    run_dir: Path
    base: ModelWeights
    placement: neutral.Placement
    given_merged_dir: Path | None
    say: Progress
    merged_sha256: str | None = None

    def measure_each(self, subjects: Sequence[str], bench: Bench) -> list[Measured]:
        """Results in the order of :data:`SUBJECTS`. One model at a time is in memory."""
        from forge.training.evaluation.bench import measure

        adapter_dir, measured = self.run_dir / "adapter", {}

        def put(subject: str, model: neutral.NeutralModel) -> None:
            self.say(f"evaluate {subject}: {len(bench.documents)} documents on {self.placement.device}")
            measured[subject] = measure(subject, model, bench)

        if "base" in subjects or "adapter" in subjects:
            model = neutral.load_model(self.base.directory, self.placement)
            if "base" in subjects:
                put("base", model)
            if "adapter" in subjects:
                model = neutral.with_adapter(model, adapter_dir, self.placement)
                put("adapter", model)
            del model
            neutral.release_memory()
        if "adapter-nf4" in subjects:
            model = neutral.load_model(self.base.directory, self.placement, nf4_dtype=bench.workload.model.dtype)
            model = neutral.with_adapter(model, adapter_dir, self.placement)
            put("adapter-nf4", model)
            del model
            neutral.release_memory()
        if "merged" in subjects:
            with self._merged_model() as directory:
                put("merged", neutral.load_model(directory, self.placement))
        return [measured[subject] for subject in SUBJECTS if subject in measured]

    @contextmanager
    def _merged_model(self) -> Iterator[Path]:
        """The merged model's directory; without one of this base and adapter, a merge that is removed afterwards."""
        from forge.training.adapter.merge import merge_adapter, usable_merge

        directory, adapter_dir = self.given_merged_dir or self.run_dir / "merged", self.run_dir / "adapter"
        base_dir, base_sha256 = self.base.directory, self.run.inputs.base_sha256
        merged = usable_merge(directory, base_dir, adapter_dir, base_sha256)
        if merged is not None:
            self.merged_sha256 = str(merged["merged_sha256"])
            yield directory
            return
        if self.given_merged_dir is not None:
            raise DataError(f"{directory} was not merged from this run's base and adapter, or was changed since")
        with _scratch(self.run_dir) as scratch:
            record = merge_adapter(
                base_dir, adapter_dir, scratch / "merged", expected_base_sha256=base_sha256, progress=self.say
            )
            self.merged_sha256 = record.merged_sha256
            yield scratch / "merged"


@contextmanager
def _scratch(run_dir: Path) -> Iterator[Path]:
    with disk_errors(run_dir):
        directory = Path(tempfile.mkdtemp(dir=run_dir, prefix=".merged.", suffix=".part"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _summarise(run: RunRecord, bench: Bench, measured: list[Measured], models: _Models) -> Evaluation:
    from forge.training.evaluation import bench as results
    from forge.training.system.environment import describe_environment

    documents = results.document_results(bench, measured)
    done = {found.subject for found in measured}
    notes = [] if documents else ["nothing was held out: no loss and no ROUGE, only facts"]
    if models.placement.note:
        notes.append(models.placement.note)
    return Evaluation(
        subjects=[results.subject_result(bench, found) for found in measured],
        comparisons=[compare(documents, *pair) for pair in _PAIRS if documents and done.issuperset(pair)],
        num_documents=len(documents),
        num_tokens=sum(row.num_tokens for row in documents),
        num_bytes=sum(row.num_bytes for row in documents),
        documents=documents,
        answers=[answer for found in measured for answer in results.document_answers(bench, found)],
        facts=[fact for found in measured for fact in results.fact_answers(bench, found)],
        base_sha256=run.inputs.base_sha256,
        adapter_sha256=str(run.adapter_sha256),
        merged_sha256=models.merged_sha256,
        validation_examples_sha256=run.inputs.validation_examples_sha256,
        device=models.placement.device,
        dtype=models.placement.dtype,
        environment=describe_environment(with_torch=True),
        notes=notes,
    )
