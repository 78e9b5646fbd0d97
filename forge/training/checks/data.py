"""Whether the documents can be read, and whether anything is held out and kept apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from forge.training.checks.finding import Finding, ok, warning
from forge.training.config.workload import Workload
from forge.training.data.corpus import documents_of, passed_over
from forge.training.data.discovery import discover
from forge.training.data.inputs import (
    describe_overlap,
    own_files,
    read_sides,
    refuse_evaluation_of_nothing,
    refuse_unusable_sources,
)
from forge.training.data.records import Record, several
from forge.training.system.command import counted, shown_path
from forge.training.system.errors import DataError
from forge.training.system.secrets import find_secrets


def check_data(workload: Workload) -> Iterator[Finding]:
    """Raises :class:`DataError` for what cannot be read."""
    yield from _check_records(workload) if workload.data.train is not None else _check_documents(workload)
    if workload.data.validation or workload.data.validation_share:
        return
    refuse_evaluation_of_nothing(workload)
    lost = "" if workload.evaluation.facts else " and has no facts to ask: `forge evaluate` will refuse it"
    yield warning("data", f"the config holds nothing out{lost}", "give data.validation or data.validation_share")


def _check_documents(workload: Workload) -> Iterator[Finding]:
    refuse_unusable_sources(workload)
    root, choice = documents_of(workload.data)
    shown, root = shown_path(root), root.resolve()
    is_embedded = workload.data.documents == "embedded"
    num_files = len(discover(root, exclude=passed_over(own_files(workload)), choice=choice).candidates)
    needed = 2 if workload.data.validation_share else 1
    if num_files < needed:
        raise DataError(
            f"data.documents: {shown} holds {counted(num_files, 'file')} to read, {needed} needed",
            remedy="add documents" + (", or hold nothing out: --set data.validation_share=0" if num_files else ""),
        )
    yield ok("data", f"{counted(num_files, 'file')} in {'the embedded documents' if is_embedded else shown}")


def _check_records(workload: Workload) -> Iterator[Finding]:
    data = workload.data
    assert data.train is not None
    train_path = Path(shown_path(Path(data.train)))
    validation_path = Path(shown_path(Path(data.validation))) if data.validation else None
    sides = read_sides(data, train_path, validation_path)
    train, held_out = sides.train, sides.held_out
    if held_out is None and data.validation_share:
        refuse_evaluation_of_nothing(workload, sides.remark)
        yield warning("data", str(sides.remark))
    yield ok("data", f"{counted(len(train), 'record')} in {train_path}")
    if held_out is not None:
        yield ok("data", f"{counted(len(held_out), 'record')} held out in {validation_path or train_path}")
        for line in describe_overlap(train, held_out):
            remedy = "their loss says nothing about new documents; `forge dataset ROOT --split 0.1` splits by document"
            yield warning("data", line, remedy)
    yield from _check_secrets(train, data.train)


def _check_secrets(records: Sequence[Record], path: str) -> Iterator[Finding]:
    """What `forge dataset` would have left out; a model can recite it. The legacy environment has no detector."""
    if find_spec("detect_secrets") is None:
        return
    secrets = [(r.place, secret.rule) for r in records for m in r.messages for secret in find_secrets("", m.content)]
    if secrets:
        where = several([f"{place}: {rule}" for place, rule in secrets])
        yield warning("secrets", f"{path} holds what looks like credentials: {where}", "take them out")
