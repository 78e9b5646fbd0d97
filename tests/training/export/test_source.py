"""Claim: a run that is not finished is exported from the checkpoint that was named, and says so everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from forge.training.export.export import export_run
from forge.training.export.source import chosen_types, source_of
from forge.training.system.errors import ConfigurationError, DataError
from forge.training.system.files import sha256_file
from forge.training.train.checkpoint import seal
from forge.training.train.record import read_record
from tests.support.tiny_model import shared_adapter, shared_base, write_adapter
from tests.support.tiny_run import edit_json, made_up_run

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A run stopped at step 3 of 7, with sealed checkpoints of steps 2 and 3 and a better adapter before them."""
    run = made_up_run(tmp_path / "run")
    write_adapter(shared_base(), tmp_path / "best", lora_alpha=8)
    edit_json(run / "run.json", status="interrupted", num_steps=3, adapter_sha256=None)
    shutil.rmtree(run / "adapter")
    for step in (2, 3):
        place = run / "checkpoints" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        for name in (WEIGHTS, "adapter_config.json"):
            shutil.copyfile(shared_adapter() / name, place / name)
            shutil.copyfile(tmp_path / "best" / name, place / f"best.{name}")
        with (place / WEIGHTS).open("r+b") as stream:  # each step another adapter
            stream.seek(-2, 2)
            stream.write(bytes([0, step]))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "steps.jsonl"):
            (place / name).write_text("")
        (place / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
        seal(place, {}, train_seconds=1.0)
    return run


@pytest.mark.parametrize(
    ("wanted", "suffix", "file"),
    [
        ("last", "step-3", f"checkpoint-3/{WEIGHTS}"),
        ("2", "step-2", f"checkpoint-2/{WEIGHTS}"),
        ("best", "best-3", f"checkpoint-3/best.{WEIGHTS}"),
    ],
)
def test_the_adapter_is_that_of_the_checkpoint(unfinished: Path, wanted: str, suffix: str, file: str) -> None:
    digest = sha256_file(unfinished / "checkpoints" / file)
    with source_of(unfinished, wanted) as source:
        assert sha256_file(source.adapter_dir / WEIGHTS) == source.run.adapter_sha256 == digest
        assert source.suffix == suffix
        assert source.run.workload["name"] == f"lighthouse-{suffix}"
        assert "of a run that is not finished (interrupted)" in str(source.remark)
    assert not source.adapter_dir.exists()
    assert read_record(unfinished).adapter_sha256 is None


def test_what_cannot_be_exported_is_said(unfinished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no complete checkpoint '5'") as error, source_of(unfinished, "5"):
        pass
    assert "one of 2, 3" in str(error.value.remedy)
    with pytest.raises(DataError, match="is interrupted at step 3 of 7"), source_of(unfinished):
        pass
    for step in (2, 3):
        (unfinished / "checkpoints" / f"checkpoint-{step}" / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(DataError, match="no complete checkpoint yet"), source_of(unfinished, "last"):
        pass
    complete = made_up_run(tmp_path / "complete")
    with pytest.raises(ConfigurationError, match="is complete"), source_of(complete, "last"):
        pass


@pytest.mark.slow
def test_its_export_has_a_folder_and_names_of_its_own_and_says_so(unfinished: Path) -> None:
    said: list[str] = []
    record = export_run(unfinished, quantizations=["q8_0"], checkpoint="last", progress=said.append)
    folder = unfinished / "export-step-3"
    assert (folder / "lighthouse-step-3.q8_0.gguf").is_file()
    assert not (unfinished / "export").exists()
    for text in (said[0], record.notes[0], (folder / "README.md").read_text()):
        assert "made of step 3 of 7, of a run that is not finished (interrupted)" in text
    assert sorted(p.name for p in unfinished.iterdir()) == [".lock", "checkpoints", "export-step-3", "run.json"]


def test_the_types_are_those_that_were_asked_for(tmp_path: Path, unfinished: Path) -> None:
    run = made_up_run(tmp_path / "complete")
    assert chosen_types(run, None, None, force=False, is_unfinished=False) == ["f16", "q8_0", "q4_k_m"]
    assert chosen_types(unfinished, None, None, force=False, is_unfinished=True) == ["f16", "q8_0", "q4_k_m"]
    assert chosen_types(run, None, "Q5_K_M,iq4xs", force=False, is_unfinished=False) == ["q5_k_m", "iq4_xs"]
    for quantizations, force in (("f16", False), (None, True)):
        with pytest.raises(ConfigurationError, match="--add keeps what is there"):
            chosen_types(run, quantizations, "q8_0", force=force, is_unfinished=False)
