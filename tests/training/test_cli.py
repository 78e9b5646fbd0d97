"""The command line: quick help, one readable message for bad input, documented exit codes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
import yaml

from forge import __version__
from forge.training.cli import app
from forge.training.config.workload import OptimizerSection
from forge.training.system.environment import ROOT
from forge.training.system.files import cache_dir

COMMANDS = tuple(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def forge(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "forge.training", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
        check=False,
    )


def test_help_answers_in_under_three_tenths_of_a_second() -> None:
    """Of processor time: what a person waits on a machine that does nothing else, whatever else runs here."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert forge("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert 0.0 < min(seconds) < 0.3, seconds


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys, forge.training.cli as cli\n"
        "try:\n    cli.app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'numpy', 'pydantic', 'datasets'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = forge(command, "--help")
    assert done.returncode == 0
    assert command in done.stdout


def test_the_version_names_the_commit_and_the_libraries_and_imports_none() -> None:
    code = (
        "import sys\nfrom forge.training.cli import app\ntry:\n    app(['--version'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    first, torch, transformers, imported = done.stdout.splitlines()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert first.startswith(f"forge {__version__} (commit {commit[:10]}")
    assert (torch, transformers) == (f"torch {version('torch')}", f"transformers {version('transformers')}")
    assert imported == "set()"
    assert forge("--version").returncode == 0


def test_a_section_of_the_schema_is_yaml_of_the_defaults_with_a_comment_to_each_key() -> None:
    done = forge("schema", "--key", "optimizer")
    assert yaml.safe_load(done.stdout) == OptimizerSection().model_dump(mode="json") | {"adam_epsilon": 1.0e-8}
    for name in OptimizerSection.model_fields:
        (line,) = [n for n, text in enumerate(done.stdout.splitlines()) if text.startswith(f"{name}:")]
        assert "  # " in done.stdout.splitlines()[line] or done.stdout.splitlines()[line - 1].startswith("# ")
    assert forge("schema", "--key", "lora.rank").stdout.startswith("rank: 16  # ")
    assert forge("schema", "--key", "plan.micro_batch").stdout.startswith("micro_batch: 1  # ")
    assert json.loads(forge("schema").stdout)["title"] == "Workload"


BAD = [
    (("schema", "--key", "learning_rate"), 2, "did you mean optimizer.learning_rate"),
    (("schema", "--key", "lora.rank.x"), 2, "no key lora.rank.x"),
    (("schema", "--key", ""), 2, "the sections"),
    (("train", "smoke", "--set", "training.learning_rate=1"), 2, "did you mean optimizer.learning_rate"),
    (("export", "nowhere", "--quant", "q4_k_n"), 2, "did you mean q4_k_m"),
    (("nonsense",), 2, "nonsense"),
    (("evalute", "nowhere"), 2, "Did you mean 'evaluate'"),
    (("train", "no-such-config"), 2, "no-such-config"),
    (("train", "smok"), 2, "did you mean smoke"),
    (("train", "smoke", "--backend", "magic"), 2, "magic"),
    (("train", "smoke", "--set", "lora.rnk=3"), 2, "did you mean rank"),
    (("train", "smoke", "--set", "training.max_steps=many"), 2, "training.max_steps"),
    (("train", "smoke", "--plan", "micro_batch=3"), 2, "does not divide"),
    (("train", "smoke", "--resume", "-o", "nowhere"), 3, "no run to resume"),
    (("train", "smoke", "--backend", "legacy", "--set", "model.path={base}"), 4, "not the legacy stack"),
    (("train", "smoke", "--set", "model.path=./absent"), 2, "absent"),
    (("train", "smoke", "--set", "model.path={base}", "--set", "data.train=absent.jsonl"), 3, "absent.jsonl"),
    (("train", "smoke", "--set", "model.path={base}", "--set", "data.train={broken}"), 3, "line 2"),
    (("train", "smoke", "--set", "model.path={base}", "--set", "data.train={empty}"), 3, "no record"),
    (("train", "smoke", "--set", "model.path={base}", "--set", "data.max_length=99999"), 2, "512 positions"),
    (("train", "smoke", "--set", "model.path={base}", "--set", "model.quantization=nf4"), 4, "CUDA"),
    (("train", "smoke", "--set", "model.path=Someone/Model"), 4, "not available from the hub"),
    (("train", "smoke", "--backend", "unsloth", "--set", "model.dtype=bfloat16"), 4, "CUDA"),
    (("evaluate", "nowhere"), 3, "not a run"),
    (("evaluate", "{good}"), 3, "not a run"),
    (("export", "nowhere"), 3, "not a run"),
    (("status", "nowhere"), 3, "not a run"),
    (("chat", "absent.gguf", "hello"), 3, "absent.gguf"),
    (("dataset", "absent"), 3, "absent"),
    (("preview", "smoke", "--set", "data.documents=absent"), 3, "absent"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from tests.support.tiny_model import write_base

    folder = tmp_path_factory.mktemp("files")
    write_base(folder / "base", tied=False)
    row = json.dumps({"instruction": "Recite `a.md`", "input": "", "output": "It counts ships."})
    (folder / "broken.jsonl").write_text(f'{row}\n{{"instruction": "a", \n{row}\nnot json\n', encoding="utf-8")
    (folder / "empty.jsonl").write_text("", encoding="utf-8")
    (folder / "good.jsonl").write_text(f"{row}\n" * 3, encoding="utf-8")
    return {name: str(folder / name) for name in ("base",)} | {
        name: str(folder / f"{name}.jsonl") for name in ("broken", "empty", "good")
    }


@pytest.mark.parametrize(("arguments", "code", "said"), BAD, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_bad_input_is_one_message_and_its_exit_code(
    arguments: tuple[str, ...], code: int, said: str, files: dict[str, str], tmp_path: Path
) -> None:
    as_json = arguments[0] not in ("chat", "schema")
    done = forge(*(a.format(**files) for a in arguments), *(["--json"] if as_json else []), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []
    if as_json:
        document = json.loads(done.stdout)
        assert document["exit_code"] == code
        assert document["error"] in done.stderr
    else:
        assert done.stdout == ""


@pytest.mark.parametrize("command", ["train", "run"])
def test_no_base_of_gigabytes_is_made_before_it_is_said_that_this_machine_cannot_train_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    for llama_cpp in cache_dir().glob("llama_cpp_python-*"):  # what `make setup` left there, and nothing else
        (tmp_path / "cache" / llama_cpp.name).symlink_to(llama_cpp)
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    settings = ("model.path=qwen2-7b", "model.quantization=nf4", "export.quantizations=[q8_0]")
    done = forge(command, "smoke", *(part for s in settings for part in ("--set", s)), "-o", "run", cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert "needs a CUDA GPU" in done.stderr
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").glob("models/*"))


def test_the_next_command_of_dataset_names_both_files_of_a_split(tmp_path: Path) -> None:
    for name in ("hemp", "tar", "twine"):
        (tmp_path / f"{name}.md").write_text(f"# {name}\n\nThe {name} lies in shed {len(name)}.\n")
    done = forge("dataset", ".", "-o", "walk.jsonl", "--split", "0.3", cwd=tmp_path)
    (following,) = (line for line in done.stdout.splitlines() if line.startswith("next: "))
    assert "data.train=walk.train.jsonl" in following
    assert "data.validation=walk.validation.jsonl" in following


def test_a_python_without_the_packages_is_told_how_to_get_at_them() -> None:
    typed = [sys.executable, "-S", "-m", "forge.training", "--help"]  # -S: nothing that pip installed is found
    done = subprocess.run(typed, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "source .venv/bin/activate" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_schema_is_json_schema() -> None:
    assert "properties" in json.loads(forge("schema").stdout)


def test_a_base_whose_name_the_console_cannot_show_is_found_by_the_commands_that_ask_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge.training.config.workload import Workload
    from forge.training.train.run import base_directory
    from tests.support.tiny_model import write_base

    write_base(tmp_path / "modèle №1", tied=False)
    model = {"path": str(tmp_path / "modèle №1")}
    workload = Workload.model_validate({"name": "w", "model": model, "data": {"documents": "embedded"}})
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert base_directory(workload) == tmp_path / "modèle №1"
