"""Claims about made models: the same bytes each time, and what transformers reads as what was meant."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from forge.training.models import qwen2
from forge.training.models.base import QWEN2_7B, SMALL, TINY
from forge.training.models.digests import base_sha256, tokenizer_sha256
from forge.training.models.qwen2 import (
    Recipe,
    Shape,
    docstrings,
    documentation,
    tensor_shapes,
    write_configs,
    write_random,
    write_trained,
)
from forge.training.models.tokenizers import CONTROL_TOKENS, save_tokenizer, train_tokenizer
from forge.training.system.errors import DiskError
from forge.training.system.files import sha256_file
from tests.support.tiny_model import scratch


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """Imported when the first test runs: collecting the tests imports no torch."""
    global torch, load_file
    import torch
    from safetensors.torch import load_file


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
    with pytest.raises(DiskError, match="GB are free"):
        write_random(enormous, tmp_path, seed=1, say=silent)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("writer", ["random", "trained"])
def test_a_disk_that_fills_up_is_one_message(tmp_path: Path, writer: str) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from pathlib import Path; from forge.training.system.errors import DiskError\n"
        "import tests.training.models.test_qwen2 as t, torch\n"
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
