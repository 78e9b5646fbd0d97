"""The trained base is made once: found by its note or named by its directory, and never made by a session left out."""

from __future__ import annotations

from pathlib import Path

from forge.training.system.files import write_json
from harness.measurement.results import Store
from harness.trained_base import BASE, shared_folder, trained_base


def test_a_base_is_found_by_its_note_or_directory_and_is_not_made_where_nothing_may_be(tmp_path: Path) -> None:
    store, lines = Store(tmp_path / "store"), list[str]()

    def found(name: str) -> Path | None:
        return trained_base(name, store, measures=False, announce=lines.append)

    assert found(BASE) is None
    assert found(str(tmp_path)) == tmp_path
    write_json(shared_folder(store) / "base.json", {"name": BASE, "directory": str(tmp_path)})
    assert found(BASE) == tmp_path
    assert found("another") is None
    assert lines == []
