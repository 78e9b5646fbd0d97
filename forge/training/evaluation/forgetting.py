"""Forgetting: a model's loss on general text, short passages on many subjects which no user's documents hold.

The passages in ``general_text/`` were written for Forge and may be used by anyone for anything (CC0 1.0). Each is
asked for as held-out documents are: its heading is the question, through the chat template, and the text below it the
answer, whose tokens are counted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from forge.training.config.workload import DataSection
from forge.training.data.conversation import Encoder
from forge.training.data.examples import Examples, document_name, encode_records
from forge.training.data.records import Message, Record
from forge.training.system.files import sha256_json

PASSAGES = Path(__file__).with_name("general_text")
_MAX_TOKENS = 512  # no passage has as many with a usual tokenizer; with a small vocabulary it is divided


def read_passages() -> dict[str, tuple[str, str]]:
    """Question and answer by the passage's name, in alphabetical order."""
    passages = {}
    for path in sorted(PASSAGES.glob("*.md")):
        heading, _, text = path.read_text(encoding="utf-8").partition("\n")
        passages[path.stem] = (heading.removeprefix("# "), text.strip())
    return passages


def passages_sha256() -> str:
    """Hex SHA-256 of the passages: losses on other texts are not compared with these."""
    return sha256_json([[name, *passage] for name, passage in read_passages().items()])


def general_examples(encoder: Encoder, system_prompt: str | None, num_positions: int | None = None) -> Examples:
    """The passages as examples, each named after its passage; ``num_positions``: the longest that the model takes.

    Raises :class:`DataError` where the base's chat template cannot hold them.
    """
    passages = read_passages()
    records = [
        Record(line=number, messages=(Message("user", question), Message("assistant", answer)), document=True)
        for number, (question, answer) in enumerate(passages.values(), 1)
    ]
    longest = min(_MAX_TOKENS, num_positions or _MAX_TOKENS)
    data = DataSection(documents="embedded", system_prompt=system_prompt, max_length=longest)
    examples = encode_records(records, encoder, data, "the general text")
    places = {record.place: name for record, name in zip(records, passages, strict=True)}
    names = [each.replace(document_name(each), places[document_name(each)], 1) for each in examples.document_ids]
    return replace(examples, document_ids=names)
