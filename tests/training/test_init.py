"""`forge init`: from a folder of documents to a config that loads, passes `check` and trains to a GGUF."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from forge.training import init as module
from forge.training.backends import load_plan
from forge.training.config.commented import template
from forge.training.config.workload import Workload, load_workload
from forge.training.data.inputs import corpus_paths
from forge.training.init import Initialised, write_config
from forge.training.system.environment import ROOT
from forge.training.system.errors import ConfigurationError, DataError, DiskError, ForgeError

LOGS = {
    "guide.md": "# The signal house\n\nThe signal master is Oda Brekke. The siren was tested in 1987.\n",
    "src/siren.py": "def sound(seconds):\n    return 440 * seconds\n",
    **{
        f"log/{n}.md": f"# Watch {n}\n\nOn watch {n} fog came in and {n * 7} ships called at berth {n}.\n"
        for n in range(1, 7)
    },
}


def documents(folder: Path, files: dict[str, str] = LOGS) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def forge(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-m", "forge.training", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=600, check=False)


@pytest.fixture
def written(tmp_path: Path) -> Initialised:
    return write_config(documents(tmp_path / "my signal docs"), tmp_path / "mine.yaml", base="tiny")


def test_the_config_is_for_these_documents_and_in_nobody_elses_words(written: Initialised, tmp_path: Path) -> None:
    config = load_workload(tmp_path / "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text()
    assert (config.name, config.data.documents) == ("my-signal-docs", str(tmp_path / "my signal docs"))
    assert str(tmp_path) not in text  # the folder can move with its config
    assert config.data.system_prompt == "You answer questions about the documents of my signal docs."
    assert "Sanctuary" not in text
    assert config.data.long_documents == "divide"
    assert config.data.validation_share == 0.1
    looked_at = dict(written.looked_at)
    assert looked_at["documents"] == "8: 7 .md, 1 .py"
    assert "guide.md" in looked_at["tokens"]
    assert dict(written.chosen)["held out"] == "1 of 8 documents"
    assert written.next == f"forge run {tmp_path}/mine.yaml"


def test_the_drafted_facts_stand_in_documents_that_are_trained_and_are_marked(
    written: Initialised, tmp_path: Path
) -> None:
    config = load_workload(tmp_path / "mine.yaml")
    facts = config.evaluation.facts
    assert 3 <= len(facts) <= 5
    (tmp_path / "run").mkdir()
    train, _, _ = corpus_paths(config, tmp_path / "run")
    trained = [json.loads(line)["output"] for line in train.read_text().splitlines()]
    assert all(any(fact.answer in text for text in trained) for fact in facts)
    assert "DRAFTS" in (tmp_path / "mine.yaml").read_text()
    assert not config.evaluation.require_facts


def test_every_key_that_is_written_has_its_comment(written: Initialised, tmp_path: Path) -> None:
    lines = (tmp_path / "mine.yaml").read_text().splitlines()
    keys = [n for n, line in enumerate(lines) if line.strip() and not line.lstrip().startswith(("#", "- ", "answer:"))]
    assert len(keys) > 35
    for n in keys:
        assert "  # " in lines[n] or lines[n - 1].lstrip().startswith("# "), lines[n]
    assert max(map(len, (line for line in lines if "  # " in line))) <= 120


def test_the_plan_lies_beside_the_config_and_is_used(written: Initialised, tmp_path: Path) -> None:
    plans = yaml.safe_load((tmp_path / "mine.plans.yaml").read_text())
    assert written.plans == str(tmp_path / "mine.plans.yaml")
    assert load_plan(load_workload(tmp_path / "mine.yaml"), "trl").model_dump().items() >= plans["trl"].items()
    assert plans["trl"]["micro_batch"] == 4


def test_what_it_writes_passes_check(written: Initialised, tmp_path: Path) -> None:
    done = forge("check", "mine.yaml", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    errors = [row for row in found if row["level"] == "error"]
    assert [row["message"] for row in errors] == [f.message for f in written.findings if f.level == "error"]
    assert errors == []
    assert any("mine.plans.yaml" in row["message"] for row in found)


def test_a_plan_that_is_the_default_is_not_written(tmp_path: Path) -> None:
    written = write_config(documents(tmp_path / "docs"), tmp_path / "mine.yaml", base="someone/0.5B-model")
    assert (written.plans, list(tmp_path.glob("*.plans.yaml"))) == (None, [])


@pytest.mark.parametrize("there", ["mine.yaml", "mine.plans.yaml"])
def test_nothing_that_is_there_is_overwritten(tmp_path: Path, there: str) -> None:
    docs = documents(tmp_path / "docs")
    (tmp_path / there).write_text("my own\n")
    with pytest.raises(DiskError, match=f"{there} exists already") as caught:
        write_config(docs, tmp_path / "mine.yaml")
    assert caught.value.exit_code == 6
    assert {p.name: p.read_text() for p in tmp_path.glob("*.yaml")} == {there: "my own\n"}
    write_config(docs, tmp_path / "mine.yaml", force=True)
    assert load_workload(tmp_path / "mine.yaml").name == "docs"


@pytest.mark.parametrize(
    ("root", "output", "base", "error", "said"),
    [
        ("absent", "mine.yaml", None, DataError, "does not exist"),
        ("empty", "mine.yaml", None, DataError, "no usable document"),
        ("docs", "mine.json", None, ConfigurationError, "no name of a config"),
        ("docs", "a.plans.yaml", None, ConfigurationError, "no name of a config"),
        ("docs", "folder.yaml", None, DiskError, "is a directory"),
        ("docs", "mine.yaml", "qwen3", ConfigurationError, "no directory qwen3"),
        ("docs", "mine.yaml", "./absent", ConfigurationError, "no directory absent"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_leaves_nothing(
    tmp_path: Path, root: str, output: str, base: str | None, error: type[ForgeError], said: str
) -> None:
    documents(tmp_path / "docs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(error, match=said):
        write_config(tmp_path / root, tmp_path / output, base=base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["docs", "empty", "folder.yaml"]


@pytest.mark.parametrize(
    "files",
    [
        {"only.md": "# Alone\n\nOne document.\n"},
        {"a.md": LOGS["guide.md"] * 9, "b.md": LOGS["guide.md"] * 9 + "\nAnd more.\n"},
        {"a.txt": "x", "b.txt": "y"},
    ],
    ids=["one", "copies", "short"],
)
def test_documents_of_which_little_can_be_made_still_give_a_config(tmp_path: Path, files: dict[str, str]) -> None:
    written = write_config(documents(tmp_path / "docs", files), tmp_path / "mine.yaml", base="tiny")
    config = load_workload(tmp_path / "mine.yaml")
    assert (config.data.validation_share == 0.1) == ("b.txt" in files)
    assert [f for f in written.findings if f.level == "error"] == []


@pytest.mark.parametrize("name", ["~home", "embedded", "tiny", "Ümläut & co", "-x"])
def test_a_folder_of_any_name_is_found_again(tmp_path: Path, name: str) -> None:
    docs = documents(tmp_path / name)
    write_config(docs, tmp_path / "mine.yaml", base="tiny")
    assert Path(str(load_workload(tmp_path / "mine.yaml").data.documents)).samefile(docs)


def test_a_config_among_its_documents_is_not_trained_on(tmp_path: Path) -> None:
    docs = documents(tmp_path / "docs")
    write_config(docs, docs / "mine.yaml", base="tiny")
    config = load_workload(docs / "mine.yaml")
    run_dir = docs / "runs" / "mine"
    run_dir.mkdir(parents=True)
    (run_dir / "status.json").write_text('{"state": "starting"}')
    train, validation, _ = corpus_paths(config, run_dir)
    assert validation is not None
    said = train.read_text() + validation.read_text()
    assert len(said.splitlines()) == len(LOGS)
    assert "mine.yaml" not in said
    assert "mine.plans" not in said
    assert "status.json" not in said


def test_a_gpu_gets_its_base_length_and_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: dict[str, Any] = {"name": "NVIDIA Test 3070", "memory_total_bytes": 8 << 30, "compute_capability": "8.6"}
    monkeypatch.setattr(module, "describe_gpu", lambda: gpu)
    monkeypatch.setattr(module, "choose_backend", lambda _: "unsloth")
    monkeypatch.setattr(module, "package_version", lambda _: "1")
    written = write_config(documents(tmp_path / "docs"), tmp_path / "mine.yaml")
    config = load_workload(tmp_path / "mine.yaml")
    assert (config.model.path, config.model.quantization) == ("Qwen/Qwen2-7B-Instruct", "nf4")
    assert (config.data.max_length, config.optimizer.name) == (2048, "paged_adamw_8bit")
    plan = load_plan(config, "unsloth")
    assert (plan.micro_batch, plan.mlp_tile_tokens, plan.loss_chunk_gib) == (1, 2048, 0.125)
    assert "NVIDIA Test 3070, 8.0 GiB" in dict(written.looked_at)["machine"]


def test_the_template_is_every_default_and_loads(tmp_path: Path) -> None:
    done = forge("init", "--template", cwd=tmp_path)
    assert done.stdout == template()
    (tmp_path / "mine.yaml").write_text(done.stdout)
    plain = Workload.model_validate({"name": "mine", "data": {"documents": str(tmp_path / "path/to/documents")}})
    assert load_workload(tmp_path / "mine.yaml").model_dump() == plain.model_dump()


@pytest.mark.slow
def test_the_command_says_what_it_chose_and_why_and_the_next_command(tmp_path: Path) -> None:
    documents(tmp_path / "docs")
    done = forge("init", "docs", "-o", "my own.yaml", "--base", "tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "next: forge run 'my own.yaml'" in done.stdout
    assert "as asked with --base" in done.stdout
    assert "drafts to edit" in done.stdout
    assert forge("init", "docs", "-o", "my own.yaml", cwd=tmp_path).returncode == 6
    assert forge("init", cwd=tmp_path).returncode == 2
    again = forge("init", "docs", "-o", "b.yaml", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["config"] == "b.yaml"


@pytest.mark.slow
def test_three_commands_lead_from_nothing_to_a_gguf(tmp_path: Path) -> None:
    documents(tmp_path)
    assert forge("init", ".", "--base", "tiny", cwd=tmp_path).returncode == 0
    config = tmp_path / "mine.yaml"
    config.write_text(config.read_text().replace("Oda Brekke", "Brekke").replace("epochs: 10.0", "epochs: 2.0"))
    done = forge("run", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert len(list((run_dir / "export").glob("*.q4_k_m.gguf"))) == 1
    assert "mine.plans.yaml" in done.stderr
    record = json.loads((run_dir / "run.json").read_text())
    assert (record["status"], record["plan"]["micro_batch"]) == ("completed", 4)
    assert "evaluation.require_facts is false" in done.stdout
    again = forge("run", "mine.yaml", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("nothing to do") == 2, "trained and exported as before"
