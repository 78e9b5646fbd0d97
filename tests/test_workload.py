"""The workload file: every error at once, no YAML surprises, a digest of the work alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.training.errors import ConfigurationError
from forge.training.workload import WORKLOADS, load_workload

MINIMAL = "name: mine\ndata: {train: corpus.jsonl}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_error_is_reported_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "name: mine\ndata: {train: corpus.jsonl, max_lenght: 8}\nlora: {rank: -1}\noptimizer: {learning_rate: fast}\n",
    )
    with pytest.raises(ConfigurationError) as caught:
        load_workload(path, ["training.sed=3", "nonsense"])
    message = str(caught.value)
    assert "5 errors" in message
    assert "did you mean max_length?" in message
    assert "did you mean seed?" in message
    assert "lora.rank" in message
    assert "optimizer.learning_rate" in message
    assert "nonsense" in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nname: b\n", "stands twice"),
        ("name: &x a\ndescription: *x\n", "aliases are not allowed"),
        ("name: !!python/object:os.system a\n", "not usable YAML"),
        ("- a\n- b\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("name: [", "not usable YAML"),
        ("\x00", "not usable YAML"),
    ],
)
def test_unusable_yaml_is_one_readable_message(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        load_workload(write(tmp_path, text))


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "optimizer: {learning_rate: 1e-4}\n")
    assert load_workload(path).optimizer.learning_rate == 1e-4
    assert load_workload(path, ["optimizer.learning_rate=2e-5"]).optimizer.learning_rate == 2e-5


def test_an_unknown_workload_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="did you mean genome_full"):
        load_workload("genome_ful")


def test_paths_in_the_file_are_relative_to_it_and_overrides_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, MINIMAL)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_workload(path).data.train == str(tmp_path / "corpus.jsonl")
    assert load_workload(path, ["data.train=other.jsonl"]).data.train == str(elsewhere / "other.jsonl")


def test_the_digest_changes_with_the_mathematics_and_not_with_paths_or_output(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    digest = load_workload(path).digest()
    for same in (
        "data.train=elsewhere.jsonl",
        "model.path=small",
        "report_to=[]",
        "export.quantizations=[f16]",
        "training.save_every_steps=3",
    ):
        assert load_workload(path, [same]).digest() == digest
    for other in ("lora.rank=8", "training.seed=7", "data.max_length=64", "data.loss_on=all", "model.dtype=bfloat16"):
        assert load_workload(path, [other]).digest() != digest


def test_choosing_documents_replaces_the_files_own_source(tmp_path: Path) -> None:
    assert load_workload("smoke", [f"data.train={tmp_path / 'c.jsonl'}"]).data.documents is None


@pytest.mark.parametrize("path", sorted(WORKLOADS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_workload_loads(path: Path) -> None:
    if path.name.count(".") == 1:
        assert load_workload(path).name == path.stem


def test_legacy_256_has_its_owners_settings() -> None:
    workload = load_workload("legacy_256")
    assert (workload.lora.rank, workload.lora.alpha, workload.lora.dropout) == (16, 32, 0.1)
    assert workload.lora.targets == ("q_proj", "v_proj", "up_proj", "down_proj")
    assert workload.optimizer.name == "paged_adamw_8bit"
    assert (workload.optimizer.max_grad_norm, workload.optimizer.warmup_ratio) == (0.3, 0.03)
    assert (workload.training.effective_batch, workload.training.seed, workload.data.max_length) == (8, 42, 256)
    assert (workload.data.loss_on, workload.data.long_documents) == ("all", "cut")
