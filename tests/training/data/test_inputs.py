"""From files to examples: small, empty and overlapping sets, and what is told about them."""

from __future__ import annotations

import json
import random
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from forge.training.checks.data import check_data
from forge.training.config.workload import Workload
from forge.training.data import conversation
from forge.training.data.batching import step_order
from forge.training.data.duplicates import similar_pairs
from forge.training.data.inputs import PreparedInputs, describe_overlap, prepare_inputs, read_sides
from forge.training.data.preview import preview_workload
from forge.training.data.questions import question_ids
from forge.training.data.records import Message, Record
from forge.training.evaluation.bench import prepare_bench
from forge.training.models.weights import read_weights
from forge.training.system.errors import DataError
from tests.support.records import make_record
from tests.support.similarity import jaccard
from tests.support.tiny_model import CHAT_TEMPLATE, shared_base

ASKING = {"name": "w", "data": {"train": "x"}, "evaluation": {"facts": [{"question": "How many?", "answer": "48"}]}}


def prose(seed: int, num_words: int = 40) -> str:
    choose = random.Random(seed)
    return " ".join(f"w{choose.randrange(3000)}" for _ in range(num_words))


def write(path: Path, *answers: str, question: str = "Recite") -> str:
    rows = [json.dumps({"instruction": question, "output": answer}) for answer in answers]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def workload(train: str, validation: str | None = None, **data: Any) -> Workload:
    settings = {"train": train, "validation": validation, "max_length": 512, "long_documents": "cut"}
    settings |= {"validation_share": 0, **data}
    return Workload.model_validate({"name": "w", "model": {"path": str(shared_base())}, "data": settings})


def prepare(work: Workload, folder: Path) -> PreparedInputs:
    return prepare_inputs(work, shared_base(), folder / "run")


def test_one_record_alone_is_a_data_set(tmp_path: Path) -> None:
    work = workload(write(tmp_path / "one.jsonl", "It counts ships."))
    inputs = prepare(work, tmp_path)
    assert (len(inputs.train), inputs.validation, inputs.described.notes) == (1, None, [])
    steps = step_order(work, len(inputs.train))
    assert sum(map(len, steps)) == 3  # epochs, in steps of at most eight examples
    assert {int(i) for step in steps for i in step} == {0}


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_validation_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "v.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"v\.jsonl has no records"):
        prepare(workload(write(tmp_path / "t.jsonl", "one"), str(tmp_path / "v.jsonl")), tmp_path)


def test_a_validation_set_with_nothing_to_train_is_an_error_that_names_it(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", "one")
    validation = write(tmp_path / "v.jsonl", "two", question="q " * 400)
    with pytest.raises(DataError, match=r"v\.jsonl: none of 1 records has a token to train"):
        prepare(workload(train, validation, max_length=256), tmp_path)


def test_records_cut_to_nothing_are_named_by_file_and_line(tmp_path: Path) -> None:
    train = tmp_path / "t.jsonl"
    rows = [{"instruction": "q " * n, "output": "a"} for n in (1, 400, 1, 500)]
    train.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    inputs = prepare(workload(str(train), max_length=256), tmp_path)
    assert inputs.described.notes == ["t.jsonl: nothing to train in 2 of its records: line 3, line 7"]
    assert len(inputs.train) == 2


def test_texts_on_both_sides_and_near_copies_are_told_with_their_lines(tmp_path: Path) -> None:
    texts = [prose(i) for i in range(9)]
    near = texts[4] + " and three more"
    train = write(tmp_path / "t.jsonl", *texts[:7])
    validation = write(tmp_path / "v.jsonl", texts[7], f" {texts[2]}\n", near, texts[8])
    work = workload(train, validation)
    told = prepare(work, tmp_path).described.notes
    assert told == [
        "1 of 4 held-out texts are trained too: lines 2",
        f"1 of 4 held-out texts are nearly trained ones: line 3 is {jaccard(texts[4], near):.0%} line 5",
    ]
    assert preview_workload(work, shared_base(), num_examples=0).overlap == told


def test_what_became_of_the_documents_is_told(tmp_path: Path) -> None:
    root = tmp_path / "docs"
    root.mkdir()
    token = "ghp_" + "Zq7Rw2Lk9Xv4Bn6Tm1Yc8Hd3Jf5Gs0PaUeIo"
    for name, text in {
        "a.md": prose(1),
        "b.md": prose(2),
        "c.md": f"x\n{token}\n",
        "d.md": "\0",
        "e.md": prose(1),
    }.items():
        (root / name).write_text(text, encoding="utf-8")
    data = {"documents": str(root), "validation_share": 0.0, "max_length": 512}
    work = Workload.model_validate({"name": "w", "data": data})
    (tmp_path / "run").mkdir()
    told = prepare(work, tmp_path).described.notes
    assert told == [
        "documents: 2 kept, 3 skipped (1 binary, 1 exact duplicate, 1 secret)",
        "left out for what looks like credentials: c.md:2",
    ]
    assert preview_workload(work, shared_base(), num_examples=0).documents == told


def base_with(folder: Path, template: str) -> Path:
    base = Path(shutil.copytree(shared_base(), folder / "base"))
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    return base


def on(year: int, month: int, day: int) -> Any:
    """A class of dates for which it is always that day."""
    return type("Date", (date,), {"today": classmethod(lambda cls: cls(year, month, day))})


def test_a_resume_on_another_day_trains_the_date_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_with(
        tmp_path, "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHAT_TEMPLATE
    )
    work = workload(write(tmp_path / "t.jsonl", "It counts ships."))
    monkeypatch.setattr(conversation, "date", on(2030, 12, 31))
    first = prepare_inputs(work, base, tmp_path / "run")
    assert first.described.template_date == "2030-12-31"
    monkeypatch.setattr(conversation, "date", on(2031, 1, 1))
    again = prepare_inputs(work, base, tmp_path / "again", first.described.template_date)
    assert again.train.sha256 == first.train.sha256
    assert again.described.template_date == "2030-12-31"
    bench = prepare_bench(
        make_record(inputs=first.described.model_dump(), base_path=str(base), workload=ASKING),
        tmp_path,
        read_weights(base),
        None,
    )
    asked = question_ids(bench.encoder, "How many?", None).tolist()
    assert "31 Dec 2030" in bench.tokenizer.decode(asked)
    assert prepare_inputs(work, shared_base(), tmp_path / "run").described.template_date is None


def test_what_a_template_cannot_hold_is_told_for_both_files_in_one_message(tmp_path: Path) -> None:
    base = base_with(tmp_path, CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]"))
    sides = [
        write(tmp_path / f"{name}.jsonl", prose(seed), f"quotes `</think>` {seed}") for seed, name in enumerate("tv")
    ]
    with pytest.raises(DataError) as caught:
        prepare_inputs(workload(*sides), base, tmp_path / "run")
    assert [f"{side}: 1 line cannot be used\n  line 2: " in caught.value.message for side in sides] == [True, True]
    work = workload(*sides, on_unrepresentable="leave_out")
    inputs = prepare_inputs(work, base, tmp_path / "run")
    assert (len(inputs.train), inputs.validation and len(inputs.validation)) == (1, 1)
    for side, note in zip("tv", inputs.described.notes, strict=True):
        assert note.startswith(f"{side}.jsonl: 1 of 2 records left out")
        assert "\n  line 2: " in note
    assert preview_workload(work, base, num_examples=0).left_out == inputs.described.notes
    assert work.digest() == workload(*sides).digest()  # what it changes is known by the examples' content
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "log.md").write_text("quotes `</think>`", encoding="utf-8")
    data = {"documents": str(docs), "validation_share": 0.0}
    with pytest.raises(DataError, match=f"{docs}, as corpus.jsonl: 1 line .*\n.*`log.md`"):
        preview_workload(Workload.model_validate({"name": "w", "data": data}), base)


def test_a_fact_that_a_template_cannot_ask_for_is_an_error_before_training(tmp_path: Path) -> None:
    base = base_with(tmp_path, CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]"))
    content = workload(write(tmp_path / "t.jsonl", "It counts ships.")).model_dump()
    facts = [{"question": question, "answer": "48"} for question in ("How many?", "What is `</think>` for?")]
    with pytest.raises(DataError, match=r"evaluation\.facts\[1\]: the chat template rewrites"):
        prepare_inputs(Workload.model_validate(content | {"evaluation": {"facts": facts}}), base, tmp_path / "run")


def test_many_overlapping_texts_are_counted_and_five_are_shown() -> None:
    records = [Record(n, (Message("user", "a"), Message("assistant", prose(n))), True) for n in range(1, 31)]
    assert describe_overlap(records, records) == [
        "30 of 30 held-out texts are trained too: lines 1, 2, 3, 4, 5 and 25 more"
    ]
    assert describe_overlap(records[:10], records[10:]) == []


@pytest.mark.parametrize("seed", range(5))
def test_similar_pairs_are_those_of_comparing_all(seed: int) -> None:
    choose = random.Random(seed)
    families = [prose(seed * 100 + i, 30).split() for i in range(6)]

    def variant() -> str:
        words = list(choose.choice(families))
        for _ in range(choose.randrange(3)):
            words[choose.randrange(len(words))] = f"x{choose.randrange(100)}"
        return " ".join(words[: choose.randrange(15, 31)])

    one, other = [variant() for _ in range(25)], [variant() for _ in range(20)]
    expected = [(i, j) for i, a in enumerate(one) for j, b in enumerate(other) if jaccard(a, b) >= 0.5]
    assert expected
    assert [(i, j) for i, j, _ in similar_pairs(one, other, 0.5)] == expected


def test_one_document_alone_names_the_setting_that_helps_as_the_commands_that_train_take_it(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("The keeper lights the lamp at dusk.")
    settings = {"documents": str(tmp_path / "docs"), "max_length": 512}
    work = Workload.model_validate({"name": "w", "model": {"path": str(shared_base())}, "data": settings})
    (tmp_path / "run").mkdir()
    for refuse in (lambda: prepare(work, tmp_path), lambda: list(check_data(work))):
        with pytest.raises(DataError) as caught:
            refuse()
        assert "--set data.validation_share=0" in str(caught.value.remedy)
        assert "--split" not in str(caught.value.remedy)
    alone = Workload.model_validate(work.model_dump() | {"data": settings | {"validation_share": 0}})
    assert len(prepare(alone, tmp_path).train) == 1


def test_a_share_of_the_records_is_held_out_near_copies_on_one_side(tmp_path: Path) -> None:
    answers = [prose(seed) for seed in range(20)]
    copies = [f"{answers[0]} {word}" for word in ("again", "and again")]
    work = workload(write(tmp_path / "t.jsonl", *answers, *copies), validation_share=0.1)
    inputs = prepare(work, tmp_path)
    assert inputs.validation is not None
    assert (len(inputs.train), len(inputs.validation)) == (20, 2)
    assert "2 of 22 records of t.jsonl are held out" in inputs.described.notes[0]
    encoded = read_sides(work.data, tmp_path / "t.jsonl", None)
    sides = [{record.messages[-1].content for record in side} for side in (encoded.train, encoded.held_out or [])]
    assert [len(side & {answers[0], *copies}) for side in sides] in ([3, 0], [0, 3])
    again = workload(write(tmp_path / "again.jsonl", *answers, *copies), validation_share=0.1)
    assert prepare(again, tmp_path / "b").described.train_examples_sha256 == inputs.described.train_examples_sha256


def test_records_that_cannot_be_parted_are_all_trained_and_it_is_said(tmp_path: Path) -> None:
    work = workload(write(tmp_path / "t.jsonl", "one"), validation_share=0.1)
    inputs = prepare(work, tmp_path)
    assert inputs.validation is None
    why = "nothing is held out of t.jsonl: 1 document cannot be split"
    assert why in inputs.described.notes[0]
    judged = Workload.model_validate(work.model_dump() | {"training": {"evaluate_every_steps": 1}})
    for refuse in (lambda: prepare(judged, tmp_path / "b"), lambda: list(check_data(judged))):
        with pytest.raises(DataError, match=f"evaluate_every_steps is set and {why}") as caught:
            refuse()
        assert "add records, give data.validation, or" in str(caught.value.remedy)
