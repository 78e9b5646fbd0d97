"""Claims about base models: made the same each time, whole or not there, and nothing unsafe is taken for one."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from forge.training.models import qwen2
from forge.training.models.base import QWEN2_7B, SMALL, TINY, resolve_base
from forge.training.models.digests import base_sha256, tokenizer_sha256
from forge.training.models.qwen2 import Recipe, Shape, tensor_shapes, write_configs, write_random, write_trained
from forge.training.models.text import docstrings, documentation
from forge.training.models.tokenizers import CONTROL_TOKENS, save_tokenizer, train_tokenizer
from forge.training.system.environment import has_cuda_gpu
from forge.training.system.errors import ConfigurationError, DataError, DiskError, ForgeError, MachineError
from forge.training.system.files import sha256_file
from tests.support.tiny_model import scratch


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """Imported when the first test runs: collecting the tests imports no torch."""
    global torch, load_file, save_file
    import torch
    from safetensors.torch import load_file, save_file


SHAPE = replace(TINY, hidden_size=64, intermediate_size=256, num_hidden_layers=2, vocab_size=512)
RECIPE = Recipe(num_steps=30, batch=4, sequence=64, learning_rate=3e-3)


def silent(_: str) -> None:
    pass


@cache
def texts() -> tuple[str, ...]:
    return tuple(text for _, text in documentation()[:5])


def train(directory: Path, recipe: Recipe = RECIPE) -> float:
    """A whole base of 0.2 million parameters, in a second or two."""
    directory.mkdir(parents=True)
    tokenizer = train_tokenizer(texts(), SHAPE.vocab_size)
    save_tokenizer(tokenizer, directory, SHAPE.max_position_embeddings)
    write_configs(SHAPE, {token: tokenizer.token_to_id(token) for token in CONTROL_TOKENS}, directory)
    return write_trained(SHAPE, recipe, tokenizer, list(texts()), directory, device="cpu", say=silent)


@cache
def trained() -> Path:
    train(scratch() / "standin")
    return scratch() / "standin"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the trained base to be spoilt."""
    return Path(shutil.copytree(trained(), tmp_path / "base"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Trained bases


def test_a_recipe_makes_the_same_bytes_each_time_and_another_seed_makes_others(tmp_path: Path) -> None:
    first = trained()
    torch.manual_seed(1911)  # what the process drew before does not matter
    train(tmp_path / "again")
    train(tmp_path / "other", replace(RECIPE, seed=43))
    digests = [sha256_file(folder / "model.safetensors") for folder in (first, tmp_path / "again")]
    assert digests[0] == digests[1] != sha256_file(tmp_path / "other" / "model.safetensors")
    assert tokenizer_sha256(trained()) == tokenizer_sha256(tmp_path / "again") == tokenizer_sha256(tmp_path / "other")


def test_a_base_learns(tmp_path: Path) -> None:
    untrained = math.log(SHAPE.vocab_size)
    assert train(tmp_path / "learnt", replace(RECIPE, num_steps=150)) < untrained - 1.5


def test_making_a_base_leaves_random_numbers_and_threads_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(7)
    train(tmp_path / "made", replace(RECIPE, num_steps=1, num_threads=threads + 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_transformers_reads_every_setting_and_every_tensor_of_a_base() -> None:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(trained(), dtype="auto", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == dict(tensor_shapes(SHAPE))
    assert model.dtype == torch.bfloat16
    inverse = 1e6 ** (-torch.arange(0, 16, 2) / 16)
    assert torch.allclose(model.model.rotary_emb.inv_freq, inverse, rtol=1e-5)  # rope_theta at the top is read
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == [511, 509]


def test_no_sentence_of_the_demos_documents_is_in_what_a_base_learns_from() -> None:
    from forge.training.config.workload import load_workload

    documents = Path(qwen2.__file__).parents[1] / "data" / "embedded"
    smoke = load_workload("smoke")
    assert smoke.data.documents == "embedded"
    assert smoke.evaluation.facts
    python_text = "\n".join(text for _, text in [*documentation(), *docstrings()])
    assert len(python_text) > 1_000_000
    for fact in smoke.evaluation.facts:
        asked = next(path for path in documents.glob("*.md") if f"`{path.name}`" in fact.question)
        assert fact.answer in asked.read_text()[:200]  # within the first tokens of the answer
        assert fact.answer not in python_text
        assert fact.answer not in fact.question


# Random bases


def test_qwen2_7b_has_its_published_number_of_parameters() -> None:
    assert sum(math.prod(size) for _, size in tensor_shapes(QWEN2_7B)) == 7_615_616_512


@pytest.mark.parametrize("shape", [TINY, SMALL, QWEN2_7B], ids=["tiny", "small", "qwen2-7b"])
def test_a_shape_is_that_of_transformers_model(shape: Shape) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**qwen2.config_json(shape, dict.fromkeys(CONTROL_TOKENS, 0))))
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == dict(tensor_shapes(shape))


def test_random_weights_are_the_same_each_time_in_files_no_larger_than_asked(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        write_random(SHAPE, tmp_path / name, seed=seed, say=silent, shard_bytes=100_000)
    one, again, other = (base_sha256(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again != other
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {name for name, _ in tensor_shapes(SHAPE)}
    files = sorted((tmp_path / "one").glob("*.safetensors"))
    assert len(files) > 2
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        inside = load_file(file)
        assert sum(tensor.nbytes for tensor in inside.values()) <= 100_000
        assert all(index["weight_map"][name] == file.name for name in inside)
        tensors |= inside
    assert sum(tensor.nbytes for tensor in tensors.values()) == index["metadata"]["total_size"]
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif name.endswith(".bias"):
            assert not tensor.any()
        else:
            assert tensor.float().std().item() == pytest.approx(0.02, rel=0.05)
            assert abs(tensor.float().mean().item()) < 0.001


def test_a_disk_too_small_for_random_weights_is_found_before_the_first(tmp_path: Path) -> None:
    enormous = replace(QWEN2_7B, vocab_size=10**9)
    with pytest.raises(DiskError, match="GB free"):
        write_random(enormous, tmp_path, seed=1, say=silent)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("writer", ["random", "trained"])
def test_a_disk_that_fills_up_is_one_message(tmp_path: Path, writer: str) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from pathlib import Path; from forge.training.system.errors import DiskError\n"
        "import tests.training.models.test_base as t, torch\n"
        f"out = Path({str(tmp_path)!r})\n"
        "try:\n"
        "    t.write_random(t.SHAPE, out, seed=1, say=t.silent) if 'random' == " + repr(writer) + " else "
        "t.qwen2._save({'a': torch.zeros(100_000)}, out / 'model.safetensors')\n"
        "except DiskError as error:\n"
        "    print('DiskError', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("DiskError cannot write"), done.stderr
    assert "FORGE_CACHE" in done.stdout


# Made once, whole or not at all

MAKER = (
    "from forge.training.models import base; from forge.training.models.qwen2 import Recipe; "
    "base.TINY_RECIPE = Recipe(num_steps={steps}, batch=2, sequence=32, learning_rate=1e-3); "
    "print(base.resolve_base('tiny', progress=lambda line: print(line, flush=True)), flush=True)"
)


def start_maker(cache: Path, num_steps: int) -> subprocess.Popen[str]:
    """A process that makes `tiny` in a cache of its own, with fewer steps than the real recipe."""
    environment = os.environ | {"FORGE_CACHE": str(cache)}
    code = MAKER.format(steps=num_steps)
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_make_one_base(tmp_path: Path) -> None:
    makers = [start_maker(tmp_path, 3) for _ in range(2)]
    answers = [maker.communicate(timeout=180)[0].splitlines() for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0]
    assert answers[0][-1] == answers[1][-1]
    assert sum("making the base" in line for lines in answers for line in lines) == 1
    made = Path(answers[0][-1])
    assert made.parent == tmp_path / "models"
    assert resolve_base(str(made)) == made
    assert json.loads((made / "standin.json").read_text())["loss_nats_per_token"] > 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_base_whose_making_was_stopped_is_not_there(tmp_path: Path, number: signal.Signals) -> None:
    maker = start_maker(tmp_path, 100_000)
    assert maker.stdout is not None
    while not maker.stdout.readline().startswith("training a base"):
        assert maker.poll() is None
    maker.send_signal(number)
    maker.communicate(timeout=60)
    assert maker.returncode != 0
    left = sorted(path.suffix for path in (tmp_path / "models").iterdir())
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
    "code in the config": (lambda b: edit(b / "config.json", auto_map={}), DataError, "code of its own"),
    "kernel from the hub": (
        lambda b: edit(b / "config.json", _attn_implementation_internal="x/y"),
        DataError,
        "code of its own",
    ),
    "another architecture": (
        lambda b: edit(b / "config.json", architectures=["T5ForConditionalGeneration"]),
        ConfigurationError,
        "T5For",
    ),
    "strange architectures": (
        lambda b: edit(b / "config.json", architectures={"a": 1}),
        ConfigurationError,
        "not supported",
    ),
    "quantised weights": (
        lambda b: edit(b / "config.json", quantization_config={"bits": 4}),
        ConfigurationError,
        "quantised weights",
    ),
    "pickled weights": (_pickled, DataError, "only pickled weights"),
    "no weights": (lambda b: (b / "model.safetensors").unlink(), DataError, "no safetensors file"),
    "weights cut short": (_cut_short, DataError, "model.safetensors"),
    "a shard missing": (_without_a_shard, DataError, "model-00002-of-00002"),
    "no tokenizer": (lambda b: (b / "tokenizer.json").unlink(), DataError, r"no tokenizer\.json"),
    "no tokenizer settings": (lambda b: (b / "tokenizer_config.json").unlink(), DataError, "tokenizer_config"),
    "code in the tokenizer": (lambda b: edit(b / "tokenizer_config.json", auto_map={}), DataError, "code of its own"),
    "a tokenizer file elsewhere": (
        lambda b: edit(b / "tokenizer_config.json", vocab_file="../../secret"),
        DataError,
        "vocab_file leaves",
    ),
    "an absolute tokenizer file": (
        lambda b: edit(b / "tokenizer_config.json", tokenizer_file="/etc/passwd"),
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


# Identity


def test_a_base_is_known_by_its_content_and_not_by_its_place(base: Path) -> None:
    assert base_sha256(base) == base_sha256(trained())
    assert tokenizer_sha256(base) == tokenizer_sha256(trained())
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    edit(base / "tokenizer_config.json", chat_template="{{ messages }}")
    assert base_sha256(base) != base_sha256(trained())
    assert tokenizer_sha256(base) != tokenizer_sha256(trained())


def test_a_file_is_read_once_until_it_changes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from forge.training.models import digests as identity

    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr(identity, "sha256_file", counted)
    monkeypatch.setenv("FORGE_CACHE", str(base.parent / "cache"))
    first = base_sha256(base)
    assert (base_sha256(base), len(read)) == (first, 1)
    (base / "model.safetensors").touch()
    assert (base_sha256(base), len(read)) == (first, 2)
    for note in (base.parent / "cache" / "digests").iterdir():
        note.write_text("not JSON")
    assert (base_sha256(base), len(read)) == (first, 3)


@pytest.mark.parametrize("digest", [base_sha256, tokenizer_sha256])
def test_a_directory_without_a_model_has_no_identity(tmp_path: Path, digest: Callable[[Path], str]) -> None:
    with pytest.raises(DataError, match="holds no"):
        digest(tmp_path)
