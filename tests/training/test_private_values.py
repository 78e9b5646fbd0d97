"""Credentials of the environment, and the home they belong to, are in nothing that a run leaves or says.

The real commands with a planted token in every variable that the libraries read: a training run that
is stopped, goes on and ends, its evaluation and its export; then every byte of every file is looked at.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from forge.training.system.environment import describe_environment
from forge.training.system.files import cache_dir
from tests.support import run_command as command
from tests.support.tiny_run import arguments, status, write_inputs

NO_CONNECTION = "tests.support.no_network:end_at_a_connection"
SECRET = "Zq7Rw2Lk9Xv4Bn6Tm1Yc8Hd3Jf5Gs0PaUe"
PLANTED = {
    "HF_TOKEN": "hf_" + SECRET,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + SECRET[::-1],
    "WANDB_API_KEY": SECRET * 2,
    "GITHUB_TOKEN": "ghp_" + SECRET.swapcase(),
    "AWS_SECRET_ACCESS_KEY": "a" + SECRET,
    "MY_PASSWORD": "unguessable-" + SECRET[:9],
}


def holders(folder: Path, *needles: str) -> list[str]:
    """``file: text`` for each of the texts that stands in a file below ``folder``."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [f"{path.relative_to(folder)}: {needle}" for needle in needles if needle.encode() in content]
    return found


def test_the_environment_of_a_record_holds_no_credential_and_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    home = "/home/somebody-of-that-name"
    for name, value in {**PLANTED, "HOME": home, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}.items():
        monkeypatch.setenv(name, value)
    text = json.dumps(describe_environment(with_torch=False))
    assert "expandable_segments" in text
    assert not [value for value in (*PLANTED.values(), home) if value in text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the commands wrote and printed, under one folder that is also the home."""
    folder = tmp_path_factory.mktemp("home-of-somebody")
    write_inputs(folder)
    environment = {**PLANTED, "HOME": str(folder), "FORGE_CACHE": str(cache_dir())}
    # nothing tells the libraries to stay offline, and a process that looks for a network ends at once
    alone = {**environment, "HF_HUB_OFFLINE": "0"}
    run_dir = folder / "run"
    train = [*arguments(folder, run_dir), "--set", 'report_to=["tensorboard"]']
    running = command.start(train, folder / "logs" / "stopped", fault=NO_CONNECTION, environment=alone)
    assert running.wait_for(lambda: any(run_dir.glob("checkpoints/checkpoint-*/*.json")))
    running.send_signal(signal.SIGTERM)
    assert running.wait().returncode == 143
    assert status(run_dir)["state"] == "interrupted"
    os.rename(run_dir / "checkpoints", folder / "checkpoints")  # looked at as well: a complete run has none
    os.makedirs(run_dir / "checkpoints")
    for name, more in {
        "resumed": train,
        "evaluated": ["evaluate", str(run_dir), "--json"],
        "exported": ["export", str(run_dir), "--quant", "f16", "--lora", "--keep-merged"],
        "status": ["status", str(run_dir)],
    }.items():
        ended = command.run(more, folder / "logs" / name, fault=NO_CONNECTION, environment=alone)
        assert ended.returncode == 0, ended.stderr
    absent = [*arguments(folder, folder / "other"), "--set", "model.path=nobody/nothing-of-that-name"]
    assert command.run(absent, folder / "logs" / "refused", environment=environment).returncode == 4
    return folder


@pytest.mark.slow
def test_a_local_base_is_trained_evaluated_and_exported_without_looking_for_a_network(folder: Path) -> None:
    assert (folder / "run" / "export" / "SHA256SUMS").is_file()  # every command came to its end


@pytest.mark.slow
def test_no_file_and_no_output_of_a_run_its_evaluation_and_its_export_holds_a_credential(folder: Path) -> None:
    for made in ("run/run.json", "run/evaluation.json", "run/export/export.json", "run/status.json", "run/tensorboard"):
        assert (folder / made).exists()
    assert list((folder / "checkpoints").glob("checkpoint-*/*"))
    assert holders(folder, *PLANTED.values()) == []


@pytest.mark.slow
def test_what_is_given_to_others_names_no_path_of_this_machine(folder: Path) -> None:
    """The export, which is meant to be published, and the record's environment."""
    assert holders(folder / "run" / "export", str(folder), folder.name) == []
    record = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    assert folder.name not in json.dumps(record["environment"])
