"""What every subject of an evaluation is put to: held-out documents, prompts, questions."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from forge.training.config.workload import Workload
from forge.training.data.examples import Examples, load_examples
from forge.training.evaluation.answers import Prompt, document_prompts, greedy_answer, question_ids
from forge.training.evaluation.likelihood import Document, group_documents, measure_nats
from forge.training.evaluation.neutral_model import NeutralModel
from forge.training.evaluation.record import DocumentAnswer, DocumentResult, FactAnswer, SubjectResult
from forge.training.system.errors import DataError
from forge.training.train.record import RunRecord

_LN2 = 0.6931471805599453


@dataclass(frozen=True)
class Bench:
    """``examples`` is ``None`` where nothing was held out; then only the config's facts are asked."""

    workload: Workload
    tokenizer: Any
    examples: Examples | None
    documents: list[Document]
    prompts: list[Prompt]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a model will see."""
        examples = self.examples.input_ids if self.examples else []
        return max((len(ids) for ids in examples), default=0) + self.workload.evaluation.max_new_tokens


@dataclass(frozen=True)
class Measured:
    """One subject's raw results: nats by document, and its answers in the order of the questions."""

    subject: str
    nats: dict[str, float]
    answers: list[str]
    fact_answers: list[str]
    seconds: float


def prepare_bench(run: RunRecord, run_dir: Path, max_documents: int | None) -> Bench:
    """Read what a run held out. Raises :class:`DataError` if it is not what the record says, or nothing."""
    from forge.training.models.tokenizers import load_tokenizer

    try:
        workload = Workload.model_validate(run.workload)
    except ValidationError as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{run_dir / 'run.json'}: its config is of another version of Forge: {first}") from error
    expected = run.inputs.validation_examples_sha256
    if expected is None and not workload.evaluation.facts:
        raise DataError(
            f"{run_dir} held nothing out and its config asks for no facts: there is nothing to evaluate",
            remedy="train with data.validation or data.validation_share, or give evaluation.facts",
        )
    tokenizer = load_tokenizer(run.base_path)
    if expected is None:
        return Bench(workload, tokenizer, None, [], [])
    examples = load_examples(run_dir / "examples" / "validation")
    if examples.sha256 != expected:
        raise DataError(f"{run_dir / 'examples' / 'validation'} are not the examples of this run (digest differs)")
    documents = group_documents(examples, tokenizer, max_documents)
    asked = workload.evaluation
    prompts = document_prompts(
        examples, documents, tokenizer, num_prompts=asked.num_answers, max_new_tokens=asked.max_new_tokens
    )
    return Bench(workload, tokenizer, examples, documents, prompts)


def measure(subject: str, model: NeutralModel, bench: Bench) -> Measured:
    """Put one model to everything. Raises :class:`DataError` where a loss is not finite."""
    started = time.perf_counter()
    limit = bench.workload.evaluation.max_new_tokens
    nats = measure_nats(model, bench.examples, bench.documents, subject) if bench.examples else {}
    answers = [greedy_answer(model, bench.tokenizer, prompt.input_ids, limit) for prompt in bench.prompts]
    fact_answers = []
    for fact in bench.workload.evaluation.facts:
        ids = question_ids(bench.tokenizer, fact.question, bench.workload.data.system_prompt)
        fact_answers.append(greedy_answer(model, bench.tokenizer, ids, limit))
    return Measured(subject, nats, answers, fact_answers, time.perf_counter() - started)


def document_results(bench: Bench, measured: list[Measured]) -> list[DocumentResult]:
    """Each document with every subject's nats."""
    return [
        DocumentResult(
            document=document.name,
            num_tokens=document.num_tokens,
            num_bytes=document.num_bytes,
            nats={found.subject: found.nats[document.name] for found in measured},
        )
        for document in bench.documents
    ]


def document_answers(bench: Bench, found: Measured) -> list[DocumentAnswer]:
    """One subject's answers to the documents' instructions."""
    return [
        DocumentAnswer(subject=found.subject, document=prompt.document, answer=said, reference=prompt.reference)
        for prompt, said in zip(bench.prompts, found.answers, strict=True)
    ]


def fact_answers(bench: Bench, found: Measured) -> list[FactAnswer]:
    """One subject's answers to the facts' questions."""
    return [
        FactAnswer(
            subject=found.subject,
            question=fact.question,
            expected=fact.answer,
            answer=said,
            found=fact.answer in said,
        )
        for fact, said in zip(bench.workload.evaluation.facts, found.fact_answers, strict=True)
    ]


def subject_result(bench: Bench, found: Measured) -> SubjectResult:
    """One subject's figures over all documents, token-weighted."""
    result = SubjectResult(subject=found.subject, seconds=found.seconds)
    if bench.documents:
        nats = sum(found.nats.values())
        result.nats_per_token = nats / sum(document.num_tokens for document in bench.documents)
        result.bits_per_byte = nats / _LN2 / sum(document.num_bytes for document in bench.documents)
    if bench.prompts:
        from forge.training.evaluation.rouge import rouge

        scores = rouge(found.answers, [prompt.reference for prompt in bench.prompts])
        result.rouge1, result.rouge2, result.rouge_l = scores["rouge1"], scores["rouge2"], scores["rougeL"]
    if bench.workload.evaluation.facts:
        result.num_facts_found = sum(fact.found for fact in fact_answers(bench, found))
    return result
