"""Rungs 2 and 3 where Forge's layers train: with dropout no layout changes a step, and each planted fault is red."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.training.backends import load_plan, read_plans
from forge.training.config.workload import load_workload
from forge.training.system.environment import ROOT
from forge.training.system.errors import CheckError, ConfigurationError
from harness.measurement.results import Store
from harness.parity import rungs
from harness.parity.first_step.checks import first_step_checks, layout_checks
from harness.parity.first_step.compare import MeasuredStep
from harness.parity.first_step.measure import _processes, dropout_steps
from harness.parity.plans import plan_overrides
from harness.parity.probes import first_step, kernel_faults
from harness.parity.session import Ladder
from harness.parity.suite import CANDIDATE, DROPOUT_LAYOUTS, PLANS, WORKLOAD, StepPlan
from harness.session import Session
from tests.support.first_steps import BF16, PACKED, PADDED, Bench, missed, overrides, write_bases

FORGE = "kernels=forge"
KEPT, RECOMPUTED, OFFLOADED = (f"gradient_checkpointing={name}" for name in ("none", "full", "offload"))
TILED = "mlp_tile_tokens=64"
DROPOUT = 0.1

# Layout, padding, and more of the plan
LAYOUTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("1x8", PACKED, (KEPT,)),
    ("4x2", PACKED, (RECOMPUTED, TILED)),
    ("8x1", PACKED, ("micro_batch_tokens=200",)),
)
OTHERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("2x4", PACKED, ()),
    ("4x2", PADDED, (TILED,)),
    ("8x1", PACKED, (KEPT,)),
    ("8x1", PACKED, (RECOMPUTED,)),
    ("8x1", PACKED, (RECOMPUTED, "kept_activations_gib=0.0006")),
    ("8x1", PACKED, (OFFLOADED, TILED)),
    ("8x1", PADDED, (OFFLOADED,)),
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(write_bases(tmp_path_factory.mktemp("forge_layers")), "qwen2")


def take(bench: Bench, of: tuple[str, str, tuple[str, ...]], fault: str | None = None, **more: Any) -> MeasuredStep:
    layout, padding, plan = of
    return bench.take("trl", layout, padding, fault, plan=(FORGE, *plan), **more)


def rung_2(bench: Bench, step: MeasuredStep, **more: Any) -> list[str]:
    reference, baseline = bench.take("reference", **more), bench.take("trl", "1x8", **more)
    return missed(first_step_checks(reference, baseline, step))


def with_dropout(bench: Bench, steps: list[MeasuredStep], more: str = "seed=42") -> list[str]:
    """What rung 3 finds of steps with dropout, as ``judge.equivalence_with_dropout``."""
    reference = bench.take("reference", more=more, dropout=DROPOUT)
    baseline = bench.take("trl", "1x8", more=more, dropout=DROPOUT)
    of_each = [check for step in steps for check in first_step_checks(reference, baseline, step)]
    return missed([*of_each, *layout_checks(reference, baseline, steps)])


# --------------------------------------------------------------------------------------------------------------------
# Sound


def test_with_dropout_layouts_give_one_gradient_and_that_of_the_explicit_masks(bench: Bench) -> None:
    assert with_dropout(bench, [take(bench, of, dropout=DROPOUT) for of in LAYOUTS]) == []


@pytest.mark.slow
@pytest.mark.parametrize("more", ["seed=42", BF16])
def test_with_dropout_every_layout_gives_one_gradient(bench: Bench, more: str) -> None:
    steps = [take(bench, of, dropout=DROPOUT, more=more) for of in (*LAYOUTS, *OTHERS)]
    assert with_dropout(bench, steps, more) == []


def test_a_step_with_dropout_is_another_by_far_more_than_rounding(bench: Bench) -> None:
    """Else nothing would be shown by layouts that agree."""
    dropped, whole = (take(bench, LAYOUTS[0], dropout=rate) for rate in (DROPOUT, 0.0))
    assert rung_2(bench, whole) == []
    same_work = replace(dropped, facts=dropped.facts | {"workload_sha256": whole.facts["workload_sha256"]})
    assert any("documents' gradients" in line for line in rung_2(bench, same_work))


def test_a_plan_whose_layers_cannot_stand_in_is_no_measurement(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.training.backends.trainer.why_not", lambda model: "planted")
    with pytest.raises(CheckError, match="the stack's own layers train"):
        take(bench, LAYOUTS[0], more="seed=43")


def test_dropout_of_a_workload_without_any_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigurationError, match="no dropout to measure"):
        first_step.frozen_workload("smoke", overrides(bench.base, bench.folder / "train.jsonl"), dropout=True)


# --------------------------------------------------------------------------------------------------------------------
# Planted faults

# The rung that is red first, and the layout of that rung that shows it.
OWN = ("4x2", PACKED, (OFFLOADED, TILED))  # as in the plan that is shipped
RED: dict[str, tuple[int, tuple[str, str, tuple[str, ...]]]] = {
    "mask-of-the-step-before": (3, OWN),
    "mask-of-another-module": (3, OWN),
    "scale-forgotten": (2, OWN),
    "keep-rate-forgotten": (3, OWN),
    "bias-dropped": (2, OWN),
    "tile-border-off-by-one": (2, OWN),
    "documents-exchanged": (3, OWN),
    "recomputed-with-another-mask": (3, OWN),
    "log-sum-exp-of-a-neighbour": (2, OWN),
    "activations-of-another-layer": (3, ("4x2", PACKED, (KEPT,))),
    "host-memory-in-the-wrong-order": (2, OWN),
}


@pytest.mark.parametrize("fault", RED)
def test_a_fault_of_the_layers_turns_its_rung_red_and_none_below(bench: Bench, fault: str) -> None:
    rung, layout = RED[fault]
    assert rung_2(bench, take(bench, OWN)) == [], "sound"
    assert (rung_2(bench, take(bench, OWN, fault)) != []) == (rung == 2)
    if rung == 3:
        assert with_dropout(bench, [take(bench, layout, dropout=DROPOUT)]) == [], "sound"
        assert with_dropout(bench, [take(bench, layout, fault, dropout=DROPOUT)]) != []


def test_exchanged_masks_are_a_matter_of_the_layout(bench: Bench) -> None:
    """One document at a time has nothing to be exchanged with: the layouts differ from one another too."""
    layouts = [("1x8", PACKED, (KEPT,)), ("4x2", PACKED, (KEPT,))]
    steps = [take(bench, of, "documents-exchanged", dropout=DROPOUT) for of in layouts]
    assert with_dropout(bench, steps[:1]) == []
    assert any(" against trl 4x2" in line for line in with_dropout(bench, steps))


def test_the_documentation_names_every_fault_with_its_rung() -> None:
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \|.*\| (\d)[^|]*\|$", text, re.MULTILINE)
    assert {name: int(rung) for name, rung in rows} == {name: rung for name, (rung, _) in RED.items()}
    assert list(RED) == list(kernel_faults.FAULTS)


# --------------------------------------------------------------------------------------------------------------------
# The ladder's plans


def test_every_shipped_plan_goes_through_rungs_1_to_3() -> None:
    """Up to what the ladder sets itself: micro-batches, padding, and tiles that documents of its length reach."""

    def layout(backend: Any, of: str, changes: tuple[str, ...] = ()) -> str:
        plan = load_plan(load_workload(of), backend, changes)
        return plan.model_copy(update={"micro_batch": 8, "mlp_tile_tokens": None}).model_dump_json()

    judged = {(plan.backend, layout(plan.backend, WORKLOAD, plan_overrides(plan))) for plan in PLANS}
    judged.add((CANDIDATE, layout(CANDIDATE, WORKLOAD)))
    shipped = {
        (backend, layout(backend, name))
        for name in (path.name.partition(".")[0] for path in (ROOT / "forge" / "workloads").glob("*.plans.yaml"))
        for backend in read_plans(load_workload(name))
        if backend != "legacy"  # the baseline: its own layout, always
    }
    assert shipped <= judged
    assert {plan.backend for plan in PLANS if FORGE in plan.changes} == {"trl", "unsloth"}


def test_only_forges_layers_are_asked_for_dropout_in_every_layout(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    ladder = Ladder(Session(store=Store(tmp_path / "store"), train=tmp_path / "train.jsonl"), base=str(tmp_path))
    assert not ladder.has_forge_layers
    with_layers = replace(ladder, plan=(FORGE,))
    assert with_layers.has_forge_layers
    processes = _processes(with_layers, dropout_steps(with_layers))
    assert all(process.dropout for process in processes)
    steps = [step for process in processes if process.whose == "candidate" for step in process.steps]
    assert sorted(steps) == sorted(f"{kind}:{layout}" for kind in ("nf4", "none") for layout in DROPOUT_LAYOUTS)
    assert {process.plan for process in processes if process.whose == "candidate"} == {(FORGE,)}
    for layout in DROPOUT_LAYOUTS:
        _, _, changes = first_step.parse_step(f"nf4:{layout}", "unsloth")
        load_plan(load_workload(WORKLOAD), CANDIDATE, [FORGE, *changes])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_plan_with_forges_layers_passes_through_the_ladders_own_processes(bench: Bench, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Recite `{i}.md`", "input": "", "output": f"Ship {i}. " + "It counts. " * (1 + i % 12)}
        for i in range(230)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ladder = Ladder(
        Session(store=Store(tmp_path / "store"), train=tmp_path / "train.jsonl"),
        base=str(bench.base),
        baseline="trl",
        dropout_layouts=("2x4:none", f"4x2:none:{RECOMPUTED},{TILED}", "8x1:none:micro_batch_tokens=300"),
        num_positions=6,
        num_side_by_side=1,
        overrides=("model.quantization=none", BF16, "data.max_length=176", "lora.rank=4"),
    )
    plan = StepPlan("trl with kernels=forge", "trl", changes=(FORGE,), layouts=("4x2:none", "1x8:none"))
    judged = rungs.plan_verdict(ladder, plan)
    assert judged.status == "PASS", judged.reason
    named = [check["name"] for check in judged.figures["checks"]["none"]]
    assert any("with dropout against" in name for name in named)
    assert len(named) > len([name for name in named if "dropout" in name]) > 10
