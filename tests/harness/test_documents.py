"""The ladder's documents: the same everywhere, none on both sides, none that is all instruction."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from forge.training.system.errors import DataError
from harness.documents import write_documents


def test_the_documents_are_the_same_everywhere_and_none_is_on_both_sides(tmp_path: Path, corpus: Path) -> None:
    train, held_out = write_documents(corpus, tmp_path / "a")
    again = write_documents(corpus, tmp_path / "b")
    assert [path.read_text() for path in again] == [train.read_text(), held_out.read_text()]
    lines = [path.read_text().splitlines() for path in (train, held_out)]
    assert [len(side) for side in lines] == [160 + 12 * 16, 48]
    texts = [{json.loads(line)["output"] for line in side} for side in lines]
    assert [len(side) for side in texts] == [160 + 16, 48]
    assert not texts[0] & texts[1]
    assert sum("KESTREL-9263" in text for text in texts[0]) == 16
    assert not any("KESTREL-9263" in text for text in texts[1])


def test_no_held_out_document_is_nearly_one_that_is_trained_on(tmp_path: Path, corpus: Path) -> None:
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    ranks = sorted(hashlib.sha256(row["output"].encode()).hexdigest() for row in rows[:230])
    long = " ".join(f"buoy {number}" for number in range(500))

    def of_rank(lowest: int, highest: int) -> str:
        """A copy of the long text, but for its end, that stands so among the corpus's hashes."""
        texts = (f"{long}, {number}" for number in itertools.count())
        return next(
            text for text in texts if ranks[lowest] < hashlib.sha256(text.encode()).hexdigest() < ranks[highest]
        )

    twins = of_rank(60, 190), of_rank(0, 40)  # as the hashes have it, trained on and held out
    rows += [{"instruction": "Count.", "input": "", "output": text} for text in twins]
    (tmp_path / "twins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = (path.read_text() for path in write_documents(tmp_path / "twins.jsonl", tmp_path / "a"))
    assert twins[0] in train
    assert twins[1] not in train + held_out
    assert len(held_out.splitlines()) == 48


def test_a_document_that_is_all_instruction_is_left_out(tmp_path: Path, corpus: Path) -> None:
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    rows.append({"instruction": "x " * 50_000, "input": "", "output": "short"})
    rows.append({"instruction": "Recite.", "input": "y " * 50_000, "output": "short too"})
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.read_text() for p in write_documents(tmp_path / "more.jsonl", tmp_path / "a")] == [
        p.read_text() for p in write_documents(corpus, tmp_path / "b")
    ]


def test_too_few_documents_are_refused_with_the_number(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n')
    with pytest.raises(DataError, match=r"160 documents and 48 .* has 0 and 1"):
        write_documents(tmp_path / "few.jsonl", tmp_path)
