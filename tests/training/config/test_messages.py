"""What a person who wrote the wrong thing is told: where a key belongs, what a run or a folder is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.training.backends import load_plan
from forge.training.config.workload import Workload, load_workload
from forge.training.system.errors import ConfigurationError

MINIMAL = "name: mine\ndata: {train: corpus.jsonl}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


MEANT = {
    "learning_rate=1e-4": "optimizer.learning_rate",
    "training.learning_rate=1e-4": "optimizer.learning_rate",
    "model.rank=8": "lora.rank",
    "gate.max_steps=8": "training.max_steps",
    "epoch=2": "training.epochs",
    "lora.epochs=2": "training.epochs",
    "lernrate.learning_rates=1": None,
    "train.epochs=2": "training",
    "learningrate=1": "optimizer.learning_rate",
    "lora.lora_alpha=8": "lora.alpha",
    "max_seq_length=99": "data.max_length",
    "training.micro_batch=2": "micro_batch of the plan",
    "data.control_token=drop": "control_tokens",
}


@pytest.mark.parametrize("override", MEANT)
def test_a_key_in_the_wrong_section_is_told_where_it_belongs(tmp_path: Path, override: str) -> None:
    section, _, key = override.partition("=")[0].rpartition(".")
    line = f"{section}: {{{key}: {override.partition('=')[2]}}}\n" if section else override.replace("=", ": ") + "\n"
    (tmp_path / "file").mkdir()
    text = MINIMAL if section != "data" else MINIMAL.replace("{train", f"{{{key}: drop, train")
    in_file = write(tmp_path / "file", text if section == "data" else text + line)
    for path, overrides in ((write(tmp_path, MINIMAL), [override]), (in_file, [])):
        with pytest.raises(ConfigurationError) as caught:
            load_workload(path, overrides)
        (said,) = [text for text in caught.value.message.splitlines() if "unknown key" in text]
        assert (f"did you mean {MEANT[override]}" in said) if MEANT[override] else ("did you mean" not in said)


def test_a_key_of_the_config_given_to_the_plan_is_told_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"did you mean data.max_length of the config \(--set data.max_length"):
        load_plan(load_workload(write(tmp_path, MINIMAL)), "trl", ["max_length=8"])


@pytest.mark.parametrize("name", ["", "workload.yaml", "run.json"])
def test_a_run_given_as_a_config_is_told_what_to_do_with_a_run(tmp_path: Path, name: str) -> None:
    run_dir = tmp_path / "my runs" / "a"
    run_dir.mkdir(parents=True)
    (run_dir / "workload.yaml").write_text(MINIMAL)
    (run_dir / "run.json").write_text("{}")
    if name == "workload.yaml":  # that one is a config
        assert load_workload(run_dir / name).name == "mine"
        return
    with pytest.raises(ConfigurationError, match="is a run, not a config") as caught:
        load_workload(run_dir / name)
    assert caught.value.remedy is not None
    for command in ("status", "evaluate", "export"):
        assert f"forge {command} '{run_dir}'" in caught.value.remedy


def test_a_folder_or_a_file_of_plans_given_as_a_config_is_told_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a folder, not a config") as caught:
        load_workload(tmp_path)
    assert f"forge init {tmp_path}" in str(caught.value.remedy)
    (tmp_path / "mine.plans.yaml").write_text("trl: {}\n")
    with pytest.raises(ConfigurationError, match="holds plans") as caught:
        load_workload(tmp_path / "mine.plans.yaml")
    assert str(tmp_path / "mine.yaml") in str(caught.value.remedy)


def test_every_key_says_what_it_means() -> None:
    def silent(model: Any, prefix: str = "") -> list[str]:
        rows = []
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                rows += silent(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                rows.append(prefix + name)
        return rows

    assert silent(Workload) == []
