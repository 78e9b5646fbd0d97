"""Claims about a directory that is being written: it is there whole or not at all, whoever stops whom."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.errors import LockedError
from forge.training.system.files import clear_leftovers, staged_directory


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_another_process_is_writing_is_no_leftover(tmp_path: Path) -> None:
    """Two runs exported to one place at the same time."""
    target = tmp_path / "model"
    with staged_directory(target) as staging:
        (staging / "file").write_text("half")
        with pytest.raises(LockedError, match="another process is writing"):
            clear_leftovers(target)
        clear_leftovers(tmp_path / "mod")  # a name that this one begins with
        (staging / "file").write_text("whole")
    assert contents(tmp_path) == {"model/file": b"whole"}


def test_what_was_being_replaced_gets_its_name_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal, or an error, between the two renames."""
    target = tmp_path / "model"
    with staged_directory(target) as staging:
        (staging / "file").write_text("old")
    real = os.replace

    def stop_at_the_second(source: Any, destination: Any) -> None:
        if Path(source).suffix == ".part":
            raise KeyboardInterrupt
        real(source, destination)

    monkeypatch.setattr(os, "replace", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt), staged_directory(target, force=True) as staging:
        (staging / "file").write_text("new")
    assert contents(tmp_path) == {"model/file": b"old"}
    monkeypatch.undo()
    old = tmp_path / ".model.abcdefgh.old"  # as a kill between the two leaves it
    old.mkdir()
    target.rename(old / "model")
    clear_leftovers(target)
    assert contents(tmp_path) == {"model/file": b"old"}
