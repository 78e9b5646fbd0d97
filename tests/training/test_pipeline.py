"""`forge run`: the GGUF that was trained for, whatever was held out, and nothing old for something new."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.support import run_command as command
from tests.support.run_command import Ended, Running
from tests.support.tiny_run import arguments, write_inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FACT = "[{question: 'Recite `1.md`', answer: It counts ships.}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_inputs(folder)
    return folder


def run(folder: Path, *more: str, out: str = "run", force: bool = False) -> Ended:
    return begin(folder, *more, out=out, force=force).wait(300)


def begin(folder: Path, *more: str, out: str, force: bool) -> Running:
    nothing_held_out = ("data.validation=null", "data.validation_share=0", "training.evaluate_every_steps=null")
    short = ("training.max_steps=3", "evaluation.facts=[]", "export.quantizations=[f16]")
    settings = [part for setting in (*nothing_held_out, *short, *more) for part in ("--set", setting)]
    typed = [part for part in arguments(folder, folder / out, *settings) if part != "--no-check"]
    return command.start(["run", *typed[1:], *(["--force"] if force else [])], folder / "logs" / out)


def ggufs(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "run" / "export").glob("*.gguf")}


def test_a_run_that_holds_nothing_out_ends_with_its_gguf_and_follows_what_is_asked_of_it(folder: Path) -> None:
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert "not evaluated" in done.stderr
    assert "next: forge chat" in done.stdout
    assert "ask the GGUF" not in done.stdout, "nothing was asked"
    first = ggufs(folder)
    assert set(first) == {"smoke.f16.gguf"}

    again = run(folder)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("nothing to do") == 2
    seconds = json.loads((folder / "run" / "outcome.json").read_text())["seconds"]
    assert sorted(name for name, value in seconds.items() if value > 0) == ["export", "train"]
    assert ggufs(folder) == first

    more = run(folder, "export.quantizations=[f16,q8_0]")
    assert more.returncode == 0, more.stderr
    assert ggufs(folder) == first | {"smoke.q8_0.gguf": ggufs(folder)["smoke.q8_0.gguf"]}

    asked = run(folder, f"evaluation.facts={FACT}", "evaluation.require_facts=false")
    assert asked.returncode == 0, asked.stderr
    evaluation = json.loads((folder / "run" / "evaluation.json").read_text())
    assert {row["question"] for row in evaluation["facts"]} == {"Recite `1.md`"}
    assert not (folder / "run" / "merged").exists()
    other = run(folder, f"evaluation.facts={FACT.replace('1.md', '2.md')}", "evaluation.require_facts=false")
    assert other.returncode == 0, other.stderr
    assert "measured again" in other.stderr
    evaluation = json.loads((folder / "run" / "evaluation.json").read_text())
    assert {row["question"] for row in evaluation["facts"]} == {"Recite `2.md`"}
    shown = command.run(["evaluate", folder / "run"], folder / "logs" / "shown")
    assert shown.returncode == 0, shown.stderr
    assert "not measured again" in shown.stderr
    assert "next: forge chat" in shown.stdout


def test_a_run_merges_once_for_evaluation_and_export_and_leaves_no_merge(folder: Path) -> None:
    done = run(folder, f"evaluation.facts={FACT}", "evaluation.require_facts=false", out="once")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("merge: file 1 of ") == 1, done.stderr
    made = [json.loads((folder / "once" / name).read_text()) for name in ("evaluation.json", "export/export.json")]
    assert made[0]["merged_sha256"] == made[1]["merged_sha256"]
    assert not (folder / "once" / "merged").exists()


def test_other_documents_are_no_finished_run(folder: Path) -> None:
    before = ggufs(folder)
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    done = run(folder)
    assert done.returncode == 3, done.stderr
    assert "20 -> 19" in done.stderr
    assert "resumes" not in done.stderr
    assert ggufs(folder) == before


def test_what_check_refuses_ends_the_run_before_anything_is_made(folder: Path) -> None:
    done = run(folder, "lora.targets=[qq_proj]", out="never")
    assert done.returncode == 2, done.stderr
    assert "qq_proj" in done.stderr
    assert not (folder / "never").exists()


@pytest.mark.parametrize("typed", ["mine", "."])
def test_force_deletes_no_folder_with_files_that_no_run_made(tmp_path: Path, folder: Path, typed: str) -> None:
    mine = tmp_path / "mine"
    (mine / "letters").mkdir(parents=True)
    (mine / "letters" / "1911.md").write_text("Dear Agathe")
    for more in ((), ("--set", "model.path=./misspelt")):
        settings = [part for part in arguments(folder, Path(typed), *more)[1:] if part != "--no-check"]
        here = tmp_path if typed == "mine" else mine
        done = command.start(["run", *settings, "--force"], tmp_path / "log", folder=here).wait(120)
        assert done.returncode in (2, 6), done.stderr
        assert "letters" in done.stderr or "misspelt" in done.stderr
        assert "the same command" not in done.stderr, "it would be refused again"
        assert [str(path.relative_to(mine)) for path in mine.rglob("*")] == ["letters", "letters/1911.md"]


def test_an_interrupted_run_says_which_command_resumes_it(folder: Path) -> None:
    assert run(folder, out="stopped").returncode == 0
    log, longer = folder / "stopped" / "steps.jsonl", "training.max_steps=2000"
    running = begin(folder, longer, out="stopped", force=True)
    assert running.wait_for(lambda: (folder / "stopped.1").is_dir() and log.is_file() and '"loss"' in log.read_text())
    running.send_signal(signal.SIGINT)
    done = running.wait(120)
    assert done.returncode == 130, done.stderr
    assert "the same command without --force resumes from there" in done.stderr
    assert "the same command without --force resumes at this step" in done.stderr
    running = begin(folder, longer, out="stopped", force=False)
    assert running.wait_for(lambda: bool(json.loads((folder / "stopped" / "run.json").read_text())["resumes"]))
    running.send_signal(signal.SIGINT)
    done = running.wait(120)
    assert done.returncode == 130, done.stderr
    assert "the same command resumes at this step" in done.stderr
    assert not (folder / "stopped.2").exists()


def test_a_step_that_the_machine_ended_resumes_once_that_is_put_right(folder: Path) -> None:
    export = folder / "blocked" / "export"
    running = begin(folder, out="blocked", force=False)
    assert running.wait_for(lambda: (export.parent / "adapter").is_dir())
    export.write_text("mine")
    done = running.wait(300)
    assert done.returncode == 6, done.stderr
    assert "put right what is said above, then the same command resumes at this step" in done.stderr
    export.unlink()
    done = run(folder, out="blocked")
    assert done.returncode == 0, done.stderr
    assert "is complete, and trained on these documents" in done.stderr


def test_a_typing_error_with_force_costs_no_finished_run_and_is_not_said_to_be_resumable(folder: Path) -> None:
    if not (folder / "run" / "outcome.json").exists():
        assert run(folder).returncode == 0
    files = {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    before = sorted(folder.iterdir())
    done = run(folder, "model.path=./misspelt", force=True)
    assert done.returncode == 2, done.stderr
    assert "resume" not in done.stderr
    assert "put right" in done.stderr
    assert sorted(folder.iterdir()) == before
    assert all(path.read_bytes() == content for path, content in files.items())
