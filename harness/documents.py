"""The documents of runs on the trained base: some of the gate's, others held out, and planted ones with a known fact.

The parity ladder and the export suite train on them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from forge.training.data.inputs import find_overlap
from forge.training.data.records import Message, Record
from forge.training.system.environment import ROOT
from forge.training.system.errors import DataError
from forge.training.system.files import disk_errors, write_text

NUM_TRAIN = 160
NUM_HELD_OUT = 48
LONGEST_CHARACTERS = 16_000  # no document is a tenth of all that is read
LONGEST_PROMPT_CHARACTERS = 600  # some documents are all instruction; 1,024 tokens must hold an answer too
NUM_PLANTINGS = 12  # of each: of 1,200 examples per run, some 500 then hold the fact
PLANTED = ROOT / "forge" / "training" / "data" / "embedded"  # the first line of each holds the fact
PLANTED_INSTRUCTION = "Set out the ideas, facts and principles of the document `{name}`"  # as `evaluation.facts` asks


def write_documents(source: Path, directory: Path) -> tuple[Path, Path]:
    """Write ``parity.train.jsonl`` and ``parity.validation.jsonl`` into ``directory`` and return both.

    ``source``: instruction/input/output records, one per document, as ``dataset`` writes them. Which of them are taken
    and which are held out follows from a hash of each record: the same file gives the same documents everywhere.
    No held-out text is nearly one that is trained on: its loss would mostly say how well a run remembers that one.
    Raises :class:`DataError` where there are too few.
    """
    usable: dict[str, dict[str, Any]] = {}
    for record in _read(source):
        text, prompt = record.get("output"), f"{record.get('instruction') or ''}{record.get('input') or ''}"
        if not isinstance(text, str) or not record.get("instruction"):
            continue
        if len(text) <= LONGEST_CHARACTERS and len(prompt) <= LONGEST_PROMPT_CHARACTERS:
            usable.setdefault(hashlib.sha256(text.encode()).hexdigest(), record)  # copies never on both sides
    chosen = [usable[key] for key in sorted(usable)]
    start, end = NUM_HELD_OUT, NUM_HELD_OUT + NUM_TRAIN
    trained = chosen[start:end]
    held_out = _unlike(trained, chosen[:start] + chosen[end:])[:NUM_HELD_OUT]
    if len(trained) < NUM_TRAIN or len(held_out) < NUM_HELD_OUT:
        raise DataError(
            f"runs on the trained base take {NUM_TRAIN} documents and {NUM_HELD_OUT} unlike them, of up to"
            f" {LONGEST_CHARACTERS:,} characters and asked for in up to {LONGEST_PROMPT_CHARACTERS}; {source} has"
            f" {len(trained)} and {len(held_out)}",
            remedy="name a larger corpus with --gate-train",
        )
    planted = [
        {"instruction": PLANTED_INSTRUCTION.format(name=path.name), "input": "", "output": path.read_text("utf-8")}
        for path in sorted(PLANTED.glob("*.md"))
    ] * NUM_PLANTINGS
    written = []
    for name, records in (("train", planted + trained), ("validation", held_out)):
        path = directory / f"parity.{name}.jsonl"
        text = "".join(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in records)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with disk_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        written.append(path)
    return written[0], written[1]


def _unlike(trained: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of ``others`` whose text is not nearly one of ``trained``, in their order."""

    def answers(rows: list[dict[str, Any]]) -> list[Record]:
        return [Record(i, (Message("assistant", str(row["output"])),), document=True) for i, row in enumerate(rows)]

    alike = {overlap.held_out.line for overlap in find_overlap(answers(trained), answers(others))}
    return [row for i, row in enumerate(others) if i not in alike]


def _read(source: Path) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{source} cannot be read as JSONL: {error}", remedy="name what `dataset` wrote") from error
    return [record for record in records if isinstance(record, dict)]
