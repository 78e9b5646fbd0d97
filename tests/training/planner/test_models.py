"""The models of memory and speed against runs that were measured, and against probes that are made up exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.training.config.plan import Plan
from forge.training.config.workload import load_workload
from forge.training.models.base import QWEN2_7B
from forge.training.models.qwen2 import config_json
from forge.training.planner.layouts import SAFE, Work, judged, layouts, num_tokens
from forge.training.planner.memory import MemoryModel, Probed, least_squares
from forge.training.planner.sizes import Sizes
from forge.training.planner.speed import SpeedModel

GIB = 1 << 30
RECORDS = Path(__file__).parents[2] / "data" / "h200_layouts.json"
CONFIG = config_json(QWEN2_7B, {"<|endoftext|>": 0, "<|im_end|>": 0})
FORGE = Plan(
    kernels="forge",
    padding="none",
    attention="mixed",
    gradient_checkpointing="offload",
    micro_batch_tokens=8192,
    loss_chunk_gib=1.0,
)


def sizes_7b() -> Sizes:
    return Sizes.of(load_workload("genome_full"), CONFIG)


def recorded(name: str) -> dict[str, Any]:
    """One run of genome_full on an H200, in a layout of Forge's layers."""
    runs: dict[str, Any] = json.loads(RECORDS.read_text(encoding="utf-8"))
    return dict(runs[name])


@pytest.mark.parametrize("name", ["forge-offload", "forge-budget", "forge-whole"])
def test_the_peak_of_a_run_on_an_h200_is_computed_within_five_percent(name: str) -> None:
    run = recorded(name)
    plan = Plan.model_validate(run["plan"])
    sizes = Sizes.of(load_workload("genome_full"), run["model_shape"])
    memory = MemoryModel.assumed(sizes, None, plan, is_on_host=False)
    tokens = [total for step in run["steps"] for total in step["micro_batch_tokens"]]
    assert memory.peak_bytes(plan, tokens) == pytest.approx(run["peak_allocated_bytes"], rel=0.05)


@pytest.mark.parametrize("name", ["forge-offload", "forge-budget", "forge-whole"])
def test_the_steps_of_a_run_on_an_h200_are_computed_within_a_fifth(name: str) -> None:
    """Enough to rank layouts: which of the best it is, a probe says."""
    run = recorded(name)
    plan = Plan.model_validate(run["plan"])
    sizes = Sizes.of(load_workload("genome_full"), run["model_shape"])
    memory, speed = MemoryModel.assumed(sizes, None, plan, is_on_host=False), SpeedModel(sizes)
    steady = run["steps"][run["num_warmup_steps"] :]
    seconds = 0.0
    for step in steady:
        for i, total in enumerate(step["micro_batch_tokens"]):
            kept, offload = memory.num_kept(plan, total), plan.gradient_checkpointing == "offload"
            own = step["tokens_squared"] if i == 0 else 0  # the step's longest document has nearly all of them
            seconds += speed.seconds(total, own, kept, plan.mlp_tile_tokens, offload, plan.dequantize_once)
    assert seconds == pytest.approx(sum(step["seconds"] for step in steady), rel=0.2)


def test_probes_give_their_own_coefficients_back() -> None:
    """Peaks that are made by the model itself, from a machine whose coefficients are others than assumed."""
    sizes = sizes_7b()
    there = MemoryModel(
        sizes, 6 * GIB, rows=14.0, tile_rows=5.5, constant_bytes=2e8, loss_rows=7.0, loss_bytes_per_token=3e8,
        loss_limit_bytes=3e8,
    )  # fmt: skip
    probes = []
    for tokens, tile in ((1024, None), (4096, None), (4096, 1024), (16384, 1024)):
        phases = there.phases_of(tokens, 0, tile, True, False)
        forward, backward = phases["forward and loss"], phases["backward, recomputed layers"]
        probes.append(Probed(tokens, tokens**2, 0, tile, True, forward, backward, 1.0))
    fitted = MemoryModel.assumed(sizes, 6 * GIB, FORGE, is_on_host=False).fitted(probes)
    for plan in (FORGE, FORGE.model_copy(update={"mlp_tile_tokens": 2048})):
        assert fitted.peak_bytes(plan, [32768]) == pytest.approx(there.peak_bytes(plan, [32768]), rel=0.001)


def test_no_coefficient_is_negative() -> None:
    found = least_squares([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], [3.0, 2.0, 1.0])
    assert min(found) >= 0
    assert least_squares([[1.0, 1.0], [1.0, 2.0]], [3.0, 5.0]) == pytest.approx([1.0, 2.0])


STEPS = st.lists(st.lists(st.integers(8, 32768), min_size=1, max_size=8).map(tuple), min_size=1, max_size=3).map(tuple)


@given(STEPS, st.integers(7, 120))
def test_what_is_called_safe_is_computed_to_fit_and_a_larger_card_is_never_slower(
    steps: tuple[tuple[int, ...], ...], gib: int
) -> None:
    sizes = sizes_7b()
    work, speed = Work(steps), SpeedModel(sizes)
    memory = MemoryModel.assumed(sizes, None, FORGE, is_on_host=False)
    found = layouts(work, FORGE, [], memory, speed, gib * GIB)
    assert found
    if len(found) > 1 or found[0].peak_bytes <= SAFE * gib * GIB:
        assert all(layout.peak_bytes <= SAFE * gib * GIB for layout in found)
        assert [layout.seconds for layout in found] == sorted(layout.seconds for layout in found)
        larger = layouts(work, FORGE, [], memory, speed, 2 * gib * GIB)
        assert larger[0].seconds <= found[0].seconds * 1.0001
    for layout in found[:3]:
        batches = work.micro_batches(layout.plan)
        assert sorted(n for batch in batches for n in batch) == sorted(n for step in steps for n in step)
        peak = memory.peak_bytes(layout.plan, [num_tokens(batch, layout.plan) for batch in batches])
        assert layout.peak_bytes == peak


def test_what_the_user_fixed_stays() -> None:
    sizes = sizes_7b()
    work = Work(((32768, 2000, 500), (300, 200, 100)))
    memory, speed = MemoryModel.assumed(sizes, None, FORGE, is_on_host=False), SpeedModel(sizes)
    start = FORGE.model_copy(update={"mlp_tile_tokens": 2048, "kept_activations_gib": 1.0})
    fixed = ["mlp_tile_tokens", "kept_activations_gib"]
    found = layouts(work, start, fixed, memory, speed, 80 * GIB)
    assert {layout.plan.mlp_tile_tokens for layout in found} == {2048}
    assert {layout.plan.kept_activations_gib for layout in found} == {1.0}
    assert len({layout.plan.micro_batch_tokens for layout in found}) > 1


def test_a_card_of_eight_gib_trains_documents_that_its_memory_allows() -> None:
    """The length that fits is the same question asked the other way round: about 32 thousand tokens in 8 GiB."""
    sizes = sizes_7b()
    start = FORGE.model_copy(update={"loss_chunk_gib": 0.125})
    memory, speed = MemoryModel.assumed(sizes, None, start, is_on_host=False), SpeedModel(sizes)
    for tokens, fits in ((8192, True), (65536, False)):
        (best, *_) = layouts(Work(((tokens,),)), start, [], memory, speed, 8 * GIB - (768 << 20))
        assert (best.peak_bytes <= 8 * GIB - (768 << 20)) == fits


def test_keeping_and_holding_cost_memory_and_save_time() -> None:
    sizes = sizes_7b()
    work = Work(((8192, 4096),) * 2)
    memory, speed = MemoryModel.assumed(sizes, None, FORGE, is_on_host=False), SpeedModel(sizes)
    recomputed = judged(FORGE, work, memory, speed)
    kept = judged(FORGE.model_copy(update={"kept_activations_gib": 20.0}), work, memory, speed)
    dense = judged(FORGE.model_copy(update={"dequantize_once": True}), work, memory, speed)
    for dearer in (kept, dense):
        assert dearer.peak_bytes > recomputed.peak_bytes
        assert dearer.seconds < recomputed.seconds
