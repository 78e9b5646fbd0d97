"""Claims about a whole export and its model card, on a run that needs no training."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path

import pytest

from forge.training.export.card import write_card
from forge.training.export.export import export_run
from forge.training.export.export_record import ExportRecord
from forge.training.export.modelfile import parse_modelfile
from forge.training.record import read_record
from tests.tiny_model import scratch, shared_adapter, shared_base
from tests.tiny_run import write_run

QUANTIZATIONS = ("q8_0", "q4_k_m")
EVALUATION = {
    "subjects": {"base": {"nats": 3.25, "bits_per_byte": 1.5}, "merged": {"nats": 1.125, "bits_per_byte": 0.5}},
    "answers": [{"text": "long"}],
}


@cache
def exported() -> tuple[Path, ExportRecord]:
    run_dir = scratch() / "run"
    shutil.copytree(shared_adapter(), run_dir / "adapter")
    write_run(run_dir, shared_base())
    (run_dir / "evaluation.json").write_text(json.dumps(EVALUATION))
    return run_dir, export_run(run_dir, quantizations=QUANTIZATIONS, lora=True)


def test_an_export_holds_what_was_asked_and_no_intermediate_files() -> None:
    run_dir, record = exported()
    names = {"Modelfile", "README.md", "SHA256SUMS", "export.json", "lighthouse-lora.gguf"}
    names |= {f"lighthouse.{name}.gguf" for name in QUANTIZATIONS}
    assert {path.name for path in (run_dir / "export").iterdir()} == names
    assert {path.name for path in run_dir.iterdir()} == {"adapter", "run.json", "evaluation.json", "export", ".lock"}
    assert [step.name for step in record.steps if not step.name.startswith("verify")] == [
        *("merge", "convert f16", "quantise q8_0", "quantise q4_k_m", "convert adapter")
    ]
    assert all(step.seconds > 0 and step.peak_rss_bytes > 0 for step in record.steps)


def test_sha256sums_and_the_record_name_every_file_by_content() -> None:
    run_dir, record = exported()
    folder = run_dir / "export"
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    written = json.loads((folder / "export.json").read_text())
    assert {report["name"]: report["sha256"] for report in written["files"]}.items() <= sums.items()
    run = read_record(run_dir)
    assert (record.base_sha256, record.adapter_sha256) == (run.inputs.base_sha256, run.adapter_sha256)
    assert written["merge"]["merged_sha256"] == record.merged_sha256


def test_the_modelfile_serves_the_smallest_file_with_the_workloads_settings() -> None:
    commands = [
        (command.name, command.value) for command in parse_modelfile((exported()[0] / "export/Modelfile").read_text())
    ]
    assert ("model", "./lighthouse.q4_k_m.gguf") in commands
    assert ("system", 'You keep a "lighthouse".') in commands
    assert ("temperature", "0.2") in commands
    assert ("stop", "<|im_end|>") in commands
    assert "You are a helpful assistant." in dict(commands)["template"]


@pytest.mark.parametrize(
    "fact",
    [
        *("# lighthouse", "base_model: tiny", "lighthouse.q4_k_m.gguf", "| 3,456, of which 1,234 carry the loss |"),
        *("| last train loss | 1.2500 |", "| merged | 1.1250 | 0.5000 |", "torch 2.13.0", "| 12.5 s |", "3.00 GiB"),
        *("ollama create lighthouse", "12; validation: 3 held-out examples", "rank 16, alpha 32", "c" * 64, "e" * 64),
    ],
)
def test_the_card_says(fact: str) -> None:
    assert fact in (exported()[0] / "export" / "README.md").read_text()


def test_the_card_names_every_artefact_of_the_chain_and_nothing_of_this_machine() -> None:
    run_dir, record = exported()
    text = (run_dir / "export" / "README.md").read_text() + (run_dir / "export" / "export.json").read_text()
    for digest in (record.base_sha256, record.adapter_sha256, record.merged_sha256, *(f.sha256 for f in record.files)):
        assert digest in text
    for private in (str(scratch()), str(Path.home()), "secret-tool", "None", "nan"):
        assert private not in text


def test_a_card_leaves_out_what_was_not_measured() -> None:
    run_dir, record = exported()
    run = read_record(run_dir).model_copy(update={"trainable": None, "memory": [], "environment": {}})
    text = write_card(run, record, None)
    assert "Held-out documents" not in text
    assert "peak GPU memory" not in text
    assert "None" not in text
