"""Judge a run on held-out documents: base, adapter and merged model, in a process without Unsloth.

The adapter is put on the original 16-bit weights, as it is exported, not on the 4-bit ones it was
trained on (``adapter-nf4`` is that).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.training.adapter.merge import merge_adapter, usable_merge
from forge.training.adapter.provenance import read_own_base, require_own_adapter, require_own_base
from forge.training.config.workload import Workload
from forge.training.evaluation import neutral_model as neutral
from forge.training.evaluation.bench import Bench, Measured, has_anything_to_evaluate, measure, prepare_bench
from forge.training.evaluation.forgetting import passages_sha256
from forge.training.evaluation.likelihood import Document
from forge.training.evaluation.record import DocumentResult, Evaluation, compare, load_evaluation, print_evaluation
from forge.training.models.weights import ModelWeights
from forge.training.system.environment import describe_environment
from forge.training.system.errors import ConfigurationError, DataError
from forge.training.system.files import disk_errors, locked, remove, sha256_json, write_json
from forge.training.system.oom import memory_errors
from forge.training.train.record import RunRecord, completed_record, read_record

__all__ = [
    "DEFAULT_SUBJECTS",
    "SUBJECTS",
    "evaluate_run",
    "has_anything_to_evaluate",
    "print_evaluation",
    "shown_evaluation",
    "stored_evaluation",
]
SUBJECTS = ("base", "adapter", "adapter-nf4", "merged")
DEFAULT_SUBJECTS = ("base", "adapter", "merged")
_PAIRS = (("adapter", "base"), ("merged", "base"), ("merged", "adapter"), ("adapter", "adapter-nf4"))
Progress = Callable[[str], None]


def evaluate_run(
    run_dir: Path | str,
    *,
    subjects: Sequence[str] = DEFAULT_SUBJECTS,
    device: str | None = None,
    max_documents: int | None = None,
    base_dir: Path | None = None,
    force: bool = False,
    keep_merged: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure ``subjects`` on a completed run's held-out documents and write ``run_dir/evaluation.json``.

    Returns what is there already if it is of the same content and answers what is asked; ``force`` measures again.
    ``device``: cpu or cuda, by default CUDA where there is a GPU. ``base_dir``: where the run's base is now.
    The merged model is that in ``run_dir/merged`` if it is of this base and adapter, else it is merged now, there where
    ``keep_merged`` is given and the place is free, otherwise for the occasion. Raises
    :class:`ConfigurationError`, :class:`DataError` (run, base, tokenizer, adapter or examples are not what the record
    says; an evaluation of something else is there; a loss is not finite), :class:`MachineError`,
    :class:`GpuMemoryError`, :class:`DiskError`, :class:`LockedError`.
    """
    neutral.refuse_unsloth()
    run_dir, say = Path(run_dir), progress or (lambda _: None)
    run = completed_record(run_dir)
    unknown = [name for name in subjects if name not in SUBJECTS]
    if unknown or not subjects:
        message = f"unknown subject {unknown[0]!r}" if unknown else "no subject was asked for"
        raise ConfigurationError(message, remedy=f"choose from {', '.join(SUBJECTS)}")
    with locked(run_dir), memory_errors("the evaluation"):
        run = completed_record(run_dir)  # nobody can be training into it any more
        for leftover in (*run_dir.glob(".merged.*.part"), *run_dir.glob(".evaluation.json.*.part")):
            remove(leftover)  # of an evaluation that was killed: the lock is ours
        base = read_own_base(run, base_dir)
        require_own_adapter(run, run_dir, base)
        require_own_base(base.directory, run.inputs.base_sha256)
        stored = None if force else stored_evaluation(run, run_dir, subjects, device, max_documents)
        if stored is not None:
            say(f"{run_dir / 'evaluation.json'} is of the same run and questions: not measured again")
            return stored
        bench = prepare_bench(run, run_dir, base, max_documents)
        placement = neutral.choose_placement(base, bench.longest, device)
        models = _Models(run, run_dir, base, placement, keep_merged, say)
        measured = models.measure_each(subjects, bench)
        evaluation = _summarise(run, bench, measured, models, max_documents)
        write_json(run_dir / "evaluation.json", evaluation.model_dump(mode="json"))
    return evaluation


def stored_evaluation(
    run: RunRecord, run_dir: Path, subjects: Sequence[str], device: str | None, max_documents: int | None
) -> Evaluation | None:
    """The evaluation that is there, ``None`` if there is none. Raises :class:`DataError` if it is of something else."""
    path = run_dir / "evaluation.json"
    if not path.exists():
        return None
    both_ways = "measure again with --force, which replaces it, or move it away"
    stored = load_evaluation(path, remedy=both_ways)
    now: dict[str, Any] = {
        "base_sha256": run.inputs.base_sha256,
        "adapter_sha256": run.adapter_sha256,
        "validation_examples_sha256": run.inputs.validation_examples_sha256,
        "questions_sha256": _questions_sha256(run),
        "max_documents": max_documents,
    }
    now |= {"device": device} if device is not None else {}
    changed = [
        f"  {name.replace('_', ' ')}: {getattr(stored, name)} -> {value}"
        for name, value in now.items()
        if getattr(stored, name) != value
    ]
    before = [each.subject for each in stored.subjects]
    if not set(subjects) <= set(before):
        changed.append(f"  subjects: {', '.join(before)} -> {', '.join(subjects)}")
    if changed:
        raise DataError(f"{path} was measured otherwise:\n" + "\n".join(changed), remedy=both_ways)
    return stored


def shown_evaluation(run_dir: Path | str) -> Evaluation:
    """What ``run_dir/evaluation.json`` holds, of the run's own adapter; nothing is measured, and no base is needed.

    Raises :class:`DataError` if there is no such run or evaluation, or if it is of another adapter.
    """
    run_dir = Path(run_dir)
    run, path = read_record(run_dir), run_dir / "evaluation.json"
    if not path.exists():
        raise DataError(f"{run_dir} was not evaluated yet", remedy="without --show it is evaluated now")
    stored = load_evaluation(path, remedy="measure again: forge evaluate RUN --force")
    if stored.adapter_sha256 != run.adapter_sha256:
        raise DataError(
            f"{path} is of another adapter than this run's", remedy="measure again: forge evaluate RUN --force"
        )
    return stored


def _questions_sha256(run: RunRecord) -> str:
    workload = Workload.model_validate(run.workload)
    asked = [workload.evaluation.model_dump(mode="json"), workload.data.system_prompt]
    return sha256_json([*asked, passages_sha256()] if workload.evaluation.forgetting else asked)


@dataclass
class _Models:
    """Loads one model after another and has each measured; base and adapter share the same weights."""

    run: RunRecord
    run_dir: Path
    base: ModelWeights
    placement: neutral.Placement
    keep_merged: bool
    say: Progress
    merged_sha256: str | None = None

    def measure_each(self, subjects: Sequence[str], bench: Bench) -> list[Measured]:
        """Results in the order of :data:`SUBJECTS`. One model at a time is in memory."""
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
        """The directory of the merged model; where there is none of this base and adapter, one for the occasion."""
        directory, adapter_dir = self.run_dir / "merged", self.run_dir / "adapter"
        base_dir, base_sha256 = self.base.directory, self.run.inputs.base_sha256
        merged = usable_merge(directory, base_dir, adapter_dir, base_sha256)
        if merged is not None:
            self.merged_sha256 = str(merged["merged_sha256"])
            yield directory
            return
        with ExitStack() as stack:
            if not self.keep_merged or directory.exists():
                with disk_errors(self.run_dir):
                    scratch = tempfile.TemporaryDirectory(dir=self.run_dir, prefix=".merged.", suffix=".part")
                directory = Path(stack.enter_context(scratch)) / "merged"
            record = merge_adapter(
                base_dir, adapter_dir, directory, expected_base_sha256=base_sha256, progress=self.say
            )
            self.merged_sha256 = record.merged_sha256
            yield directory


def _summarise(
    run: RunRecord, bench: Bench, measured: list[Measured], models: _Models, max_documents: int | None
) -> Evaluation:
    documents = _by_document(bench.documents, {each.subject.subject: each.nats for each in measured})
    passages = _by_document(bench.passages, {each.subject.subject: each.general_nats for each in measured})
    done = {each.subject.subject for each in measured}
    notes = [] if documents else ["nothing was held out: no loss and no ROUGE, only facts"]
    if models.placement.note:
        notes.append(models.placement.note)
    return Evaluation(
        subjects=[each.subject for each in measured],
        comparisons=[compare(documents, *pair) for pair in _PAIRS if documents and done.issuperset(pair)],
        general_text=passages,
        general_comparisons=[compare(passages, *pair) for pair in _PAIRS if passages and done.issuperset(pair)],
        num_documents=len(documents),
        num_tokens=sum(row.num_tokens for row in documents),
        num_bytes=sum(row.num_bytes for row in documents),
        documents=documents,
        answers=[answer for each in measured for answer in each.answers],
        facts=[fact for each in measured for fact in each.facts],
        base_sha256=run.inputs.base_sha256,
        adapter_sha256=str(run.adapter_sha256),
        merged_sha256=models.merged_sha256,
        validation_examples_sha256=run.inputs.validation_examples_sha256,
        questions_sha256=_questions_sha256(run),
        max_documents=max_documents,
        device=models.placement.device,
        dtype=models.placement.dtype,
        environment=describe_environment(with_torch=True),
        notes=notes,
    )


def _by_document(documents: Sequence[Document], nats: Mapping[str, Mapping[str, float]]) -> list[DocumentResult]:
    """``nats``: by subject, of each document by its name."""
    return [
        DocumentResult(
            document=document.name,
            num_tokens=document.num_tokens,
            num_bytes=document.num_bytes,
            nats={subject: each[document.name] for subject, each in nats.items()},
        )
        for document in documents
    ]
