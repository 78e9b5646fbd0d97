"""What every subject of an evaluation is put to: held-out documents, general text, prompts, questions."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forge.training.config.workload import Workload
from forge.training.data.conversation import Encoder, load_encoder
from forge.training.data.examples import Examples, load_examples
from forge.training.data.questions import holds_answer, question_ids
from forge.training.evaluation.answers import Prompt, document_prompts, greedy_answer
from forge.training.evaluation.forgetting import general_examples
from forge.training.evaluation.likelihood import Document, group_documents, measure_nats
from forge.training.evaluation.neutral_model import NeutralModel
from forge.training.evaluation.record import DocumentAnswer, FactAnswer, SubjectResult
from forge.training.models.weights import ModelWeights
from forge.training.system.errors import DataError
from forge.training.train.record import RunRecord


@dataclass(frozen=True)
class Bench:
    """``examples`` is ``None`` where nothing was held out; ``general`` where forgetting is not measured."""

    workload: Workload
    encoder: Encoder
    examples: Examples | None
    documents: list[Document]
    prompts: list[Prompt]
    general: Examples | None = None
    passages: list[Document] = field(default_factory=list)

    @property
    def tokenizer(self) -> Any:
        """The base's."""
        return self.encoder.tokenizer

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a model will see."""
        examples = [ids for each in (self.examples, self.general) if each for ids in each.input_ids]
        return max((len(ids) for ids in examples), default=0) + self.workload.evaluation.max_new_tokens


@dataclass(frozen=True)
class Measured:
    """One subject's results: its figures, nats by document and by passage, its answers in the order asked."""

    subject: SubjectResult
    nats: dict[str, float]
    general_nats: dict[str, float]
    answers: list[DocumentAnswer]
    facts: list[FactAnswer]


def has_anything_to_evaluate(run: RunRecord) -> bool:
    """Whether a run held documents out or its config asks for facts."""
    facts = Workload.model_validate(run.workload).evaluation.facts
    return run.inputs.validation_examples_sha256 is not None or bool(facts)


def prepare_bench(run: RunRecord, run_dir: Path, base: ModelWeights, max_documents: int | None) -> Bench:
    """Read what a run held out. Raises :class:`DataError` if it is not what the record says, or nothing."""
    workload = Workload.model_validate(run.workload)
    if not has_anything_to_evaluate(run):
        source = "data.validation_share" if workload.data.documents else "data.validation: `forge dataset --split`"
        raise DataError(
            f"{run_dir} held nothing out and its config asks for no facts: there is nothing to evaluate",
            remedy=f"hold documents out ({source}) or name evaluation.facts, and train again with --force; "
            f"`forge export {run_dir}` needs no evaluation",
        )
    encoder = load_encoder(base.directory, run.inputs.template_date)
    bench = _with_general_text(Bench(workload, encoder, None, [], []), base)
    expected = run.inputs.validation_examples_sha256
    if expected is None:
        return bench
    examples = load_examples(run_dir / "examples" / "validation")
    if examples.sha256 != expected:
        raise DataError(f"{run_dir / 'examples' / 'validation'} are not the examples of this run (digest differs)")
    documents = group_documents(examples, encoder.tokenizer, max_documents)
    wanted = workload.evaluation
    prompts = document_prompts(
        examples, documents, encoder, num_prompts=wanted.num_answers, max_new_tokens=wanted.max_new_tokens
    )
    return replace(bench, examples=examples, documents=documents, prompts=prompts)


def _with_general_text(bench: Bench, base: ModelWeights) -> Bench:
    if not bench.workload.evaluation.forgetting:
        return bench
    positions = base.config.get("max_position_embeddings")
    general = general_examples(bench.encoder, bench.workload.data.system_prompt, positions)
    return replace(bench, general=general, passages=group_documents(general, bench.tokenizer))


def measure(subject: str, model: NeutralModel, bench: Bench) -> Measured:
    """Put one model to everything. Raises :class:`DataError` where a loss is not finite."""
    started, workload = time.perf_counter(), bench.workload
    limit = workload.evaluation.max_new_tokens
    nats = measure_nats(model, bench.examples, bench.documents, subject) if bench.examples else {}
    general = measure_nats(model, bench.general, bench.passages, subject, "passage") if bench.general else {}
    answers = []
    for prompt in bench.prompts:
        text = greedy_answer(model, bench.tokenizer, prompt.input_ids, limit)
        answers.append(
            DocumentAnswer(subject=subject, document=prompt.document, answer=text, reference=prompt.reference)
        )
    facts = []
    for fact in workload.evaluation.facts:
        ids = question_ids(bench.encoder, fact.question, workload.data.system_prompt)
        text = greedy_answer(model, bench.tokenizer, ids, limit)
        facts.append(
            FactAnswer(
                subject=subject,
                question=fact.question,
                expected=fact.answer,
                answer=text,
                found=holds_answer(text, fact.answer),
            )
        )
    figures = SubjectResult(subject=subject, seconds=time.perf_counter() - started)
    if bench.documents:
        total = sum(nats.values())
        figures.nats_per_token = total / sum(document.num_tokens for document in bench.documents)
        figures.bits_per_byte = total / math.log(2) / sum(document.num_bytes for document in bench.documents)
    if bench.passages:
        figures.general_nats_per_token = sum(general.values()) / sum(each.num_tokens for each in bench.passages)
    if answers:
        from forge.training.evaluation.metrics import rouge

        scores = rouge([row.answer for row in answers], [row.reference for row in answers])
        figures.rouge1, figures.rouge2, figures.rouge_l = scores["rouge1"], scores["rouge2"], scores["rougeL"]
    if facts:
        from forge.training.evaluation.metrics import exact_match, rouge

        said, wanted = [fact.answer for fact in facts], [fact.expected for fact in facts]
        figures.num_facts_found = sum(fact.found for fact in facts)
        figures.facts_exact_match, figures.facts_rouge_l = exact_match(said, wanted), rouge(said, wanted)["rougeL"]
    return Measured(figures, nats, general, answers, facts)
