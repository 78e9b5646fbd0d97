"""Whether the documents can be read, and whether anything is held out and kept apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from forge.training.checks.finding import Finding, ok, warning
from forge.training.errors import DataError
from forge.training.workload import Workload


def check_data(workload: Workload) -> Iterator[Finding]:
    """Raises :class:`DataError` for what cannot be read."""
    yield from _check_records(workload) if workload.data.train is not None else _check_documents(workload)
    holds_out = workload.data.validation or (workload.data.documents and workload.data.validation_share)
    if holds_out:
        return
    if workload.training.evaluate_every_steps:
        raise DataError(
            "training.evaluate_every_steps is set and there is no validation set",
            remedy="give data.validation, or a data.validation_share with data.documents",
        )
    lost = "" if workload.evaluation.facts else " and has no facts to ask: `evaluate` will refuse it"
    yield warning("data", f"the workload holds nothing out{lost}", "give data.validation or data.validation_share")


def _check_documents(workload: Workload) -> Iterator[Finding]:
    from forge.training.data.corpus import embedded_documents
    from forge.training.data.discovery import Candidate, discover

    assert workload.data.documents is not None
    is_embedded = workload.data.documents == "embedded"
    root = (embedded_documents() if is_embedded else Path(workload.data.documents)).resolve()
    if not root.is_dir():
        raise DataError(f"data.documents: {root} is no directory", remedy="name the folder of your documents")
    num_files = sum(isinstance(found, Candidate) for found in discover(root, exclude=lambda _: False))
    needed = 2 if workload.data.validation_share else 1
    if num_files < needed:
        raise DataError(f"data.documents: {root} holds {num_files} files to read, {needed} are needed")
    yield ok("data", f"{num_files:,} files in {'the embedded documents' if is_embedded else root}")


def _check_records(workload: Workload) -> Iterator[Finding]:
    from forge.training.data.records import Record, read_records

    def read(path: Path) -> list[Record]:
        records = read_records(path)
        if not records:
            raise DataError(f"{path} holds no records")
        return records

    def answer(record: Record) -> str:
        return " ".join(record.messages[-1].content.split())

    assert workload.data.train is not None
    train = read(Path(workload.data.train))
    yield ok("data", f"{len(train):,} records in {workload.data.train}")
    if workload.data.validation is None:
        return
    validation = read(Path(workload.data.validation))
    yield ok("data", f"{len(validation):,} records held out in {workload.data.validation}")
    trained = {answer(record) for record in train}
    num_shared = sum(answer(record) in trained for record in validation)
    if num_shared:
        yield warning(
            "data",
            f"{num_shared} of {len(validation)} held-out texts stand in the training records too: "
            "their loss says nothing about new documents",
            "split by document: `dataset ROOT --split 0.1` does",
        )
