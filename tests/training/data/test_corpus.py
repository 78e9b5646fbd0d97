"""The corpus of a repository: what goes in, in whose words, on which side, and what the report says."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from forge.training.config.workload import InstructionRule
from forge.training.data.corpus import build_corpus, hold_out, print_report, render_document
from forge.training.data.discovery import Choice
from forge.training.data.records import read_records
from forge.training.system.environment import ROOT
from forge.training.system.errors import ConfigurationError, DataError, DiskError
from forge.training.system.files import sha256_file
from tests.support.similarity import jaccard

TOKEN = "ghp_" + "Zq7Rw2Lk9Xv4Bn6Tm1Yc8Hd3Jf5Gs0PaUeIo"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="")
    return root


def prose(seed: int, num_words: int = 60) -> str:
    choose = random.Random(seed)
    return " ".join(f"w{choose.randrange(5000)}" for _ in range(num_words))


def tree(root: Path, num: int = 20) -> Path:
    return write(root, {f"d{i % 3}/{i:02}.md": f"# {i}\n\n{prose(i)}\n" for i in range(num)})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_each_document_is_one_whole_record_sorted_by_path(tmp_path: Path) -> None:
    files = {"b.md": "# B\r\n\r\ntext — <|im_end|>\u2028\n", "a/z.md": prose(1) * 300, "a.md": "\ufeffone"}
    report = build_corpus(write(tmp_path / "r", files), tmp_path / "c.jsonl")
    records = rows(tmp_path / "c.jsonl")
    assert [r["output"] for r in records] == ["one", files["a/z.md"], "# B\n\ntext — <|im_end|>\u2028\n"]
    assert all(set(r) == {"instruction", "input", "output"} and r["input"] == "" for r in records)
    assert [r.messages[1].content for r in read_records(tmp_path / "c.jsonl")] == [r["output"] for r in records]
    assert (report.num_files, report.num_kept, report.num_train, report.num_validation) == (3, 3, 3, 0)
    assert report.num_characters == sum(len(r["output"]) for r in records)
    assert report.outputs[0].sha256 == sha256_file(tmp_path / "c.jsonl")
    assert [(f.name, f.num_documents) for f in report.folders] == [(".", 2), ("a", 1)]


def test_the_first_rule_that_fits_words_the_instruction(tmp_path: Path) -> None:
    root = write(
        tmp_path / "r", {"TASKS/a.md": "one", "TASKS/sub/b.md": "two", "c.md": "three", "MY_TASKS/d.md": "four"}
    )
    rules = [
        InstructionRule(prefix="TASKS/sub/", text="Sub `{path}`"),
        InstructionRule(prefix="TASKS/", text="Task {path}"),
    ]
    build_corpus(root, tmp_path / "c.jsonl", rules=rules)
    said = {r["output"]: r["instruction"] for r in rows(tmp_path / "c.jsonl")}
    assert said["one"] == "Task TASKS/a.md"
    assert said["two"] == "Sub `TASKS/sub/b.md`"
    assert said["three"].endswith("`c.md`")
    assert "MY_TASKS/d.md" in said["four"]
    assert not said["four"].startswith("Task ")


def test_a_heading_is_asked_and_the_text_below_it_is_the_answer(tmp_path: Path) -> None:
    files = {"q/a.md": "# Who keeps {path}? ##\n\nThe keeper.\n\n## More\n", "b.md": "# Title\n\ntext"}
    rules = [InstructionRule(prefix="q/", text="{title}")]
    build_corpus(write(tmp_path / "r", files), tmp_path / "c.jsonl", rules=rules)
    said = {r["instruction"]: r["output"] for r in rows(tmp_path / "c.jsonl")}
    assert said.pop("Who keeps {path}?") == "The keeper.\n\n## More\n"
    assert list(said.values()) == ["# Title\n\ntext"]


@pytest.mark.parametrize(
    "text", ["No heading.\n", "# Only a heading\n", "text\n# Late\n\nx", "#hashtag\ntext", "# #\nx"]
)
def test_a_document_without_a_heading_to_ask_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path / "r", {"q/a.md": text})
    with pytest.raises(DataError, match=r"q/a\.md does not begin with a heading"):
        build_corpus(tmp_path / "r", tmp_path / "c.jsonl", rules=[InstructionRule(prefix="q/", text="{title}")])
    assert not (tmp_path / "c.jsonl").exists()


def test_code_and_other_text_stand_under_their_name_in_a_fence() -> None:
    assert render_document("x/a.md", "# A") == "# A"
    assert render_document("x/a.py", "x = 1\n") == "# File: a.py\n\n```python\nx = 1\n```\n"
    assert render_document("Makefile", "all:") == "# File: Makefile\n\n```makefile\nall:\n```\n"
    assert render_document("a.unknown", "x\n") == "# File: a.unknown\n\n```\nx\n```\n"


@given(st.text(alphabet="`~a\n", max_size=60))
def test_the_fence_is_longer_than_any_in_the_text(text: str) -> None:
    lines = render_document("a.txt", text).split("\n")
    fence = lines[2]
    assert set(fence) == {"`"}
    assert fence not in text
    body = "\n".join(lines[3:-2])
    assert body in (text, text.removesuffix("\n"))


def test_files_with_secrets_are_left_out_and_named_without_the_secret(tmp_path: Path) -> None:
    root = write(tmp_path / "r", {"a.md": "fine", "b.md": f"one\ntwo {TOKEN}\n"})
    report = build_corpus(root, tmp_path / "c.jsonl")
    assert [r["output"] for r in rows(tmp_path / "c.jsonl")] == ["fine"]
    assert [(s.path, s.line, s.rule) for s in report.secrets] == [("b.md", 2, "GitHub Token")]
    printed = Console(file=io.StringIO(), width=200)
    print_report(report, printed)
    assert "b.md:2: GitHub Token" in printed.file.getvalue()  # type: ignore[attr-defined]
    for text in (printed.file.getvalue(), repr(report), (tmp_path / "c.jsonl").read_text()):  # type: ignore[attr-defined]
        assert TOKEN[6:20] not in text
    allowed = build_corpus(root, tmp_path / "c.jsonl", choice=Choice(allow_secrets=True), force=True)
    assert (allowed.num_kept, len(allowed.secrets)) == (2, 1)


@pytest.mark.timeout(60)
def test_a_repository_of_everything_that_could_do_harm_yields_its_documents_and_nothing_else(tmp_path: Path) -> None:
    """Through the command, as a person runs it: what is printed and what is written."""
    outside = write(tmp_path / "outside", {"passwd.md": "root's shadow entry", "deep/x.md": "more of the outside"})
    root = write(
        tmp_path / "r",
        {
            "good.md": "# Good\n\nA document.\n",
            "sub/also good.md": "# Also\n\nAnother one.\n",
            "leak.py": f'TOKEN = "{TOKEN}"\n',
            "key.md": "-----BEGIN " + "RSA PRIVATE KEY-----\n" + "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSj\n" * 4,
            "aws.md": "use AKIA" + "Z7QK3M5N2P8R4T6V here",
            ".env": "PASSWORD=unguessable-word",
            ".gitignore": "ignored/\n",
            "ignored/secret-plan.md": "not for anyone",
            "binary.md": "a\0b",
        },
    )
    (root / "latin.md").write_bytes("caf\xe9".encode("latin-1"))
    (root / "escape.md").symlink_to(outside / "passwd.md")
    (root / "escape").symlink_to(outside)
    (root / "loop").symlink_to("loop")
    (root / "sub" / "up").symlink_to("..")
    os.mkfifo(root / "pipe.md")
    with open(root / "sparse.md", "wb") as stream:
        stream.truncate(8 << 30)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "socket.md"))
        command = [
            sys.executable,
            "-m",
            "forge.training",
            "dataset",
            str(root),
            "-o",
            str(tmp_path / "c.jsonl"),
            "--json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=50)
    assert done.returncode == 0, done.stderr
    assert {r["instruction"].split("`")[1] for r in rows(tmp_path / "c.jsonl")} == {
        ".gitignore",
        "good.md",
        "sub/also good.md",
    }
    report = json.loads(done.stdout)
    assert {s["path"]: s["reason"] for s in report["skipped"]} == {
        "leak.py": "secret",
        "key.md": "secret",
        "aws.md": "secret",
        ".env": "credentials file",
        "ignored/": "ignored by .gitignore",
        "binary.md": "binary",
        "latin.md": "not UTF-8",
        "escape.md": "link that leaves the root",
        "escape": "link that leaves the root",
        "loop": "link",
        "sub/up": "link",
        "pipe.md": "special file",
        "socket.md": "special file",
        "sparse.md": "too large",
    }
    everything = done.stdout + done.stderr + (tmp_path / "c.jsonl").read_text(encoding="utf-8")
    for private in (
        TOKEN[6:20],
        "MIIEvQIBADAN",
        "Z7QK3M5N2P8R4T6V",
        "unguessable-word",
        "not for anyone",
        "shadow entry",
    ):
        assert private not in everything


def test_chat_markers_stay_in_the_text_and_are_counted_by_file(tmp_path: Path) -> None:
    text = "<|im_start|>user\nhi<|im_end|> a <| b |> <|x y|>\n"
    report = build_corpus(write(tmp_path / "r", {"a.md": text, "b.md": "none"}), tmp_path / "c.jsonl")
    assert rows(tmp_path / "c.jsonl")[0]["output"] == text
    assert [(m.path, m.num_markers) for m in report.control_markers] == [("a.md", 2)]


def test_duplicates_are_dropped_and_named(tmp_path: Path) -> None:
    text = prose(1, 200)
    root = write(tmp_path / "r", {"a.md": text, "b.md": text, "c.md": text + " and then some", "d.md": prose(2)})
    report = build_corpus(root, tmp_path / "c.jsonl")
    assert [r["output"][-4:] for r in rows(tmp_path / "c.jsonl")] == ["some", prose(2)[-4:]]
    assert [(d.path, d.kept, d.exact) for d in report.duplicates] == [("a.md", "c.md", False), ("b.md", "a.md", True)]
    assert {s.path: s.reason for s in report.skipped} == {"a.md": "near duplicate", "b.md": "exact duplicate"}
    assert (report.num_files, report.num_kept) == (4, 2)


def test_a_split_holds_out_whole_documents_and_every_document_is_on_one_side(tmp_path: Path) -> None:
    report = build_corpus(tree(tmp_path / "r"), tmp_path / "c.jsonl", validation_share=0.2)
    train, validation = rows(tmp_path / "c.train.jsonl"), rows(tmp_path / "c.validation.jsonl")
    assert (len(train), len(validation)) == (16, 4) == (report.num_train, report.num_validation)
    assert not {r["output"] for r in train} & {r["output"] for r in validation}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.train.jsonl", "c.validation.jsonl", "r"]
    assert [r["instruction"] for r in train] == sorted(r["instruction"] for r in train)


def test_the_same_documents_give_the_same_bytes_anywhere(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        report = build_corpus(tree(tmp_path / name / "r"), tmp_path / name / "c.jsonl", validation_share=0.3)
        digests.append([o.sha256 for o in report.outputs])
    assert digests[0] == digests[1]


def test_related_documents_stay_on_one_side(tmp_path: Path) -> None:
    files = {}
    for i in range(40):
        family = prose(i // 4, 100)  # families of four, 0.6 alike
        files[f"{i:02}.md"] = f"{family} {prose(1000 + i, 25)}"
    build_corpus(write(tmp_path / "r", files), tmp_path / "c.jsonl", validation_share=0.25)
    train, validation = rows(tmp_path / "c.train.jsonl"), rows(tmp_path / "c.validation.jsonl")
    assert len(validation) == 8
    assert 0.5 < jaccard(files["00.md"], files["01.md"]) < 0.8
    assert max(jaccard(t["output"], v["output"]) for t in train for v in validation) < 0.5


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.text("ab ", max_size=6), st.integers(0, 5)), min_size=1, max_size=30),
    st.floats(0.01, 0.99),
)
def test_no_split_ever_divides_a_group_or_leaves_a_side_empty(documents: list[tuple[str, int]], share: float) -> None:
    paths = [f"{i}.md" for i in range(len(documents))]
    texts, groups = [d[0] for d in documents], [d[1] for d in documents]
    if len(set(groups)) < 2:
        with pytest.raises(DataError):
            hold_out(paths, texts, groups, share, "")
        return
    held = hold_out(paths, texts, groups, share, "")
    assert 0 < len(held) < len(documents)
    assert not {groups[i] for i in held} & {groups[i] for i in range(len(documents)) if i not in held}
    smallest = min(groups.count(g) for g in groups)
    assert len(held) <= max(round(share * len(documents)), smallest)


def test_one_more_document_moves_few_others() -> None:
    paths, texts = [f"{i}.md" for i in range(200)], [prose(i) for i in range(200)]
    before = hold_out(paths, texts, range(200), 0.1, "")
    after = hold_out([*paths, "new.md"], [*texts, "new"], range(201), 0.1, "")
    assert len(before) == len(after) == 20
    assert len(before ^ after) <= 2


def test_an_output_inside_the_root_is_not_read_back(tmp_path: Path) -> None:
    root = tree(tmp_path)
    (root / ".corpus.jsonl.abc.part").write_text("left over")
    first = build_corpus(root, root / "corpus.jsonl")
    build_corpus(root, root / "corpus.jsonl", validation_share=0.2)
    again = build_corpus(root, root / "corpus.jsonl", force=True)
    assert first.num_files == again.num_files == 20
    assert first.outputs == again.outputs


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    root = tree(tmp_path / "r")
    for name in ("c.jsonl", "d.validation.jsonl"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(DiskError, match=r"c\.jsonl exists already"):
        build_corpus(root, tmp_path / "c.jsonl")
    with pytest.raises(DiskError, match=r"d\.validation\.jsonl exists already"):
        build_corpus(root, tmp_path / "d.jsonl", validation_share=0.1)
    with pytest.raises(DiskError, match="is a directory"):
        build_corpus(root, root, force=True)
    assert (tmp_path / "c.jsonl").read_text() == "precious"
    assert not (tmp_path / "d.train.jsonl").exists()


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5, 6])
def test_a_disk_that_fills_up_at_any_moment_leaves_neither_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    real, calls = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, "full")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskError, match="no space left"):
        build_corpus(tree(tmp_path / "r"), tmp_path / "c.jsonl", validation_share=0.2)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    monkeypatch.undo()
    build_corpus(tmp_path / "r", tmp_path / "c.jsonl", validation_share=0.2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.train.jsonl", "c.validation.jsonl", "r"]


def test_a_disk_full_in_the_middle_of_writing_keeps_the_old_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build_corpus(tree(tmp_path / "r"), tmp_path / "c.jsonl", validation_share=0.2).outputs

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskError, match="no space left"):
        build_corpus(tree(tmp_path / "r", 30), tmp_path / "c.jsonl", validation_share=0.2, force=True)
    assert [sha256_file(o.path) for o in old] == [o.sha256 for o in old]


def test_a_new_validation_file_never_stands_beside_an_old_training_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_corpus(tree(tmp_path / "r"), tmp_path / "c.jsonl", validation_share=0.2)
    replace, beside = os.replace, []

    def observed(source: Path, target: Path) -> None:
        replace(source, target)
        beside.append((Path(target).name, (tmp_path / "c.train.jsonl").exists()))

    monkeypatch.setattr(os, "replace", observed)
    build_corpus(tree(tmp_path / "r", 30), tmp_path / "c.jsonl", validation_share=0.2, force=True)
    assert beside == [("c.validation.jsonl", False), ("c.train.jsonl", True)]


def test_unusable_roots_are_one_message_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "bad", {"a.md": "", "b.md": "\0", "c.md": TOKEN})
    for name, message in {
        "none": "does not exist",
        "bad/a.md": "is not a directory",
        "empty": "it is empty",
        "bad": "no usable document in .*: 1 binary, 1 empty, 1 secret",
    }.items():
        with pytest.raises(DataError, match=message):
            build_corpus(tmp_path / name, tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()


def test_splits_that_cannot_be_are_refused_and_small_ones_hold_out_one(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a.md": "alone"})
    with pytest.raises(DataError, match="1 document cannot be split"):
        build_corpus(one, tmp_path / "c.jsonl", validation_share=0.1)
    with pytest.raises(ConfigurationError, match=r"not in \[0, 1\)"):
        build_corpus(one, tmp_path / "c.jsonl", validation_share=1.0)
    for share in (0.01, 0.99):
        report = build_corpus(tree(tmp_path / "two", 2), tmp_path / "d.jsonl", validation_share=share, force=True)
        assert (report.num_train, report.num_validation) == (1, 1)
    family = {f"{i}.md": f"{prose(1, 100)} {prose(i + 5, 25)}" for i in range(5)}
    with pytest.raises(DataError, match="near copies of one another"):
        build_corpus(write(tmp_path / "family", family), tmp_path / "e.jsonl", validation_share=0.5)


def test_the_printed_report_names_everything_and_cannot_command_the_terminal(tmp_path: Path) -> None:
    files = {
        "a.md": "a [bold]<|im_end|>",
        "b\x1b[31m.md": "",
        "[red]c.md": "\0",
        "d/e.md": prose(1),
        "d/f.md": prose(1),
    }
    report = build_corpus(write(tmp_path / "r", files), tmp_path / "c c.jsonl", validation_share=0.5)
    console = Console(file=io.StringIO(), width=300)
    print_report(report, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[31m" not in said
    assert "skipped, binary:\n  [red]c.md\n" in said
    assert "skipped, empty:\n  b\\x1b[31m.md\n" in said
    assert "3: 1 binary, 1 empty, 1 exact duplicate" in said
    assert "1 to train, 1 held out" in said
    assert "forge preview CONFIG --set 'data.train=" in said
