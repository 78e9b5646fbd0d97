"""Claims about exports into a folder that is there: one more file costs itself, nothing else is lost or out of date."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from forge.training.export.export import export_run
from forge.training.export.folder import ExportFolder
from forge.training.system.errors import CheckError, DataError, DiskError
from forge.training.system.files import sha256_file
from tests.support.tiny_model import scratch
from tests.support.tiny_run import edit_json, made_up_run

MADE = {"Modelfile", "README.md", "SHA256SUMS", "export.json", "lighthouse.f16.gguf"}


@cache
def exported_once() -> Path:
    """A run exported as f16; nobody may change it."""
    run = made_up_run(scratch() / "exported-once")
    export_run(run, quantizations=["f16"])
    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_once(), tmp_path / "run"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def sums_hold(folder: Path) -> bool:
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    named = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    own = names(folder) - {"SHA256SUMS", "thesis.md", "notes"}
    return set(named) == own and all(sha256_file(folder / name) == digest for name, digest in named.items())


@pytest.mark.slow
def test_one_more_quantisation_is_made_from_the_file_that_is_there_and_the_others_stay(run_dir: Path) -> None:
    f16, written = run_dir / "export" / "lighthouse.f16.gguf", contents(run_dir / "export")
    stamp = f16.stat().st_mtime_ns
    (run_dir / "export" / "thesis.md").write_text("three years")
    record = export_run(run_dir, quantizations=["q8_0"])
    assert [step.name for step in record.steps] == [
        *("adapter's predictions", "quantise q8_0", "verify q8_0", "prove q8_0")
    ]
    assert [report.file_type for report in record.files] == ["f16", "q8_0"]
    assert names(run_dir / "export") == MADE | {"lighthouse.q8_0.gguf", "thesis.md"}
    assert (f16.read_bytes(), f16.stat().st_mtime_ns) == (written["lighthouse.f16.gguf"], stamp)
    assert "FROM ./lighthouse.q8_0.gguf" in (run_dir / "export" / "Modelfile").read_text()
    assert sums_hold(run_dir / "export")
    assert not [path for path in run_dir.iterdir() if path.name.startswith(".export")]


def test_the_same_export_again_does_nothing_and_says_so(run_dir: Path) -> None:
    before, said = contents(run_dir / "export"), list[str]()
    record = export_run(run_dir, quantizations=["f16"], progress=said.append)
    assert [report.name for report in record.files] == ["lighthouse.f16.gguf"]
    assert said == [f"{run_dir / 'export'} is complete: nothing to do"]
    assert contents(run_dir / "export") == before


def test_force_makes_everything_again_and_removes_only_what_an_export_made(run_dir: Path) -> None:
    folder = run_dir / "export"
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    (folder / "thesis.md").write_text("three years")
    record = export_run(run_dir, quantizations=["q8_0"], force=True)
    assert "merge" in [step.name for step in record.steps]
    assert names(folder) == (MADE - {"lighthouse.f16.gguf"}) | {"lighthouse.q8_0.gguf", "thesis.md", "notes"}
    assert (folder / "notes" / "a.txt").read_text() == "mine"
    assert sums_hold(folder)


def test_a_file_of_the_users_own_under_a_name_that_is_needed_is_refused_and_stays(run_dir: Path) -> None:
    (run_dir / "export" / "lighthouse.q8_0.gguf").write_text("mine")
    for force in (False, True):
        with pytest.raises(DiskError, match=r"lighthouse\.q8_0\.gguf exists already and is not of this export"):
            export_run(run_dir, quantizations=["q8_0"], force=force)
    assert (run_dir / "export" / "lighthouse.q8_0.gguf").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link_and_the_current_folder_can_be_named(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "export").rename(tmp_path / "elsewhere")
    (run_dir / "export").symlink_to(tmp_path / "elsewhere")
    export_run(run_dir, quantizations=["q8_0"])
    assert (run_dir / "export").is_symlink()
    assert names(tmp_path / "elsewhere") == MADE | {"lighthouse.q8_0.gguf"}
    monkeypatch.chdir(tmp_path / "elsewhere")
    export_run(run_dir, quantizations=["q4_k_m"], out_dir=Path())
    assert "lighthouse.q4_k_m.gguf" in names(tmp_path / "elsewhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "run"]


def test_a_mount_point_is_refused_before_work_begins(run_dir: Path) -> None:
    with pytest.raises(DiskError, match="/proc is a mount point") as error:
        export_run(run_dir, quantizations=["q8_0"], out_dir=Path("/proc"))
    assert "--out /proc/export" in str(error.value.remedy)


def test_a_modelfile_that_its_owner_edited_stays_until_force(run_dir: Path) -> None:
    modelfile, said = run_dir / "export" / "Modelfile", list[str]()
    modelfile.write_text(modelfile.read_text() + "PARAMETER seed 5\n")
    edited = modelfile.read_text()
    export_run(run_dir, quantizations=["f16", "q8_0"], progress=said.append)
    assert modelfile.read_text() == edited
    assert any("Modelfile was changed by hand" in line for line in said)
    assert sums_hold(run_dir / "export")
    export_run(run_dir, quantizations=["f16"], force=True)
    assert "seed 5" not in modelfile.read_text()


def test_a_file_that_was_deleted_is_made_again_and_no_longer_listed_before(run_dir: Path) -> None:
    (run_dir / "export" / "lighthouse.f16.gguf").unlink()
    record = export_run(run_dir, quantizations=["q8_0"])
    assert [report.file_type for report in record.files] == ["q8_0"]
    assert sums_hold(run_dir / "export")


def other_adapter(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)
    edit_json(run / "run.json", adapter_sha256=sha256_file(path))


def one_byte(run: Path) -> None:
    path = run / "export" / "lighthouse.f16.gguf"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another adapter": (other_adapter, r"(?s)made from something else:.*adapter sha256: \w{64} -> \w{64}"),
    "another base": (
        lambda run: edit_json(run / "export" / "export.json", base_sha256="0" * 64),
        "base sha256: 0{64} -> ",
    ),
    "another llama.cpp": (
        lambda run: edit_json(run / "export" / "export.json", llama_cpp_commit="abc"),
        "llama cpp commit: abc -> ",
    ),
    "a file changed": (one_byte, r"lighthouse\.f16\.gguf was changed since"),
    "no record": (lambda run: (run / "export" / "export.json").write_text("{}"), "not readable as an export's record"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_export_of_something_else_is_refused_with_what_changed_and_both_ways(run_dir: Path, name: str) -> None:
    spoil, complaint = CHANGES[name]
    spoil(run_dir)
    before = contents(run_dir / "export")
    with pytest.raises(DataError, match=complaint) as error:
        export_run(run_dir, quantizations=["f16"])
    assert error.value.exit_code == 3
    assert "--force" in str(error.value.remedy)
    assert "--out" in str(error.value.remedy)
    assert contents(run_dir / "export") == before


def test_an_export_that_was_killed_while_its_files_moved_in_is_completed_by_the_next(run_dir: Path) -> None:
    """The new record is there, the file that it names is not."""
    folder = run_dir / "export"
    record = json.loads((folder / "export.json").read_text())
    record["files"].append(record["files"][0] | {"name": "lighthouse.q8_0.gguf", "file_type": "q8_0"})
    (folder / "export.json").write_text(json.dumps(record))
    assert "lighthouse.q8_0.gguf" in ExportFolder.look(folder).own
    made = export_run(run_dir, quantizations=["q8_0"])
    assert [report.file_type for report in made.files] == ["f16", "q8_0"]
    assert sums_hold(folder)


@pytest.mark.parametrize("name", ["../run.json", "/etc/passwd", "..", "notes/a.txt"])
def test_a_record_cannot_have_files_outside_the_folder_taken_for_an_exports_own(run_dir: Path, name: str) -> None:
    record = json.loads((run_dir / "export" / "export.json").read_text())
    record["files"].append(record["files"][0] | {"name": name})
    (run_dir / "export" / "export.json").write_text(json.dumps(record))
    assert name not in ExportFolder.look(run_dir / "export").own


def test_a_refusal_names_no_folder_that_is_gone(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from forge.training.export import gguf

    def fails(path: Path, **_: object) -> None:
        raise CheckError(f"llama.cpp refuses {path}: why")

    monkeypatch.setattr(gguf, "measure_verification", fails)
    with pytest.raises(CheckError, match=r"^llama\.cpp refuses lighthouse\.q8_0\.gguf: why$"):
        export_run(run_dir, quantizations=["q8_0"])


def test_messages_name_the_paths_as_they_were_typed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir.parent)
    said: list[str] = []
    record = export_run(Path("run"), quantizations=["f16"], progress=said.append)
    assert record.out_dir == "run/export"
    assert said == ["run/export is complete: nothing to do"]
