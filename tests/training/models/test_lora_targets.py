"""Claims about lora.targets: what cannot be shipped is refused before training, by `check` and `train` alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from forge.training.models.lora_targets import refuse_targets
from forge.training.models.weights import read_weights
from forge.training.system.errors import ConfigurationError
from tests.support.tiny_model import shared_base

GOOD = [
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ("self_attn.q_proj",),
    ("model.layers.0.mlp.up_proj",),
]
BAD = [
    (("q_proj", "lm_head"), "lm_head is no linear layer inside the model", "its linear layers are down_proj"),
    (("q_proj", "embed_tokens"), "embed_tokens is no linear layer inside the model", ""),
    (("norm",), "norm is no linear layer", ""),
    (("q_porj",), "the base has no module q_porj", "did you mean q_proj?"),
    (("w1", "upproj"), "the base has no module w1; the base has no module upproj", "did you mean up_proj?"),
    (("self_attn",), "the base has no module self_attn", ""),
    (("proj",), "the base has no module proj", ""),
]


@pytest.mark.parametrize("targets", GOOD)
def test_linear_layers_are_taken_by_the_end_of_their_names(targets: tuple[str, ...]) -> None:
    refuse_targets(targets, read_weights(shared_base()))


@pytest.mark.parametrize(("targets", "complaint", "remedy"), BAD)
@pytest.mark.parametrize("tied", [True, False])
def test_what_no_export_can_ship_is_refused_with_what_can(
    targets: tuple[str, ...], complaint: str, remedy: str, tied: bool
) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as error:
        refuse_targets(targets, read_weights(shared_base(tied=tied)))
    assert remedy in str(error.value.remedy)


def test_check_and_train_ask_the_same_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from forge.training.checks.model import check_fit
    from forge.training.config.workload import Workload
    from forge.training.train import run as training

    base = shared_base(tied=False)
    workload = Workload.model_validate(
        {
            "name": "x",
            "data": {"documents": "embedded", "max_length": 256},
            "model": {"path": str(base)},
            "lora": {"targets": ["q_proj", "lm_head"]},
        }
    )
    with pytest.raises(ConfigurationError, match="lm_head"):
        list(check_fit(workload, read_weights(base)))
    monkeypatch.setattr(training, "base_directory", lambda _: base)
    silent = SimpleNamespace(announce=lambda _: None, on_plan=lambda *_: None, on_step=lambda *_: None)
    with pytest.raises(ConfigurationError, match="lm_head"):
        training.train(workload, "trl", [], tmp_path / "run", silent)  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "examples").exists()
