"""The same command again, with the same content or another, and ``--force``: nothing is ignored and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from forge.training.train.progress import describe_status
from forge.training.train.record import chain_after, read_record
from tests.support import run_command as command
from tests.support.run_command import Ended
from tests.support.tiny_model import write_base
from tests.support.tiny_run import adapter, arguments, edit_json, record, status


@pytest.fixture(scope="module")
def finished(folder: Path, reference: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, documents and a complete run ``kept``, copied: what is tried in it is lost on no one."""
    copy = tmp_path_factory.mktemp("finished")
    for name in ("base", "train.jsonl", "validation.jsonl"):
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, copy / name)
    shutil.copytree(folder / "reference", copy / "kept")
    return copy


def again(finished: Path, *more: str, out: str = "kept") -> Ended:
    return command.run(arguments(finished, finished / out, *more), finished / "logs" / out)


def files(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def with_one_more(path: Path) -> str:
    return path.read_text() + json.dumps({"instruction": "Recite `new.md`", "input": "", "output": "It is new."}) + "\n"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("train", ("the training examples: ", "number of training examples: 20 -> 21", "--force", "--out")),
        ("validation", ("the held-out examples: ", "number of held-out examples: 4 -> 5")),
        ("base", ("the base model's weights: ",)),
        ("version", ("Forge's version of training: 0 -> 1",)),
    ],
)
def test_a_complete_run_of_other_content_is_not_done(finished: Path, change: str, says: tuple[str, ...]) -> None:
    more: list[str] = []
    if change == "base":
        write_base(finished / "other", tied=False, hidden_size=64, intermediate_size=128, num_steps=1)
        more = ["--set", f"model.path={finished / 'other'}"]
    elif change == "version":
        shutil.copytree(finished / "kept", finished / "old")
        edit_json(finished / "old" / "run.json", training_version=0)
    else:
        (finished / "changed.jsonl").write_text(with_one_more(finished / f"{change}.jsonl"))
        more = ["--set", f"data.{change}={finished / 'changed.jsonl'}"]
    out = "old" if change == "version" else "kept"
    before = files(finished / out)
    done = again(finished, *more, out=out)
    assert done.returncode == 3, done.stderr
    assert all(words in done.stderr for words in says), done.stderr
    assert "nothing to do" not in done.stderr
    assert files(finished / out) == before


@pytest.mark.parametrize(("key", "code"), [("data.train", 3), ("data.validation", 3), ("model.path", 2)])
def test_a_complete_run_does_not_hide_a_path_that_is_not_there(finished: Path, key: str, code: int) -> None:
    done = again(finished, "--set", f"{key}={finished / 'nowhere'}")
    assert done.returncode == code, done.stderr
    assert "nowhere" in done.stderr
    assert done.stderr.count("error: ") == 1, "one mistake, one message"


def test_what_is_no_part_of_training_changes_in_a_complete_run_and_is_said(finished: Path) -> None:
    shutil.copytree(finished / "kept", finished / "asked")
    done = again(finished, "--set", "export.quantizations=[q8_0]", out="asked")
    assert done.returncode == 0, done.stderr
    assert "export.quantizations: " in done.stderr
    assert record(finished / "asked")["workload"]["export"]["quantizations"] == ["q8_0"]
    assert adapter(finished / "asked") == adapter(finished / "kept")
    assert "export.quantizations: " not in again(finished, "--set", "export.quantizations=[q8_0]", out="asked").stderr


def test_a_forced_run_keeps_the_one_before_beside_it(finished: Path) -> None:
    shutil.copytree(finished / "kept", finished / "forced")
    before = files(finished / "forced")
    for number in (1, 2):
        done = again(finished, "--set", "training.max_steps=2", "--force", out="forced")
        assert done.returncode == 0, done.stderr
        assert f"kept in {finished / f'forced.{number}'}" in done.stderr
    assert files(finished / "forced.1") == before
    assert record(finished / "forced")["num_steps"] == record(finished / "forced.2")["num_steps"] == 2


@pytest.mark.parametrize(
    ("setting", "code"),
    [("data.train=nowhere.jsonl", 3), ("model.path=./nowhere", 2), ("data.max_length=100000", 2)],
)
def test_a_forced_run_that_is_refused_leaves_the_one_before_as_it_was(finished: Path, setting: str, code: int) -> None:
    before = files(finished / "kept")
    done = again(finished, "--set", setting, "--force")
    assert done.returncode == code, done.stderr
    assert files(finished / "kept") == before
    assert status(finished / "kept")["state"] == "completed"


def test_force_does_not_touch_a_folder_with_files_that_no_run_made(finished: Path) -> None:
    place = finished / "mine"
    (place / "adapter").mkdir(parents=True)
    for name in ("thesis.md", ".notes.part", "adapter/precious"):
        (place / name).write_text("years of work")
    before = files(place)
    done = again(finished, "--force", out="mine")
    assert done.returncode == 6, done.stderr
    assert "thesis.md" in done.stderr
    assert files(place) == before


def checked_and_trained(finished: Path, out: str, *settings: str) -> tuple[Ended, Ended]:
    """What `check` and `train` say of the same settings."""
    options = [part for setting in settings for part in ("--set", setting)]
    typed = [part for part in arguments(finished, finished / out, *options) if part != "--no-check"]
    logs = finished / "logs"
    return command.run(["check", *typed[1:]], logs / "check"), command.run(typed, logs / "train")


def test_what_check_refuses_is_refused_before_anything_is_made(finished: Path) -> None:
    wrong = ("lora.targets=[q_proj,qq_proj]", "export.quantizations=[q4_k_m]")
    checked, done = checked_and_trained(finished, "never", *wrong)
    assert done.returncode == checked.returncode == 2, done.stderr
    for words in ("qq_proj", "q4_k_m"):
        assert words in done.stderr
        assert words in checked.stdout
    assert not (finished / "never").exists()
    assert "Traceback" not in done.stderr


def test_a_record_that_check_refuses_is_refused_by_the_training_itself(finished: Path) -> None:
    rows = [{"instruction": "Recite", "output": text} for text in ("one", "two <|im_end|>")]
    (finished / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    odd = (f"data.train={finished / 'odd.jsonl'}", "data.control_tokens=fail")
    checked, done = checked_and_trained(finished, "odd", *odd)
    assert done.returncode == checked.returncode == 3, done.stderr
    for said in (checked.stdout, done.stderr):
        assert "line 2: the text holds the control token <|im_end|>" in " ".join(said.split())
    assert not (finished / "odd" / "run.json").exists()


def test_a_finished_run_is_trained_further_on_other_documents_and_says_of_which_it_is_made(finished: Path) -> None:
    (finished / "more.jsonl").write_text(with_one_more(finished / "train.jsonl"))
    kept = finished / "kept"
    settings = (f"data.train={finished / 'more.jsonl'}", "training.max_steps=10", "optimizer.learning_rate=1e-9")
    more = [part for setting in settings for part in ("--set", setting)]
    done = again(finished, *more, "--continue", str(kept), out="further")
    assert done.returncode == 0, done.stderr
    first, further = record(kept), record(finished / "further")
    assert [each["adapter_sha256"] for each in further["continues"]] == [first["adapter_sha256"]]
    assert further["losses"]["first_validation_loss"] == pytest.approx(
        first["losses"]["best_validation_loss"], rel=1e-3
    )
    assert again(finished, *more, out="further").returncode == 2, "the same, but not continued, is other work"
    done = again(finished, "--continue", str(finished / "further"), "--set", "training.max_steps=2", out="third")
    assert done.returncode == 0, done.stderr
    third = record(finished / "third")["continues"]
    assert [(each["num_steps"], each["path"]) for each in third] == [
        (first["num_steps"], "../kept"),
        (10, "../further"),
    ]


def test_runs_that_continue_one_another_can_be_moved_together_and_a_lost_one_is_named(finished: Path) -> None:
    moved = finished / "moved"
    for name in ("kept", "more"):
        shutil.copytree(finished / "kept", moved / name)
    chain = [each.model_dump() for each in chain_after(moved / "kept", read_record(moved / "kept"), moved / "more")]
    edit_json(moved / "more" / "run.json", status="interrupted", continues=chain)
    again = finished / "again"
    moved.rename(again)
    assert describe_status(again / "more")["next"][-2:] == ["--continue", str(again / "kept")]
    edit_json(again / "kept" / "run.json", adapter_sha256="0" * 64)
    for _ in range(2):  # another run, then none
        where = describe_status(again / "more")
        assert where["next"] is None
        assert f"{again / 'kept'} is not the run whose adapter {again / 'more'} continues" in where["remedy"]
        assert "--continue RUN" in where["remedy"]
        shutil.rmtree(again / "kept", ignore_errors=True)


@pytest.mark.parametrize(("setting", "code"), [("lora.rank=8", 3), ("model.path={folder}/other", 3)])
def test_an_adapter_of_another_shape_or_base_is_not_continued(finished: Path, setting: str, code: int) -> None:
    if not (finished / "other").exists():
        write_base(finished / "other", tied=False, hidden_size=64, intermediate_size=128, num_steps=1)
    setting = setting.format(folder=finished)
    done = again(finished, "--continue", str(finished / "kept"), "--set", setting, out=f"wrong-{code}-{len(setting)}")
    assert done.returncode == code, done.stderr
    assert "continue" in done.stderr


PLACES = [
    (("train", "kept"), 0, "kept is complete, and trained on these documents"),
    (("train", "kept", "--set", "lora.rank=8"), 2, "kept holds a run of other settings"),
    (("train", "kept", "--set", "data.train=changed.jsonl"), 3, "kept was trained on something else"),
    (("train", "kept", "--set", "data.train=nowhere.jsonl"), 3, "nowhere.jsonl"),
    (("train", "kept", "--set", "model.path=./nowhere"), 2, "nowhere"),
    (("train", "kept", "--continue", "half"), 3, "half is interrupted at step"),
    (("train", "theirs", "--force"), 6, "theirs holds what no run made: thesis.md"),
    (("train", "theirs", "--resume"), 3, "theirs holds no run to resume"),
    (("train", "loose"), 6, "loose/adapter exists already"),
    (("train", "half", "--set", "training.max_steps=1"), 2, "half holds a run of other settings"),
    (("run", "theirs", "--force"), 6, "theirs holds what no run made: thesis.md"),
    (("evaluate", "half"), 3, "half is interrupted at step"),
    (("evaluate", "theirs"), 3, "theirs is not a run"),
    (("export", "half"), 3, "half is interrupted at step"),
    (("export", "kept", "-o", "theirs"), 6, "theirs exists already and holds no export"),
    (("export", "changed"), 3, "changed/adapter/adapter_model.safetensors is not the adapter"),
    (("evaluate", "changed"), 3, "changed/adapter/adapter_model.safetensors is not the adapter"),
    (("chat", "theirs", "Hello?"), 3, "theirs holds no GGUF file"),
    (("status", "theirs"), 3, "theirs is not a run"),
    (("status", "../{here}/kept"), 0, "../{here}/kept"),
    (("report", "theirs"), 3, "theirs is not a run"),
    (("report", "kept"), 0, "report: kept/report.html"),
]


@pytest.fixture(scope="module")
def places(finished: Path) -> Path:
    """The folder with runs that are complete, interrupted, changed, none of Forge's."""
    typed = arguments(Path(), Path("kept"))  # the record's paths are these then, and nothing more is said to differ
    assert command.run(typed, finished / "logs" / "kept", folder=finished).returncode == 0
    for name in ("half", "changed"):
        shutil.copytree(finished / "kept", finished / name)
    edit_json(finished / "half" / "run.json", status="interrupted", num_steps=5)
    with (finished / "changed" / "adapter" / "adapter_model.safetensors").open("ab") as weights:
        weights.write(b" ")
    for name in ("theirs/thesis.md", "loose/adapter/mine.md"):
        (finished / name).parent.mkdir(parents=True)
        (finished / name).write_text("years of work")
    (finished / "changed.jsonl").write_text(with_one_more(finished / "train.jsonl"))
    return finished


@pytest.mark.parametrize(
    ("typed", "code", "says"), PLACES, ids=lambda value: "-".join(value)[:50] if isinstance(value, tuple) else ""
)
def test_paths_are_said_as_they_were_typed(places: Path, typed: tuple[str, ...], code: int, says: str) -> None:
    command_name, place, *more = (word.format(here=places.name) for word in typed)
    words = [command_name, place, *more]
    if command_name in ("train", "run"):
        words = [command_name, *arguments(Path(), Path(place), *more)[1:]]
    if command_name == "run":
        words.remove("--no-check")
    done = command.run(words, places / "logs" / "typed", folder=places)
    assert done.returncode == code, done.stderr
    said = done.stdout + done.stderr
    assert says.format(here=places.name) in said
    assert str(places) not in said
    assert "Traceback" not in said
    assert "resumes at" not in said


def test_a_run_may_be_named_by_a_dot(finished: Path) -> None:
    here = finished / "here"
    shutil.copytree(finished / "kept", here)
    typed = arguments(Path(".."), Path(), "--set", "training.max_steps=2")
    done = command.run([*typed, "--force"], finished / "logs" / "dot", folder=here)
    assert done.returncode == 0, done.stderr
    assert f"the run that was in . is kept in {finished / 'here.1'}" in done.stderr
    assert record(here)["num_steps"] == 2
    assert record(finished / "here.1")["num_steps"] == record(finished / "kept")["num_steps"]
    more = [*typed[: typed.index("-o")], *typed[typed.index("-o") + 2 :], "--continue", "."]
    done = command.run(more, finished / "logs" / "dot", folder=here)
    assert done.returncode == 0, done.stderr
    assert record(finished / "here-more")["continues"][0]["path"] == "../here"


def test_a_run_is_not_continued_into_its_own_place(finished: Path) -> None:
    before = files(finished / "kept")
    done = again(finished, "--continue", str(finished / "kept"), "--force")
    assert done.returncode == 2, done.stderr
    assert "--out" in done.stderr
    assert files(finished / "kept") == before
