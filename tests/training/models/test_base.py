"""Claims about base models: whole or not there, known by their content, and nothing unsafe is taken for one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from forge.training.models.base import resolve_base
from forge.training.models.digests import base_sha256, tokenizer_sha256
from forge.training.system.environment import has_cuda_gpu
from forge.training.system.errors import ConfigurationError, DataError, DiskError, ForgeError, MachineError
from tests.support import run_command
from tests.support.run_command import Running
from tests.support.tiny_model import scratch, write_base
from tests.support.tiny_run import edit_json


@cache
def original() -> Path:
    """A base in one file; nobody may change it."""
    write_base(scratch() / "one-file", num_steps=0)
    return scratch() / "one-file"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of a base, to be changed."""
    return Path(shutil.copytree(original(), tmp_path / "base"))


# Made once, whole or not at all


def start_maker(folder: Path, name: str, num_steps: int) -> Running:
    """A process that makes `tiny` in the cache ``folder/cache``, with fewer steps than the real recipe."""
    environment = {"FORGE_CACHE": str(folder / "cache"), "BASE_STEPS": str(num_steps)}
    hasty = "tests.support.faults:hasty_base"
    return run_command.start(["base", "tiny"], folder / name, fault=hasty, environment=environment)


def test_two_processes_at_once_make_one_base(tmp_path: Path) -> None:
    makers = [start_maker(tmp_path, name, 3) for name in "ab"]
    ended = [maker.wait(180) for maker in makers]
    assert [maker.returncode for maker in ended] == [0, 0]
    assert ended[0].stdout == ended[1].stdout
    assert sum("making the base" in maker.stderr for maker in ended) == 1
    made = Path(ended[0].stdout.strip())
    assert made.parent == tmp_path / "cache" / "models"
    assert resolve_base(str(made)) == made
    assert json.loads((made / "standin.json").read_text())["loss_nats_per_token"] > 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_base_whose_making_was_stopped_is_not_there(tmp_path: Path, number: signal.Signals) -> None:
    maker = start_maker(tmp_path, "log", 100_000)
    assert maker.wait_for(lambda: "training a base" in (tmp_path / "log" / "stderr").read_text())
    maker.send_signal(number)
    assert maker.wait(60).returncode != 0
    left = sorted(path.suffix for path in (tmp_path / "cache" / "models").iterdir())
    assert left == ([".lock", ".part"] if number == signal.SIGKILL else [".lock"])


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    from forge.training.models.base import _one_maker

    directory = tmp_path / "models" / "tiny-0123"
    mine, others = directory.parent / ".tiny-0123.abc.part", directory.parent / ".tiny-4567.abc.part"
    for folder in (mine, others):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    with _one_maker(directory):
        assert not mine.exists()
        assert others.exists()


def test_a_cache_that_cannot_be_written_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DiskError, match="cannot make"):
        resolve_base("tiny")


@pytest.mark.skipif(has_cuda_gpu(), reason="the claim is about machines without a GPU")
def test_small_without_a_gpu_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    with pytest.raises(MachineError, match="trained on a GPU") as caught:
        resolve_base("small")
    assert caught.value.remedy == "use tiny"
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two bases, each a minute and more
def test_tiny_is_the_same_on_every_run_and_has_learnt_the_text_it_is_made_from(tmp_path: Path) -> None:
    code = "from forge.training.models.base import resolve_base; print(resolve_base('tiny'))"
    made = []
    for name in ("one", "two"):
        environment = os.environ | {"FORGE_CACHE": str(tmp_path / name)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        made.append(Path(done.stdout.strip()))
    assert base_sha256(made[0]) == base_sha256(made[1])
    assert tokenizer_sha256(made[0]) == tokenizer_sha256(made[1])
    assert json.loads((made[0] / "standin.json").read_text())["loss_nats_per_token"] < 5.6  # ln 4096 is 8.3


# Directories and hub names


def test_a_directory_is_taken_as_it_is(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_base(str(base)) == base
    monkeypatch.chdir(base.parent)
    assert resolve_base("base") == base


def _pickled(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def _cut_short(base: Path) -> None:
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _without_a_shard(base: Path) -> None:
    weight_map = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


SPOILT: dict[str, tuple[Callable[[Path], object], type[ForgeError], str]] = {
    "no config": (lambda b: (b / "config.json").unlink(), DataError, r"config\.json is missing"),
    "config that is not JSON": (lambda b: (b / "config.json").write_text("{"), DataError, "not readable JSON"),
    "code in the config": (lambda b: edit_json(b / "config.json", auto_map={}), DataError, "code of its own"),
    "kernel from the hub": (
        lambda b: edit_json(b / "config.json", _attn_implementation_internal="x/y"),
        DataError,
        "code of its own",
    ),
    "another architecture": (
        lambda b: edit_json(b / "config.json", architectures=["T5ForConditionalGeneration"]),
        ConfigurationError,
        "T5For",
    ),
    "strange architectures": (
        lambda b: edit_json(b / "config.json", architectures={"a": 1}),
        ConfigurationError,
        "not supported",
    ),
    "quantised weights": (
        lambda b: edit_json(b / "config.json", quantization_config={"bits": 4}),
        ConfigurationError,
        "quantised weights",
    ),
    "pickled weights": (_pickled, DataError, "only pickled weights"),
    "no weights": (lambda b: (b / "model.safetensors").unlink(), DataError, "no safetensors file"),
    "weights cut short": (_cut_short, DataError, "model.safetensors"),
    "a shard missing": (_without_a_shard, DataError, "model-00002-of-00002"),
    "no tokenizer": (lambda b: (b / "tokenizer.json").unlink(), DataError, r"no tokenizer\.json"),
    "no tokenizer settings": (lambda b: (b / "tokenizer_config.json").unlink(), DataError, "tokenizer_config"),
    "code in the tokenizer": (
        lambda b: edit_json(b / "tokenizer_config.json", auto_map={}),
        DataError,
        "code of its own",
    ),
    "a tokenizer file elsewhere": (
        lambda b: edit_json(b / "tokenizer_config.json", vocab_file="../../secret"),
        DataError,
        "vocab_file leaves",
    ),
    "an absolute tokenizer file": (
        lambda b: edit_json(b / "tokenizer_config.json", tokenizer_file="/etc/passwd"),
        DataError,
        "tokenizer_file leaves",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "message"), SPOILT.values(), ids=SPOILT)
def test_a_directory_that_is_no_safe_base_is_refused(
    base: Path, spoil: Callable[[Path], object], error: type[ForgeError], message: str
) -> None:
    spoil(base)
    with pytest.raises(error, match=message):
        resolve_base(str(base))


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "../a/b", "~/model", "model", "a/b/c"])
def test_a_path_that_is_neither_a_directory_nor_a_hub_name_says_what_is_known(path: str) -> None:
    with pytest.raises(ConfigurationError, match="no directory") as caught:
        resolve_base(path)
    assert caught.value.remedy is not None
    assert "tiny, small, qwen2-7b" in caught.value.remedy


@pytest.mark.parametrize("offline", [True, None])
def test_a_hub_name_without_the_hub_says_what_to_do(
    offline: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MachineError, match="offline, and it is not in the local cache") as caught:
        resolve_base("nobody/no-such-model", offline=offline)
    assert "model.path" in str(caught.value.remedy)


# Digests


def test_a_base_is_known_by_its_content_and_not_by_its_place(base: Path) -> None:
    assert base_sha256(base) == base_sha256(original())
    assert tokenizer_sha256(base) == tokenizer_sha256(original())
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    edit_json(base / "tokenizer_config.json", chat_template="{{ messages }}")
    assert base_sha256(base) != base_sha256(original())
    assert tokenizer_sha256(base) != tokenizer_sha256(original())


def test_a_file_is_read_once_until_it_changes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from forge.training.models import digests

    read: list[Path] = []
    read_whole = digests.read_whole

    def counted(source: Any, shard: Any) -> Any:
        read.append(shard.path)
        return read_whole(source, shard)

    monkeypatch.setattr(digests, "read_whole", counted)
    monkeypatch.setenv("FORGE_CACHE", str(base.parent / "cache"))
    first = base_sha256(base)
    assert (base_sha256(base), len(read)) == (first, 1)
    (base / "model.safetensors").touch()
    assert (base_sha256(base), len(read)) == (first, 2)
    for note in (base.parent / "cache" / "digests").iterdir():
        note.write_text("not JSON")
    assert (base_sha256(base), len(read)) == (first, 3)


@pytest.mark.parametrize("digest", [base_sha256, tokenizer_sha256])
def test_a_directory_without_a_model_has_no_digest(tmp_path: Path, digest: Callable[[Path], str]) -> None:
    with pytest.raises(DataError, match="holds no"):
        digest(tmp_path)
