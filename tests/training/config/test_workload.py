"""The config file: every error at once, no YAML surprises, a digest of the work alone."""

from __future__ import annotations

import os
import re
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from forge.training.backends import load_plan
from forge.training.config.find import WORKLOADS
from forge.training.config.overrides import shown
from forge.training.config.workload import load_workload
from forge.training.config.yaml import parse_scalar
from forge.training.system.errors import ConfigurationError

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
        ("name: a\nname: b\n", "'name'"),
        ("name: &x a\ndescription: *x\n", "aliases are not allowed"),
        ("name: !!python/object:os.system a\n", "not usable YAML"),
        ("- a\n- b\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("name: [", "not usable YAML"),
        ("name: a\nlora:\n\trank: 4\n", "mine.yaml:3:1: not usable YAML"),
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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("-3", -3),
        ("0777", 777),
        ("true", True),
        ("~", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("9" * 41, "9" * 41),
    ],
)
def test_a_plain_scalar_means_what_yaml_1_2_says(text: str, value: object) -> None:
    assert repr(parse_scalar(text)) == repr(value)


@pytest.mark.parametrize(
    "text", ["1e-4", "no", "1:30", "0777", "1_000", "2026-01-02", "~", "", ".5", "= x", "a: b", "é"]
)
def test_a_workload_written_out_reads_back_whatever_its_texts_look_like(tmp_path: Path, text: str) -> None:
    workload = load_workload(write(tmp_path, MINIMAL)).model_copy(update={"description": text})
    assert load_workload(write(tmp_path, workload.to_yaml())) == workload
    assert yaml.safe_load(workload.to_yaml())["description"] == text


BAD_SETTINGS = {
    "optimizer: {learning_rate: -1e-4}": "optimizer.learning_rate: Input should be greater than 0 (given: -0.0001)",
    "optimizer: {learning_rate: .inf}": "optimizer.learning_rate: Input should be a finite number",
    "optimizer: {learning_rate: .nan}": "optimizer.learning_rate",
    "optimizer: {learning_rate: 1e999}": "optimizer.learning_rate: Input should be a finite number",
    "optimizer: {learning_rate: '1e-4'}": "optimizer.learning_rate: Input should be a valid number (given: '1e-4')",
    "lora: {rank: 16.0}": "lora.rank: Input should be a valid integer (given: 16.0)",
    "lora: {rank: true}": "lora.rank: Input should be a valid integer",
    "lora: {use_rslora: yes}": "lora.use_rslora: Input should be a valid boolean (given: 'yes')",
    "lora: {rnak: 8}": "lora.rnak: unknown key; did you mean rank?",
    "lroa: {rank: 8}": "lroa: unknown key; did you mean lora?",
    "evaluation: {facts: [{question: a, anser: b}]}": "evaluation.facts.0.anser: unknown key; did you mean answer?",
    "lora: [1]": "lora: Input should be a valid dictionary",
    "lora: {targets: []}": "lora.targets",
    "training: {epochs: 1e9}": "training.epochs",
    "training: {effective_batch: 1000000000000}": "training.effective_batch",
    "training: {max_steps: 100000000, effective_batch: 8}": "more than 100,000,000 examples",
    "model: {hf_token: x}": "model.hf_token: unknown key; credentials come from the environment only",
    "report_to: [tensorbaord]": "report_to.0: Input should be 'tensorboard', 'wandb'",
    'description: "a\\0b"': "description: a NUL character",
    'description: "\\ud800"': "description: half of a surrogate pair",
    "model: {path: '~nobody-of-that-name/x'}": None,  # refused where it is opened
    f"model: {{path: {'x' * 300}}}": "(300 characters)",
    f"model: {{path: {'x/' * 3000}}}": "(6,000 characters)",
}


@pytest.mark.parametrize("line", BAD_SETTINGS, ids=lambda line: line[:50])
def test_a_wrong_setting_is_one_line_that_names_it(tmp_path: Path, line: str) -> None:
    path, said = write(tmp_path, MINIMAL + line + "\n"), BAD_SETTINGS[line]
    if said is None:
        load_workload(path)
        return
    with pytest.raises(ConfigurationError) as caught:
        load_workload(path)
    assert said in caught.value.message


def test_a_file_full_of_errors_shows_twenty_and_counts_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "".join(f"key{i}: 1\n" for i in range(500)))
    with pytest.raises(ConfigurationError) as caught:
        load_workload(path)
    assert "500 errors" in caught.value.message
    assert caught.value.message.endswith("and 480 more")
    assert caught.value.message.count("\n") == 21


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghi")
)
BOMBS = {
    "billion laughs": LAUGHS,
    "an alias of itself": "a: &a [*a]\n",
    "merge keys": "a: &a {b: 1}\nc: {<<: *a}\n",
    "lists in lists": "a: " + "[" * 60_000,
    "mappings in mappings": "a: " + "{a: " * 15_000,
    "sequences in sequences": "a:\n" + "".join(" " * i + "-\n" for i in range(1, 350)),
    "an open quote": 'a: "' + "x\n" * 30_000,
    "ten thousand entries": "a: [" + "x," * 10_000 + "]",
    "a long number": "name: " + "9" * 60_000,
    "a tag": "name: !!python/object/apply:os.system [echo]",
    "a bad boolean": "name: !!bool maybe",
    "a bad date": "name: !!timestamp never",
    "a key that is a list": "? [a]\n: 1\n",
    "a larger file": "# " + "x" * (5 << 20),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_file_is_refused_soon_and_in_little_memory(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, BOMBS[name])
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(ConfigurationError) as caught:
            load_workload(path)
        assert time.process_time() - started < 20  # tracemalloc makes it several times slower
        assert tracemalloc.get_traced_memory()[1] < 250e6
    finally:
        tracemalloc.stop()
    assert len(caught.value.message) < 3000 + len(str(path))


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with open(path, "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(ConfigurationError, match="larger than"):
        load_workload(path)


@pytest.mark.timeout(20)
def test_a_config_that_is_a_pipe_or_has_an_impossible_name_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for source in (tmp_path / "pipe.yaml", "x" * 5000, "a\0b", "", "..", "smoke.plans"):
        with pytest.raises(ConfigurationError, match=re.escape(shown(repr(str(source))))):
            load_workload(source)


HUB_TOKEN = "hf_" + "Zq7Rw2Lk9Xv4Bn6Tm1Yc8Hd3Jf5Gs0PaUe"


@pytest.mark.parametrize(
    "planted",
    [
        f"description: {HUB_TOKEN}",
        f"description: 'use {HUB_TOKEN} here'",
        f"{HUB_TOKEN}: 1",
        f"model: {{revision: {HUB_TOKEN}}}",
        f"model: {{token: {HUB_TOKEN}}}",
        f"lora: {{rank: {HUB_TOKEN}}}",
        f"lora: {{targets: [q_proj, {HUB_TOKEN}]}}",
        f"report_to: [{HUB_TOKEN}]",
        f"optimizer: {{name: {HUB_TOKEN}}}",
        "data2: https://user:" + "Zq7Rw2Lk9Xv4@example.org/x",
        "description: " + "ghp_" + HUB_TOKEN[3:] + "aaaa",
    ],
)
def test_a_credential_is_refused_and_not_repeated(tmp_path: Path, planted: str) -> None:
    with pytest.raises(ConfigurationError, match="looks like a credential") as caught:
        load_workload(write(tmp_path, MINIMAL + planted + "\n"))
    assert "Zq7Rw2Lk9Xv4" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("override", ["lora.rank={}", "{}=1", "{}", "training.{}=2", "model.path={}", "lora={{a: {}}}"])
def test_a_credential_in_an_option_is_refused_and_not_repeated(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, MINIMAL)
    with pytest.raises(ConfigurationError) as caught:
        load_workload(path, [override.format(HUB_TOKEN)])
    assert "Zq7Rw2Lk9Xv4" not in str(caught.value)
    with pytest.raises(ConfigurationError) as caught:
        load_plan(load_workload(path), "trl", [override.format(HUB_TOKEN)])
    assert "Zq7Rw2Lk9Xv4" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="genome_8k") as caught:
        load_workload(HUB_TOKEN)
    assert "Zq7Rw2Lk9Xv4" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("micro_batch=3", "does not divide training.effective_batch=8"),
        ("micro_batch=0", "plan.micro_batch: Input should be greater than 0 (given: 0)"),
        ("micro_bach=2", "plan.micro_bach: unknown key; did you mean micro_batch?"),
        ("micro_batch", "--plan micro_batch: expected key=value"),
        ("padding=shortest", "plan.padding: Input should be 'longest' or 'none' (given: 'shortest')"),
        ("loss_chunk_gib=.inf", "plan.loss_chunk_gib: Input should be a finite number"),
        ("padding.x=1", "padding is not a section"),
        ("a.b.c.d.e.f.g.h.i=1", "no key has 9 parts"),
    ],
)
def test_a_wrong_plan_is_one_line_that_names_it(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_plan(load_workload(write(tmp_path, MINIMAL)), "trl", [override])
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("text", "said"), [("trl: [1]\n", "trl is no mapping"), ("tlr: {}\n", "no backend tlr"), ("[", "not usable YAML")]
)
def test_a_wrong_file_of_plans_is_one_message(tmp_path: Path, text: str, said: str) -> None:
    workload = load_workload(write(tmp_path, MINIMAL))
    (tmp_path / "mine.plans.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=said):
        load_plan(workload, "trl")


@pytest.mark.timeout(20)
def test_a_file_of_plans_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    workload = load_workload(write(tmp_path, MINIMAL))
    os.mkfifo(tmp_path / "mine.plans.yaml")
    with pytest.raises(ConfigurationError, match="no regular file"):
        load_plan(workload, "trl")


def test_an_unknown_config_names_the_known_ones(tmp_path: Path) -> None:
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


def test_an_error_names_the_file_as_it_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("name: w\ndata: {documents: embedded, sampl: 1}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"^mine\.yaml: 1 error"):
        load_workload("mine.yaml")


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


def test_of_two_sources_chosen_by_overrides_the_last_counts() -> None:
    data = load_workload("smoke", ["data.train=a.jsonl", "data.documents=docs"]).data
    assert (data.train, Path(str(data.documents)).name) == (None, "docs")


def test_choosing_documents_replaces_the_files_own_source(tmp_path: Path) -> None:
    assert load_workload("smoke", [f"data.train={tmp_path / 'c.jsonl'}"]).data.documents is None


@pytest.mark.parametrize("path", sorted(WORKLOADS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_workload_loads(path: Path) -> None:
    if path.name.count(".") == 1:
        assert load_workload(path).name == path.stem


def test_legacy_256_has_the_settings_of_the_legacy_pipeline() -> None:
    workload = load_workload("legacy_256")
    assert (workload.lora.rank, workload.lora.alpha, workload.lora.dropout) == (16, 32, 0.1)
    assert workload.lora.targets == ("q_proj", "v_proj", "up_proj", "down_proj")
    assert workload.optimizer.name == "paged_adamw_8bit"
    assert (workload.optimizer.max_grad_norm, workload.optimizer.warmup_ratio) == (0.3, 0.03)
    assert (workload.training.effective_batch, workload.training.seed, workload.data.max_length) == (8, 42, 256)
    assert (workload.data.loss_on, workload.data.long_documents) == ("all", "cut")
