"""Checkpoints: complete or not there, newest by content, never the last good one deleted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from forge.training.system.errors import DataError, DiskError
from forge.training.train import checkpoint
from forge.training.train.checkpoint import SEAL, Checkpoint, choose, problem, rotate

IDENTITY = {"workload": "a" * 64, "base": "b" * 64}
FILES = (
    *("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt"),
    *("rng_state.pth", "trainer_state.json"),
)


def write(directory: Path, step: int, *, sealed: bool = True, best: bool = False) -> Path:
    path = directory / "checkpoints" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in FILES:
        (path / name).write_bytes(f"{name} of step {step}".encode() * 20)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (directory / "steps.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1, step + 1)))
    if best:
        (directory / "best").mkdir(exist_ok=True)
        (directory / "best" / "adapter_model.safetensors").write_bytes(b"best of step %d" % step)
    checkpoint.add_run_state(path, directory / "steps.jsonl", directory / "best" if best else None)
    if sealed:
        checkpoint.seal(path, IDENTITY, train_seconds=1.5 * step)
    return path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("hurt", [truncate, flip_a_bit, empty, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, "steps.jsonl", "best.adapter_model.safetensors", SEAL])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, name: str, hurt: Callable[[Path], None]
) -> None:
    write(tmp_path, 8, best=True)
    newest = write(tmp_path, 12, best=True)
    hurt(newest / name)
    found, remarks = choose(tmp_path / "checkpoints", IDENTITY)
    assert found == Checkpoint(tmp_path / "checkpoints" / "checkpoint-8", 8, 12.0)
    assert len(remarks) == 1
    assert "checkpoint-12 is not used" in remarks[0]
    assert name in remarks[0] or (name == SEAL and hurt == Path.unlink and "never sealed" in remarks[0])
    assert not newest.exists()  # the run comes to step 12 again and must find nothing there


def test_with_no_valid_checkpoint_left_the_run_does_not_begin_anew(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        truncate(write(tmp_path, step) / "optimizer.pt")
    with pytest.raises(DiskError, match="no checkpoint") as caught:
        choose(tmp_path / "checkpoints", IDENTITY)
    assert all(f"checkpoint-{step}: optimizer.pt is damaged" in str(caught.value) for step in (4, 8, 12))
    assert caught.value.exit_code == 6
    assert (tmp_path / "checkpoints" / "checkpoint-12" / SEAL).is_file()  # refused, and left where it is


def test_a_first_save_that_never_finished_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 4, sealed=False)
    found, remarks = choose(tmp_path / "checkpoints", IDENTITY)
    assert found is None
    assert "never sealed" in remarks[0]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "steps.jsonl"])
def test_a_checkpoint_sealed_without_a_part_is_never_a_cold_start(tmp_path: Path, name: str) -> None:
    write(tmp_path, 8)
    path = write(tmp_path, 12, sealed=False)
    (path / name).unlink()
    checkpoint.seal(path, IDENTITY, train_seconds=0)
    assert problem(path) == ("damaged", f"{name} is missing")


def test_half_precision_needs_its_scaler(tmp_path: Path) -> None:
    assert problem(write(tmp_path, 8), needs_scaler=True) == ("damaged", "scaler.pt is missing")


def test_the_newest_is_the_one_of_most_steps_and_strangers_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 200)
    newest = write(tmp_path, 1000)
    there = tmp_path / "checkpoints"
    os.utime(newest, (0, 0))
    (there / "checkpoint-best").mkdir()
    (there / "checkpoint-8000.tmp").mkdir()
    (there / "checkpoint-9000").write_text("a file")
    (there / "checkpoint-9999").symlink_to(newest)
    found, remarks = choose(there, IDENTITY)
    assert found is not None
    assert (found.step, remarks) == (1000, [])
    rotate(there, keep=1)
    names = {"checkpoint-1000", "checkpoint-best", "checkpoint-8000.tmp", "checkpoint-9000", "checkpoint-9999"}
    assert {path.name for path in there.iterdir()} == names


def test_a_checkpoint_under_the_name_of_another_step_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path, 8)
    os.replace(write(tmp_path, 12), tmp_path / "checkpoints" / "checkpoint-16")
    found, remarks = choose(tmp_path / "checkpoints", IDENTITY)
    assert found is not None
    assert found.step == 8
    assert "it holds step 12" in remarks[0]


def test_a_checkpoint_of_other_work_is_refused_with_old_and_new(tmp_path: Path) -> None:
    write(tmp_path, 8)
    with pytest.raises(DataError, match=f"base: {'b' * 64} -> {'c' * 64}"):
        choose(tmp_path / "checkpoints", IDENTITY | {"base": "c" * 64})


def test_retention_goes_by_steps_and_keeps_what_the_run_resumed_from(tmp_path: Path) -> None:
    paths = {step: write(tmp_path, step, sealed=step != 15) for step in (5, 10, 15, 20, 25)}
    for age, step in enumerate((25, 20, 15, 10, 5)):  # as a restored copy scrambles them
        os.utime(paths[step], (age, age))
    rotate(tmp_path / "checkpoints", keep=2, resumed_from=paths[5])
    assert [step for step, path in paths.items() if path.exists()] == [5, 20, 25]


def test_a_checkpoint_that_is_half_deleted_does_not_look_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, 8)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before a file of it was gone
    checkpoint.delete(path)
    assert problem(path) == ("unsealed", "it was never sealed (the save did not finish)")


def test_log_and_best_adapter_come_back_to_the_moment_of_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 8, best=True)
    later = write(tmp_path, 12, best=True)
    shutil.rmtree(later)
    found, _ = choose(tmp_path / "checkpoints", IDENTITY)
    assert found is not None
    (tmp_path / "best").rename(tmp_path / "best.later")
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "adapter_model.safetensors").write_bytes(b"best of step 11")
    checkpoint.restore(found, tmp_path / "steps.jsonl", tmp_path / "best")
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 8
    assert (tmp_path / "best" / "adapter_model.safetensors").read_bytes() == b"best of step 8"
