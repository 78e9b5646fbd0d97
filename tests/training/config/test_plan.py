"""A plan changes how a step is carried out and never which examples it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from forge.training.backends import describe_plan_source, load_plan
from forge.training.config.find import WORKLOADS
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload, load_workload
from forge.training.data.batching import micro_batches, num_steps, step_order
from forge.training.system.errors import ConfigurationError


def workload(**training: object) -> Workload:
    return Workload.model_validate({"name": "w", "data": {"train": "x"}, "training": training})


@given(
    num_examples=st.integers(1, 60),
    epochs=st.integers(1, 4),
    effective=st.sampled_from([1, 2, 4, 8]),
    micro=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
    grouping=st.sampled_from(["none", "length", "tokens"]),
)
def test_every_plan_trains_on_the_same_examples_in_every_step(
    num_examples: int, epochs: int, effective: int, micro: int, seed: int, grouping: Any
) -> None:
    work = workload(epochs=float(epochs), effective_batch=effective, seed=seed)
    lengths = np.arange(num_examples, dtype=np.int64)[::-1] * 7 % 31
    plan = Plan(micro_batch=min(micro, effective), grouping=grouping)
    steps = step_order(work, num_examples)
    assert len(steps) == num_steps(work, num_examples)
    for step in steps:
        laid_out = micro_batches(step, lengths, plan)
        assert sorted(i for batch in laid_out for i in batch) == sorted(step.tolist())
        if len(step) == effective:  # only the run's last step may be short
            assert len(laid_out) == effective // plan.micro_batch
    seen = np.concatenate(steps)
    assert np.bincount(seen, minlength=num_examples).tolist() == [epochs] * num_examples
    assert all(len(step) == effective for step in steps[:-1])


def test_the_order_depends_on_the_seed_alone() -> None:
    first = np.concatenate(step_order(workload(seed=1), 40))
    assert np.array_equal(first, np.concatenate(step_order(workload(seed=1), 40)))
    assert not np.array_equal(first, np.concatenate(step_order(workload(seed=2), 40)))


def test_max_steps_goes_round_as_often_as_it_needs() -> None:
    steps = step_order(workload(max_steps=7, effective_batch=8), 10)
    assert [len(s) for s in steps] == [8] * 7


def test_a_micro_batch_that_does_not_divide_the_effective_batch_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="does not divide"):
        load_plan(workload(effective_batch=8), "trl", ["micro_batch=3"])


def test_an_unknown_plan_key_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="microbatch"):
        load_plan(workload(), "trl", ["microbatch=3"])


def write_config(path: Path, name: str = "mine", plans: str | None = "trl: {micro_batch: 4}\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"name: {name}\ndata: {{train: corpus.jsonl}}\n")
    if plans is not None:
        path.with_name(f"{path.stem}.plans.yaml").write_text(plans)
    return path


def test_a_plan_beside_the_config_is_read_and_the_name_plays_no_part(tmp_path: Path) -> None:
    for path in (tmp_path / "mine.yaml", tmp_path / "a" / "other.yml", tmp_path / "b" / "v1.2.yaml"):
        for name in ("mine", "genome_8k", path.stem):
            loaded = load_workload(write_config(path, name), ["name=renamed"])
            assert load_plan(loaded, "trl").micro_batch == 4
            assert load_plan(loaded, "trl", ["micro_batch=2"]).micro_batch == 2
            assert describe_plan_source(loaded, "trl") == f"{path.stem}.plans.yaml"
            assert describe_plan_source(loaded, "legacy") == f"legacy's default: {path.stem}.plans.yaml has none for it"


def test_a_config_without_a_plan_has_the_default_whatever_it_is_called(tmp_path: Path) -> None:
    loaded = load_workload(write_config(tmp_path / "genome_8k.yaml", "genome_8k", plans=None))
    assert load_plan(loaded, "trl") == load_plan(workload(), "trl") != load_plan(load_workload("genome_8k"), "trl")
    assert describe_plan_source(loaded, "trl", ["micro_batch=2"]) == "trl's default, with --plan micro_batch=2"


def test_the_shipped_workloads_have_the_plans_beside_them() -> None:
    for path in sorted(WORKLOADS.glob("*.plans.yaml")):
        loaded = load_workload(path.name.removesuffix(".plans.yaml"))
        assert loaded.plans_path == path
        for backend, own in yaml.safe_load(path.read_text()).items():
            assert load_plan(loaded, backend).model_dump().items() >= own.items()


def test_a_document_longer_than_the_others_together_has_a_micro_batch_of_its_own() -> None:
    lengths = np.array([300, 900, 32_768, 700, 500, 1_200, 80, 2_000], dtype=np.int64)
    plan = Plan(micro_batch=4, grouping="tokens")
    assert micro_batches(np.arange(8), lengths, plan)[0] == [2]
    without = np.array([300, 900, 800, 700, 500, 1_200, 80, 2_000], dtype=np.int64)
    totals = [int(without[group].sum()) for group in micro_batches(np.arange(8), without, plan)]
    assert max(totals) <= 4 / 3 * (sum(totals) / 2)


def test_the_legacy_layout_is_fixed() -> None:
    for name in ("legacy_256", "genome_8k", "genome_full"):
        plan = load_plan(load_workload(name), "legacy")
        assert (plan.micro_batch, plan.padding, plan.gradient_checkpointing) == (1, "longest", "full")
        assert plan.grouping == "none"
