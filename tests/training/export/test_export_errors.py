"""Claims about exports that cannot work: refused before work begins, nothing lost, nothing half-written."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from forge.training.adapter.merge import merge_adapter, usable_merge
from forge.training.export import disk_space
from forge.training.export.export import export_run
from forge.training.export.proof import reference_bytes
from forge.training.models.weights import read_weights
from forge.training.system.errors import CheckError, ConfigurationError, DataError, DiskError, LockedError, MachineError
from forge.training.system.files import locked
from forge.training.train.record import read_record
from tests.support.tiny_model import shared_base
from tests.support.tiny_run import edit_json, made_up_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return made_up_run(tmp_path / "run")


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock"}


def use_own_base(run: Path) -> Path:
    base = run.parent / "base"
    shutil.copytree(shared_base(), base)
    edit_json(run / "run.json", base_path=str(base))
    return base


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "run not completed": (
        lambda run: edit_json(run / "run.json", status="diverged"),
        DataError,
        "is diverged at step 7",
    ),
    "no run": (lambda run: (run / "run.json").unlink(), DataError, "is not a run"),
    "adapter gone": (lambda run: shutil.rmtree(run / "adapter"), DataError, "is missing"),
    "adapter of another run": (
        lambda run: edit_json(run / "run.json", adapter_sha256="0" * 64),
        DataError,
        "not the adapter",
    ),
    "base gone": (lambda run: edit_json(run / "run.json", base_path="/nowhere"), DataError, "no longer in /nowhere"),
    "architecture": (
        lambda run: edit_json(use_own_base(run) / "config.json", architectures=["UnheardOfForCausalLM"]),
        MachineError,
        "UnheardOfForCausalLM",
    ),
    "output is no export": (
        lambda run: ((run / "export").mkdir(), (run / "export" / "thesis.md").write_text("three years")),
        DiskError,
        r"exists already and holds no export, but thesis\.md",
    ),
    "output is a file": (lambda run: (run / "export").write_text("x"), DiskError, "is not a folder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_exported_is_refused_before_work_begins(run_dir: Path, name: str) -> None:
    spoil, kind, complaint = BROKEN[name]
    spoil(run_dir)
    before, started = contents(run_dir), time.monotonic()
    with pytest.raises(kind, match=complaint):
        export_run(run_dir, quantizations=["f16"])
    assert time.monotonic() - started < 3
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("quantizations", "complaint"),
    [(["q4_k_m", "q9_z"], "'q9_z'"), ([], "no quantisation"), (["f16", "f16"], "f16, f16")],
)
def test_wrong_quantisations_are_refused(run_dir: Path, quantizations: list[str], complaint: str) -> None:
    (run_dir / "export").mkdir()
    (run_dir / "export" / "mine.txt").touch()  # in the way, and told only after the mistake in what was asked
    with pytest.raises(ConfigurationError, match=complaint):
        export_run(run_dir, quantizations=quantizations)


def test_another_base_than_the_runs_is_refused_and_nothing_is_left(run_dir: Path) -> None:
    base = use_own_base(run_dir)
    shard = next(base.glob("*00001-of*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    before = contents(run_dir)
    with pytest.raises(DataError, match="not the base that was trained on"):
        export_run(run_dir, quantizations=["f16"])
    assert contents(run_dir) == before


def test_too_full_a_disk_is_refused_with_both_numbers(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**12, 10**12, 10**6)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskError, match=r"the export needs \d\d\.\d MB in .*, 1\.0 MB are free"):
        export_run(run_dir, quantizations=["f16"])


def test_disk_need_counts_what_lies_there_at_the_same_time() -> None:
    base = read_weights(shared_base())
    sixteen_bit = base.num_bytes

    def need(*quantizations: str, merged: bool = True, kept: bool = False) -> float:
        fixed = (64 << 20) + reference_bytes(base)
        total = disk_space.peak_disk_bytes(
            base, quantizations, adapter_bytes=0, writes_merged=merged, keeps_merged=kept
        )
        return (total - fixed) / (1.02 * sixteen_bit)

    assert need("f16") == pytest.approx(2, rel=0.01)  # merged and f16
    assert need("q4_k_m") == pytest.approx(2, rel=0.01)  # the same; then merged makes room for q4_k_m
    assert need("f16", merged=False) == pytest.approx(1, rel=0.01)
    assert need("q8_0", "q4_k_m", kept=True) == pytest.approx(2 + (8.5 + 5.1) / 16, rel=0.01)


def test_rows_that_do_not_divide_are_refused_unless_larger_types_are_accepted(run_dir: Path) -> None:
    base = read_weights(shared_base())
    disk_space.check_row_sizes(base, ["q8_0", "q4_k_m"])
    narrow = base.tensors["model.norm.weight"].__class__("model.x.weight", "BF16", (8, 896), 0, 0)
    base.tensors["model.x.weight"] = narrow
    disk_space.check_row_sizes(base, ["q8_0", "f16"])
    with pytest.raises(ConfigurationError, match=r"model\.x\.weight with 896"):
        disk_space.check_row_sizes(base, ["q4_k_m"])


def test_two_exports_of_one_run_at_a_time_are_refused(run_dir: Path) -> None:
    with locked(run_dir), pytest.raises(LockedError, match="in use by process"):
        export_run(run_dir, quantizations=["f16"])


def test_a_failing_file_fails_the_export_and_keeps_the_old_one(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = use_own_base(run_dir)
    (base / "tokenizer.json").write_text('{"not": "a tokenizer"}')
    (run_dir / "export").mkdir()
    (run_dir / "export" / "old.gguf").write_text("kept")
    (run_dir / "export" / "export.json").write_text('{"files": [{"name": "old.gguf"}]}')
    before = contents(run_dir)
    with pytest.raises((CheckError, DataError)):
        export_run(run_dir, quantizations=["f16"], force=True)
    assert contents(run_dir) == before


EXPORT = (
    "import sys; from forge.training.export.export import export_run; export_run(sys.argv[1], quantizations=['q8_0'])"
)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_an_interrupted_export_leaves_nothing_under_its_name_and_can_be_repeated(run_dir: Path, number: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", EXPORT, str(run_dir)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(run_dir.glob(".export.*.part/merged/merge.json")):  # the conversion begins
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    process.wait()
    assert not (run_dir / "export").exists()
    assert any(run_dir.glob(".export.*.part")) == (number == signal.SIGKILL)
    if number == signal.SIGKILL:
        record = export_run(run_dir, quantizations=["q8_0"], keep_merged=True)
        assert sorted(os.listdir(run_dir)) == [".lock", "adapter", "export", "merged", "run.json"]
        assert sorted(os.listdir(run_dir / "export")) == [
            *("Modelfile", "README.md", "SHA256SUMS", "export.json", "lighthouse.q8_0.gguf")
        ]
        assert own_merge(run_dir) == record.merge


def own_merge(run_dir: Path, **others: str) -> object:
    run = read_record(run_dir)
    base_sha256 = others.get("base_sha256", run.inputs.base_sha256)
    return usable_merge(run_dir / "merged", Path(run.base_path), run_dir / "adapter", base_sha256)


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


SPOILED_MERGES: dict[str, Callable[[Path], object]] = {
    "a weight": lambda merged: flip_last_byte(next(merged.glob("*00002-of*"))),
    "a file too many": lambda merged: (merged / "model-extra.safetensors").write_bytes(b""),
    "a file too few": lambda merged: next(merged.glob("*00002-of*")).unlink(),
    "the tokenizer": lambda merged: edit_json(merged / "tokenizer.json", truncation=None),
    "a tokenizer added": lambda merged: (merged / "added_tokens.json").write_text("{}"),
    "the configuration": lambda merged: edit_json(merged / "config.json", rope_theta=5.0),
    "its digests": lambda merged: edit_json(merged / "merge.json", merged_sha256="0" * 64),
    "another adapter": lambda merged: edit_json(merged.parent / "adapter" / "adapter_config.json", lora_alpha=16),
}


@pytest.mark.parametrize("name", SPOILED_MERGES)
def test_a_merge_that_was_changed_since_is_not_used(run_dir: Path, name: str) -> None:
    base_sha256 = read_record(run_dir).inputs.base_sha256
    made = merge_adapter(shared_base(), run_dir / "adapter", run_dir / "merged", expected_base_sha256=base_sha256)
    assert own_merge(run_dir) == asdict(made)
    assert own_merge(run_dir, base_sha256="0" * 64) is None
    SPOILED_MERGES[name](run_dir / "merged")
    assert own_merge(run_dir) is None
