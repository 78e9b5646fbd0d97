"""JSON arrays, CSV, TSV and Parquet, and the usual forms of a record: read as strictly as our own JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.training.data import rows
from forge.training.data.records import Message, Record, read_records
from forge.training.system.errors import DataError

TALK = [("user", "Where is the ferry?"), ("assistant", "At pier 4."), ("user", "And now?"), ("assistant", "Gone.")]


def read(path: Path, content: str | bytes, **columns: str) -> list[Record]:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return read_records(path, columns)


def write_parquet(path: Path, values: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    return path


def texts(record: Record) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in record.messages]


def test_a_conversation_in_sharegpts_form_is_the_same_record(tmp_path: Path) -> None:
    speakers = {"user": "human", "assistant": "gpt"}
    sharegpt = {"conversations": [{"from": speakers[role], "value": text} for role, text in TALK]}
    openai = {"messages": [{"role": role, "content": text} for role, text in TALK]}
    mixed = {"conversations": openai["messages"]}
    for number, form in enumerate((sharegpt, openai, mixed)):
        assert read(tmp_path / f"{number}.jsonl", json.dumps(form)) == [
            Record(1, tuple(Message(*turn) for turn in TALK), document=False)
        ]


def test_a_system_text_beside_the_turns_comes_first(tmp_path: Path) -> None:
    row = {"system": "Be brief.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    alpaca = {"system": "Be brief.", "instruction": "a", "input": "", "output": "b"}
    both = read(tmp_path / "c.jsonl", f"{json.dumps(row)}\n{json.dumps(alpaca)}")
    assert [texts(record) for record in both] == [[("system", "Be brief."), ("user", "a"), ("assistant", "b")]] * 2
    row["conversations"].insert(0, {"from": "system", "value": "own"})  # type: ignore[attr-defined]
    assert texts(read(tmp_path / "c.jsonl", json.dumps(row))[0])[0] == ("system", "own")


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_an_array_in_alpacas_form_is_read_however_it_is_laid_out(tmp_path: Path, indent: int | None, bom: str) -> None:
    alpaca = [{"instruction": f"a{n}", "input": "", "output": f"b{n}"} for n in range(3)]
    records = read(tmp_path / "alpaca.json", bom + json.dumps(alpaca, indent=indent) + "\n")
    assert [(r.place, r.messages[1].content) for r in records] == [(f"record {n + 1}", f"b{n}") for n in range(3)]
    assert all(r.document for r in records)


def test_a_table_of_alpacas_columns_is_the_same_in_csv_tsv_and_parquet(tmp_path: Path) -> None:
    values = [
        {"id": "1", "instruction": "a", "input": "", "output": "NA"},
        {"id": "2", "instruction": 'say "b", twice', "input": "x", "output": " b\nb "},
        {"id": "3", "instruction": "c", "input": "", "output": "042"},
    ]

    def quoted(delimiter: str) -> str:
        lines = [["id", "instruction", "input", "output"], *(list(value.values()) for value in values)]
        return "".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in line) + "\r\n" for line in lines)

    expected = [[("user", "a"), ("assistant", "NA")], [("user", 'say "b", twice\n\nx'), ("assistant", " b\nb ")]]
    expected += [[("user", "c"), ("assistant", "042")]]
    for delimiter, name in ((",", "t.csv"), ("\t", "t.tsv")):
        records = read(tmp_path / name, "\ufeff" + quoted(delimiter))
        assert [texts(r) for r in records] == expected
        assert [r.place for r in records] == ["line 2", "line 3", "line 5"]
    records = read_records(write_parquet(tmp_path / "t.parquet", values))
    assert [texts(r) for r in records] == expected
    assert [r.place for r in records] == ["row 1", "row 2", "row 3"]
    assert {r.document for r in records} == {True}


def test_conversations_are_read_from_parquet(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (record,) = read_records(write_parquet(tmp_path / "t.parquet", [{"conversations": turns}]))
    assert texts(record) == [("user", "a"), ("assistant", "b")]


def test_columns_of_other_names_are_read_where_the_config_says_so(tmp_path: Path) -> None:
    columns = {"instruction": "question", "output": "answer"}
    for name, content in (
        ("t.csv", "question,answer\na,b\n"),
        ("t.jsonl", '{"question": "a", "answer": "b"}'),
        ("t.json", '[{"question": "a", "answer": "b"}]'),
    ):
        with pytest.raises(DataError) as caught:
            read(tmp_path / name, content)
        assert "data.columns: {instruction: question, output: answer}" in str(caught.value.remedy)
        assert texts(read(tmp_path / name, content, **columns)[0]) == [("user", "a"), ("assistant", "b")]
    with pytest.raises(DataError, match="line 3: answer is empty"):
        read(tmp_path / "t.csv", "question,answer\na,b\nc,\n", **columns)
    with pytest.raises(DataError, match=r"has no column reply: it has question, answer"):
        read(tmp_path / "t.csv", "question,answer\na,b\n", instruction="question", output="reply")


BAD_FILES = {
    ("t.csv", "instruction,output\na,b\nc\n,d\n"): [
        "line 3: 1 columns, and the header has 2",
        "line 4: instruction is em",
    ],
    ("t.csv", "instruction,output\na,b,c\n"): ["line 2: 3 columns, and the header has 2"],
    ("t.csv", 'instruction,output\n"a\nb",c\n"d,e\n'): ["line 4: broken CSV: unexpected end of data"],
    ("t.csv", 'instruction,output\n"a"b,c\n'): ["line 2: broken CSV: ',' expected after '\"'"],
    ("t.csv", b"instruction,output\na,b\nc,\xff\nd,\n"): ["line 3: output: not UTF-8", "line 4: output is empty"],
    ("t.csv", "output,output\na,b\n"): ["column 'output' appears twice"],
    ("t.csv", "instruction;output\na;b\n"): ["it has instruction;output", "separated by commas"],
    ("t.csv", "Prompt,Answer\na,b\n"): ["it has Prompt, Answer", "{instruction: Prompt, output: Answer}"],
    ("t.csv", ""): ["has no records"],
    ("t.csv", "instruction,output\n"): ["has no records"],
    ("t.json", '[{"instruction": "a"}, {"instruction": "a", "output": 3}]'): [
        "record 1 (line 1): output missing (it has: instruction)",
        "record 2 (line 1): output is a number, not text",
    ],
    ("t.json", '[\n7,\n{"instruction": "a", "output": "b", "output": "c"},\n{"x": NaN}\n]'): [
        "record 1 (line 2): a number, not an object",
        "record 2 (line 3): key 'output' appears twice",
        "record 3 (line 4): NaN is not JSON",
    ],
    ("t.json", '[\n{"instruction": "a",\n "output": }\n]'): ["record 1 (line 2): broken JSON in line 3, column 12"],
    ("t.json", '[{"instruction": "a", "output": "b"}'): ["record 1 (line 1): a comma or ] expected"],
    ("t.json", '[{"instruction": "a", "output": "b"},]'): ["record 2 (line 1): broken JSON"],
    ("t.json", '["a"]\n{"instruction": "a", "output": "b"}\n'): ["line 2: more text after the end of the array"],
    ("t.json", "[]"): ["has no records"],
    ("t.json", "[" * 100_000): ["nested too deeply"],
    ("t.json", b'["\xff"]'): ["line 1: not UTF-8"],
    ("t.jsonl", '{"conversations": [{"from": "gpt", "value": "a"}]}'): ["user expected, found assistant"],
    ("t.jsonl", '{"conversations": [{"from": "bing", "value": "a"}]}'): ["from is 'bing', not one of system, user"],
    ("t.jsonl", '{"conversations": [{"from": "human"}]}'): ["message 1: value missing"],
    ("t.jsonl", '{"conversations": [{}]}'): ["message 1: from missing"],
    ("t.jsonl", '{"conversations": "a"}'): ["conversations is text, not an array"],
    ("t.jsonl", '{"conversations": [], "messages": []}'): ["both messages and conversations"],
    ("t.jsonl", '{"instruction": "a", "output": "b", "history": [["c", "d"]]}'): ["history is not read"],
    ("t.parquet", b"PAR1 and no more"): ["is not a readable Parquet file"],
    ("t.jsonl", b"PAR1 and no more"): ["is not a readable Parquet file"],
    ("t.parquet", '{"instruction": "a", "output": "b"}'): ["is not a readable Parquet file"],
}


@pytest.mark.parametrize("case", BAD_FILES, ids=lambda case: repr(case[1])[:40])
def test_what_is_wrong_in_a_file_is_named_with_its_place(tmp_path: Path, case: tuple[str, str | bytes]) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / case[0], case[1])
    for said in BAD_FILES[case]:
        assert said in str(caught.value)
    assert case[0] in caught.value.message
    assert caught.value.exit_code == 3


def test_bad_rows_of_parquet_are_named_with_their_column(tmp_path: Path) -> None:
    values = [
        {"instruction": "a", "output": "b"},
        {"instruction": None, "output": "b"},
        {"instruction": "a", "output": " "},
    ]
    with pytest.raises(DataError) as caught:
        read_records(write_parquet(tmp_path / "t.parquet", values))
    assert (
        "2 rows cannot be used\n  row 2: instruction is null, not text\n  row 3: output is only" in caught.value.message
    )
    with pytest.raises(DataError, match="row 1: output is a number"):
        read_records(write_parquet(tmp_path / "t.parquet", [{"instruction": "a", "output": 3}]))
    with pytest.raises(DataError, match=r"no columns of a record: it has text, url"):
        read_records(write_parquet(tmp_path / "t.parquet", [{"text": "a", "url": "b"}]))


def test_a_line_of_csv_and_an_array_beyond_the_limits_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    with pytest.raises(DataError, match="line 3: longer than 100 bytes"):
        read(tmp_path / "t.csv", f"instruction,output\na,b\nc,{'d' * 100}\n")
    monkeypatch.setattr(rows, "MAX_ARRAY_BYTES", 30)
    with pytest.raises(DataError, match="array of more than 30 bytes"):
        read(tmp_path / "t.json", '[{"instruction": "a", "output": "b"}]')


@settings(max_examples=200)
@given(
    st.sampled_from(["t.csv", "t.tsv", "t.json", "t.parquet"]),
    st.text(st.sampled_from('[]{},:"\n\t\r a1\0\ud800é'), max_size=60) | st.text(max_size=30),
)
def test_whatever_a_file_holds_there_are_records_or_one_data_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    for head in ("", "instruction,output\n", "[", '[{"instruction": "a", "output": "b"},'):
        path.write_bytes((head + text).encode("utf-8", "surrogatepass"))
        try:
            records = read_records(path)
        except DataError:
            continue
        assert all(m.content.strip() for r in records for m in r.messages)
