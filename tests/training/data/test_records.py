"""The JSONL reader: what it takes, what it refuses, and that it names every bad line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.training.data import rows
from forge.training.data.records import Message, Record, read_both, read_records
from forge.training.system.errors import DataError

GOOD = '{"instruction": "a?", "input": "", "output": "b"}'


def turns(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": f"{role}!"} for role in roles]})


def read(tmp_path: Path, content: str | bytes) -> list[Record]:
    path = tmp_path / "c.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return read_records(path)


def test_a_document_becomes_a_question_and_its_answer_kept_exactly(tmp_path: Path) -> None:
    text = "\n\n  é — <|im_end|>\u2028 line\u0085 two\r\n\t\n"
    content = json.dumps({"instruction": "Say", "input": "", "output": text}, ensure_ascii=False)
    assert read(tmp_path, content) == [Record(1, (Message("user", "Say"), Message("assistant", text)), document=True)]


@pytest.mark.parametrize(("given_input", "question"), [(None, "a"), ("", "a"), (" \n", "a"), ("more", "a\n\nmore")])
def test_an_input_stands_below_its_instruction(tmp_path: Path, given_input: str | None, question: str) -> None:
    row = {"instruction": "a", "output": "b"} | ({} if given_input is None else {"input": given_input})
    assert read(tmp_path, json.dumps(row))[0].messages[0].content == question


def test_conversations_keep_their_turns(tmp_path: Path) -> None:
    record = read(tmp_path, turns("system", "user", "assistant", "user", "assistant"))[0]
    assert [m.role for m in record.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert not record.document


def test_bom_crlf_blank_lines_and_a_missing_last_newline_are_no_errors(tmp_path: Path) -> None:
    records = read(tmp_path, f"\ufeff{GOOD}\r\n\n  \r\n{GOOD}\n{GOOD}")
    assert [r.line for r in records] == [1, 4, 5]


def test_unknown_keys_are_tolerated(tmp_path: Path) -> None:
    document = '{"instruction": "a", "output": "b", "id": 7, "tags": []}'
    conversation = (
        '{"messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]}'
    )
    assert [r.messages[0].content for r in read(tmp_path, f"{document}\n{conversation}")] == ["a", "a"]


BAD_LINES = {
    '{"instruction": "a", "output": "b"': "broken JSON at column",
    '{"instruction": "a", "output": "b"} x': "broken JSON",
    "\ufeff{}": "broken JSON",
    '"text"': "text, not an object",
    "null": "null, not an object",
    "7": "a number, not an object",
    '["a", "b"]': "an array, not an object",
    "{}": "instruction and output missing (it has: nothing)",
    '{"prompt": "a", "completion": "b"}': "it has: completion, prompt",
    '{"\\u001b[31mx": 1, "\\ud800": 2}': "it has: '\\x1b[31mx', '\\ud800')",
    '{"instruction": "a"}': "output missing",
    '{"instruction": "a", "output": null}': "output is null, not text",
    '{"instruction": "a", "output": 3}': "output is a number, not text",
    '{"instruction": "a", "output": ["b"]}': "output is an array, not text",
    '{"instruction": "a", "output": {"b": 1}}': "output is an object, not text",
    '{"instruction": true, "output": "b"}': "instruction is a boolean, not text",
    '{"instruction": "a", "input": null, "output": "b"}': "input is null, not text",
    '{"instruction": "a", "output": ""}': "output is empty",
    '{"instruction": " \\n", "output": "b"}': "instruction is only blanks",
    '{"instruction": "a", "output": "b", "output": "c"}': "'output' ",
    '{"instruction": "a", "output": "b", "x": {"y": 1, "y": 2}}': "'y' ",
    '{"instruction": "a", "output": "b", "x": NaN}': "NaN is not JSON",
    '{"instruction": "a", "output": "b", "x": -Infinity}': "-Infinity is not JSON",
    '{"instruction": "a", "output": "b\\u0000"}': "NUL",
    '{"instruction": "a", "output": "b\0"}': "NUL",
    '{"instruction": "a", "output": "b\\ud800"}': "half of a surrogate pair at character 2",
    '{"instruction": "a", "output": "b", "x": ' + "9" * 5000 + "}": "broken JSON",
    "[" * 200_000: "nested too deeply",
    '{"messages": [], "output": "b"}': "both messages and output",
    '{"messages": []}': "messages is empty",
    '{"messages": "hi"}': "messages is text, not an array",
    '{"messages": ["hi"]}': "message 1: text, not an object",
    '{"messages": [{"role": "user"}]}': "message 1: content missing",
    '{"messages": [{"role": "user", "content": null}]}': "message 1: content is null",
    '{"messages": [{"role": ["user"], "content": "a"}]}': "role is ['user'], not one of",
    turns("tool", "assistant"): "role is 'tool', not one of",
    turns("user"): "the last message is not the assistant's",
    turns("system"): "the last message is not the assistant's",
    turns("assistant"): "user expected, found assistant",
    turns("user", "user", "assistant"): "assistant expected, found user",
    turns("user", "system", "assistant"): "may only stand first",
    turns("system", "assistant"): "user expected, found assistant",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40].encode("unicode_escape").decode())
def test_a_bad_line_is_named_with_its_reason(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, f"{GOOD}\n\n{line}\n{GOOD}\n")
    assert "1 line cannot be used\n  line 3: " in caught.value.message
    assert BAD_LINES[line] in caught.value.message
    assert len(caught.value.message) < 500 + len(str(tmp_path))


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: not UTF-8 at byte 3"):
        read(tmp_path, b'{"\xff": 1}\n' + GOOD.encode())


def test_all_bad_lines_are_counted_and_ten_are_shown(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, "\n".join([GOOD, *["{}"] * 37]))
    assert "37 lines cannot be used" in caught.value.message
    assert "  line 11: " in caught.value.message
    assert "  line 12: " not in caught.value.message
    assert caught.value.message.endswith("and 27 more")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no records"),
        (b"\xef\xbb\xbf", "has no records"),
        (b"\n\r\n  \n", "has no records"),
        (b"PK\x03\x04xl/workbook.xml", "is a ZIP archive or a spreadsheet"),
        (b"\x1f\x8b\x08", "is compressed by gzip"),
        (b'{\n  "instruction": "a",\n  "output": "b"\n}\n', "one JSON object over several lines"),
        (GOOD.encode("utf-16"), "is UTF-16"),
        (GOOD.encode("utf-16-be"), "line 1: a NUL character"),
        (GOOD.encode("utf-32"), "is UTF-16"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


def test_what_is_no_file_is_one_message(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "is a directory"),
        ("/dev/null", "not a reg"),
    ):
        with pytest.raises(DataError, match=message):
            read_records(path)


def test_a_line_of_fifteen_megabytes_is_read(tmp_path: Path) -> None:
    text = "word " * 3_000_000
    assert read(tmp_path, json.dumps({"instruction": "a", "output": text}))[0].messages[1].content == text


def test_a_line_longer_than_the_limit_is_named_and_the_lines_after_it_keep_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", len(GOOD) + 1)
    with pytest.raises(DataError) as caught:
        read(tmp_path, f"{GOOD}\n{GOOD[:-1]}    }}\n{'x' * 1000}\n{GOOD}\n{{}}\n" + "y" * 300)
    named = [line.split(":")[0] for line in caught.value.message.splitlines()[1:]]
    assert named == ["  line 2", "  line 3", "  line 5", "  line 6"]
    assert caught.value.message.count(f"longer than {len(GOOD) + 1} bytes") == 3


def test_a_huge_file_without_a_line_end_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "c.jsonl"
    with open(path, "wb") as stream:
        stream.truncate(100 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="line 1: longer than 1,048,576 bytes"):
            read_records(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_the_faults_of_both_files_are_reported_together(tmp_path: Path) -> None:
    train, validation = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    train.write_text(f"{GOOD}\n{{}}\n", encoding="utf-8")
    validation.write_text("", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_both(train, validation)
    assert "train.jsonl: 1 line cannot be used\n  line 2: " in caught.value.message
    assert "validation.jsonl has no records" in caught.value.message
    assert caught.value.exit_code == 3
    train.write_text(GOOD, encoding="utf-8")
    assert [len(side or ()) for side in read_both(train, None)] == [1, 0]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["user", "assistant", "system"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "instruction", "input", "output"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(st.lists(json_values.map(json.dumps) | st.text(max_size=40), max_size=6))
def test_whatever_the_lines_there_are_records_or_one_data_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    try:
        records = read_records(path)
    except DataError:
        return
    assert records
    assert all(m.content.strip() for r in records for m in r.messages)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_whatever_the_bytes_there_are_records_or_one_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_records(path)


@settings(max_examples=200)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1))
def test_every_text_comes_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "texts.jsonl"
    kept = [t for t in texts if t.strip()] or ["x"]
    rows = [json.dumps({"instruction": "i", "output": t}, ensure_ascii=False) for t in kept]
    path.write_text("\n".join(rows), encoding="utf-8", newline="\n")
    assert [r.messages[1].content for r in read_records(path)] == kept
