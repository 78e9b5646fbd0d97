"""What the model answers: while it was trained, before and after, and as GGUF."""

from __future__ import annotations

from forge.training.report.page.content import Part, Row, Section, Table
from forge.training.report.run_files import RunFiles

_NOTHING = "(nothing)"


def build(files: RunFiles) -> Section:
    """A table per question. Empty where nothing was asked."""
    parts: list[Part] = [*_facts(files), *_documents(files), *_samples(files)]
    intro = "Greedy answers: the most probable token each time." if parts else ""
    return Section("answers", "Answers", intro, tuple(parts))


def _facts(files: RunFiles) -> list[Part]:
    asked: dict[str, list[tuple[str, str, bool | None]]] = {}
    expected = {str(fact["question"]): str(fact["answer"]) for fact in files.config["evaluation"]["facts"]}
    for row in files.evaluation.facts if files.evaluation is not None else ():
        asked.setdefault(row.question, []).append((row.subject, row.answer, row.found))
        expected[row.question] = row.expected
    for answer in files.gguf_answers:
        asked.setdefault(answer.question, []).append((answer.model, answer.answer, answer.found))
    verdicts = {True: "yes", False: "no", None: ""}
    tables: list[Part] = []
    for question, answers in asked.items():
        fact = expected.get(question)
        if fact is None:
            rows = tuple(Row((model, _text(answer))) for model, answer, _ in answers)
            tables.append(Table(f"Asked: {question}", ("Model", "Answer"), rows, texts=2))
            continue
        rows = tuple(Row((model, _text(answer), verdicts[found])) for model, answer, found in answers)
        columns = ("Model", "Answer", f"Says {fact}")
        tables.append(Table(f"Asked: {question}", columns, rows, texts=3))
    return tables


def _documents(files: RunFiles) -> list[Part]:
    """Of each held-out document that was asked for: its own beginning, and what each model makes of it."""
    by_document: dict[str, list[Row]] = {}
    for row in files.evaluation.answers if files.evaluation is not None else ():
        rows = by_document.setdefault(row.document, [Row(("the document itself", _text(row.reference)))])
        rows.append(Row((row.subject, _text(row.answer))))
    return [
        Table(f"Asked for the held-out document {name}", ("Model", "Text"), tuple(rows), texts=2)
        for name, rows in by_document.items()
    ]


def _samples(files: RunFiles) -> list[Part]:
    """One table per question; a resume under another config may have asked another."""
    by_question: dict[str, list[Row]] = {}
    for sample in files.log.samples:
        by_question.setdefault(sample.question, []).append(Row((f"step {sample.step:,}", _text(sample.answer))))
    return [
        Table(f"While training, asked: {question}", ("After", "Answer"), tuple(rows), texts=2)
        for question, rows in by_question.items()
    ]


def _text(answer: str) -> str:
    return answer.strip() or _NOTHING
