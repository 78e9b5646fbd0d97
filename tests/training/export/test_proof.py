"""Claim: a GGUF file with a fault is caught, by the name of the check, before it gets its name; a good one passes.

The adapter, its reference, the converter and llama.cpp are real; the base is one of four architectures of tiny size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from forge.training.adapter.merge import merge_adapter
from forge.training.data.conversation import load_encoder
from forge.training.export.export import export_run
from forge.training.export.gguf import convert_to_gguf, quantize, verify_gguf
from forge.training.export.proof import Proof, proof_of
from forge.training.models.weights import read_weights
from forge.training.system.errors import CheckError, MachineError
from harness.parity.probes.architecture import write_architecture
from tests.support.gguf_faults import FAULTS, rewrite
from tests.support.tiny_model import scratch, write_adapter, write_base
from tests.support.tiny_run import made_up_run, write_run

BASES = ("qwen2 tied", "qwen2", "llama", "qwen3")


@dataclass(frozen=True)
class Ready:
    """A run of a tiny base whose merged weights are a GGUF file, and what its files are compared with."""

    proof: Proof
    gguf: Path


def wrong_tokenizer_files(directory: Path) -> None:
    """A BPE of bytes that is said to spell unknown characters as bytes, its words parted by blanks alone."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["byte_fallback"] = True
    content["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    path.write_text(json.dumps(content))


@cache
def ready(base: str, wrong_tokenizer: bool = False) -> Ready:
    """Made once for all tests; nobody may change it."""
    place = scratch() / f"proof-{base.replace(' ', '-')}-{wrong_tokenizer}"
    qwen2 = place / "qwen2"
    write_base(qwen2, tied=base.endswith("tied"), dtype="float16")
    base_dir = qwen2
    if base in ("llama", "qwen3"):
        base_dir = place / base
        write_architecture(qwen2, base_dir, base)
    if wrong_tokenizer:
        wrong_tokenizer_files(base_dir)
    run_dir = place / "run"
    write_adapter(base_dir, run_dir / "adapter")
    run = write_run(run_dir, base_dir)
    weights = read_weights(base_dir)
    proof = proof_of(run, run_dir, weights, load_encoder(base_dir))
    merge_adapter(base_dir, run_dir / "adapter", place / "merged")
    with proof.open_reference():
        proof.measure_reference(run_dir / "adapter", place / "reference", lambda _: None)
        proof.measure_merge(place / "merged")
    convert_to_gguf(place / "merged", place / "model.gguf", "f16")
    return Ready(proof, place / "model.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_good_files_pass_every_check(base: str, tmp_path: Path) -> None:
    model = ready(base)
    proof, _ = model.proof.prove(model.gguf, "f16")
    assert proof.flags == []
    assert proof.reading.faults == {}
    assert proof.reading.num_strings > 400
    assert proof.predictions.mean_kl < 1e-4
    for kind in ("q8_0", "q4_k_m"):
        quantize(model.gguf, tmp_path / f"{kind}.gguf", kind)  # type: ignore[arg-type]
        assert model.proof.prove(tmp_path / f"{kind}.gguf", kind)[0].flags == []


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_name(fault: str, base: str, tmp_path: Path) -> None:
    model, (plant, check) = ready(base), FAULTS[fault]
    path = tmp_path / "faulty.gguf"
    rewrite(model.gguf, path, plant)
    with pytest.raises(CheckError, match=rf"(^|: )({check}): "):
        model.proof.prove(path, "f16")


@pytest.mark.slow
def test_a_file_written_again_unchanged_passes(tmp_path: Path) -> None:
    rewrite(ready("llama").gguf, tmp_path / "same.gguf", lambda fields, tensors: None)
    verify_gguf(tmp_path / "same.gguf")
    assert ready("llama").proof.prove(tmp_path / "same.gguf", "f16")[0].flags == []


@pytest.mark.slow
def test_a_base_whose_tokenizer_files_llama_cpp_cannot_read_is_caught() -> None:
    """Before this, such files trained, were exported, and llama.cpp aborted at the first question."""

    def export() -> None:
        model = ready("llama", wrong_tokenizer=True)
        model.proof.prove(model.gguf, "f16")

    with pytest.raises(CheckError, match=r"not a byte-level BPE|tokens: "):
        export()


@pytest.mark.slow
def test_where_the_adapter_does_not_fit_into_memory_the_rest_is_proven_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise MachineError("the model's 14.2 GiB at 16 bits do not fit: 9.8 GiB are free")

    monkeypatch.setattr(Proof, "measure_reference", too_large)
    record = export_run(made_up_run(tmp_path / "run"), quantizations=["f16"])
    assert any("predictions are not compared: the model's 14.2 GiB" in note for note in record.notes)
    assert any(note.startswith("lighthouse.f16.gguf: its predictions were not compared") for note in record.notes)
    (report,) = record.files
    assert report.proof is not None
    assert report.proof.predictions is None
    assert report.proof.reading.num_strings > 400
