"""The table of layouts: what it suggests fits the card, loads, and is carried out by the backend it is for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from forge.training.backends import Backend, load_backend
from forge.training.checks.layout import suggest_layout
from forge.training.checks.machine import check_layout
from forge.training.checks.model import find_base
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload, load_workload
from forge.training.models.base import QWEN2_7B
from forge.training.models.qwen2 import config_json
from forge.training.planner.sizes import Sizes


def card(gib: float, capability: str = "8.6") -> dict[str, Any]:
    return {"memory_total_bytes": int(gib * 2**30), "compute_capability": capability}


def test_without_a_gpu_it_is_the_trial_base_unless_another_is_asked_for() -> None:
    layout = suggest_layout(None, "trl", has_bitsandbytes=True)
    assert (layout.base, layout.quantization, layout.dtype, layout.is_trial) == ("tiny", "none", "float32", True)
    layout = suggest_layout(None, "trl", has_bitsandbytes=True, base="Qwen/Qwen2-0.5B-Instruct")
    assert (layout.base, layout.dtype, layout.is_trial) == ("Qwen/Qwen2-0.5B-Instruct", "float32", False)


@pytest.mark.parametrize("backend", ["trl", "unsloth"])
@pytest.mark.parametrize("has_bitsandbytes", [True, False])
@pytest.mark.parametrize("gib", [0.0, 2.0, 4.0, 6.0, 7.6, 8.0, 12.0, 16.0, 24.0, 80.0])
@pytest.mark.parametrize("base", [None, "tiny", "small", "Qwen/Qwen2-7B-Instruct", "qwen2-7b", "someone/model"])
def test_every_suggestion_is_a_config_and_a_plan_that_the_backend_takes(
    backend: Backend, has_bitsandbytes: bool, gib: float, base: str | None
) -> None:
    layout = suggest_layout(card(gib), backend, has_bitsandbytes=has_bitsandbytes, base=base)
    content: dict[str, Any] = {"name": "w", "data": {"documents": "d", "max_length": layout.max_length}}
    content["model"] = {"path": layout.base, "quantization": layout.quantization, "dtype": layout.dtype}
    content["optimizer"] = {"name": layout.optimizer}
    workload = Workload.model_validate(content)
    module = load_backend(backend)
    plan = Plan.model_validate({**module.DEFAULT_PLAN, **layout.plans[backend]})
    module.refuse(workload, plan)
    assert workload.training.effective_batch % plan.micro_batch == 0
    assert has_bitsandbytes or (layout.quantization, layout.optimizer) == ("none", "adamw_torch")
    if layout.is_trial:
        assert layout.max_length <= 4096


@pytest.mark.parametrize(("gib", "capability", "dtype"), [(8.0, "8.6", "bfloat16"), (8.0, "7.5", "float16")])
def test_a_card_of_eight_gib_gets_the_7b_base_whose_weights_fit(gib: float, capability: str, dtype: str) -> None:
    layout = suggest_layout(card(gib, capability), "unsloth", has_bitsandbytes=True)
    assert (layout.base, layout.quantization, layout.dtype) == ("Qwen/Qwen2-7B-Instruct", "nf4", dtype)
    assert (layout.max_length, layout.plans["unsloth"]["mlp_tile_tokens"]) == (2048, 2048)
    model = {"quantization": layout.quantization, "dtype": layout.dtype}
    content = {"name": "w", "model": model, "optimizer": {"name": layout.optimizer}, "data": {"documents": "d"}}
    config = config_json(QWEN2_7B, {"<|endoftext|>": 0, "<|im_end|>": 0})
    floor = Sizes.of(Workload.model_validate(content), config).floor_bytes
    assert floor < 0.85 * gib * 2**30


def test_more_memory_never_means_shorter_documents() -> None:
    for backend in ("trl", "unsloth"):
        lengths = [
            suggest_layout(card(gib), backend, has_bitsandbytes=True, base="Qwen/Qwen2-7B-Instruct").max_length
            for gib in (6, 8, 12, 16, 24, 80)
        ]
        assert lengths == sorted(lengths)


def test_a_plan_that_does_not_fit_the_card_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    qlora = load_workload("genome_8k", ["model.path=qwen2-7b"])
    weights, _ = find_base(qlora, has_gpu=True)
    assert weights is not None
    everything = Plan(kernels="forge", padding="none", gradient_checkpointing="none", micro_batch_tokens=8192)
    (finding,) = check_layout(qlora, everything, weights, card(8.0))
    assert finding.level == "warning"
    assert re.search(r"8,192 tokens at a time, .*, take about [34]\d\.\d GiB of 8\.0", finding.message)
    little = {"gradient_checkpointing": "offload", "loss_chunk_gib": 0.0625, "mlp_tile_tokens": 1024}
    (finding,) = check_layout(qlora, everything.model_copy(update=little), weights, card(12.0))
    assert finding.level == "ok"
    assert not list(check_layout(qlora, Plan(), weights, card(8.0)))
    assert not list(check_layout(qlora, everything, weights, None))
