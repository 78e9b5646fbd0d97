"""Text and data without what belongs to one machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge.training.system.environment import ROOT
from harness.measurement.redact import log_tail, portable, without_paths
from tests.support.records import make_record


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('  File "/usr/lib/python3.11/json/decoder.py", line 3', '  File "decoder.py", line 3'),
        (f"saved to {ROOT}/runs/a b", "saved to a b"),
        (f"{ROOT}: dirty", f"{ROOT.name}: dirty"),
        (f"in {Path.home()} and {Path.home()}/.cache/forge/x", "in ~ and x"),
        ("PATH=/opt/a/bin:/usr/local/bin,/x/y", "PATH=bin:bin,y"),
        ("see https://host/a/b/c and data/train.jsonl", "see https://host/a/b/c and data/train.jsonl"),
        ("3 docs /s, 5/8 and/or", "3 docs /s, 5/8 and/or"),
        ("file:///mnt/disk/x.safetensors", "x.safetensors"),
    ],
)
def test_paths_are_reduced_to_their_last_component(text: str, expected: str) -> None:
    assert without_paths(text) == expected


def test_a_record_loses_its_paths_and_keeps_everything_else() -> None:
    record = make_record(notes=["best of /a/b c/d.txt"]).model_dump(mode="json")
    clean = portable(record)
    assert clean["workload"] == {"model": {"path": "base"}, "data": {"train": "train.jsonl"}}
    assert clean["base_path"] == "base"
    assert "/somewhere" not in json.dumps(clean)
    assert {k: v for k, v in clean.items() if k not in ("workload", "base_path", "notes")} == {
        k: v for k, v in record.items() if k not in ("workload", "base_path", "notes")
    }


def test_a_log_loses_colours_overwritten_lines_and_all_but_its_end() -> None:
    raw = b"x" * 9000 + b"\n\x1b[1;31merror:\x1b[0m red\r\n 10%\r 50%\r100%\n\x1b]0;title\x07end\xff\x00\n"
    tail = log_tail(raw)
    assert tail.endswith("\nerror: red\n100%\nend\ufffd")
    assert len(tail) == 4000
