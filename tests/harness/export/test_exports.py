"""The suite's session: every claim holds on the tiny base, nothing is made twice, accidents are no failures."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forge.training.system.errors import CheckError, DiskError, ForgeError, LockedError, MachineError
from harness.export import test_fidelity as gate
from harness.export.claims import CLAIMS, KINDS
from harness.export.exports import Exports
from harness.export.suite import PROBES, judged_run
from harness.recorder import CLOCK
from harness.verdict import Hold
from tests.support.export_answers import SPEC, make_session


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
@pytest.mark.benchmark(timer=CLOCK)
def test_every_claim_about_an_export_holds_on_the_tiny_base(
    exports: Exports, hold: Hold, benchmark: Any, claim: Any
) -> None:
    hold(exports.verdict(claim.name), **exports.entry)
    verdict = benchmark.extra_info["verdict"]
    print(f"{claim.name}: {verdict['reason']}")
    assert (verdict["name"], benchmark.extra_info["record_kind"]) == (claim.name, "export")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.benchmark(timer=CLOCK)
def test_an_export_that_is_only_timed_leaves_its_figures_and_no_files(tmp_path: Path, benchmark: Any) -> None:
    overrides = ("training.max_steps=3", "training.evaluate_every_steps=null", "training.save_every_steps=null")
    large = SPEC.model_copy(update={"overrides": overrides})
    exports = Exports(make_session(tmp_path), SPEC, large)
    gate.test_the_whole_export_at_7b_is_timed(exports, benchmark)
    steps = {step["name"]: step for step in benchmark.extra_info["steps"]}
    made = {"merge", "convert f16", *(f"quantise {kind}" for kind in KINDS[1:])}
    assert made <= set(steps)
    assert all(steps[name]["num_bytes"] > 0 for name in made)
    assert not list((tmp_path / "export").iterdir())
    again = Exports(make_session(tmp_path, measures=False), SPEC, large)
    assert again.timing() == exports.timing()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_second_session_makes_nothing_again(exports: Exports) -> None:
    assert exports.answer("merge") is not None
    left_out = replace(exports.session, measures=False, _results={})
    assert Exports(left_out, SPEC).answer("merge") == exports.answer("merge")
    other = Exports(left_out, SPEC.model_copy(update={"overrides": ()}))
    assert other.verdict("merge").status == "INCOMPLETE"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_another_machine_judges_what_the_store_has_of_one_adapter_and_makes_nothing(
    exports: Exports, tmp_path: Path
) -> None:
    for probe in PROBES:
        assert exports.answer(probe) is not None
    store = exports.session.store.directory
    (tmp_path / "store").mkdir()
    shutil.copytree(store / "probes", tmp_path / "store" / "probes")
    elsewhere = Exports(make_session(tmp_path, deadline=0.0), SPEC)
    assert {claim.name: elsewhere.verdict(claim.name).status for claim in CLAIMS} == {
        claim.name: exports.verdict(claim.name).status for claim in CLAIMS
    }
    assert not (tmp_path / "export").exists()
    assert str(store.parent) not in "".join(path.read_text() for path in (tmp_path / "store" / "probes").iterdir())
    next((tmp_path / "store" / "probes").glob("merge-*")).unlink()
    partly = Exports(make_session(tmp_path, deadline=0.0), SPEC)
    assert {partly.verdict(claim.name).status for claim in CLAIMS} == {"INCOMPLETE"}, "no claims of two adapters"


@pytest.mark.slow
def test_a_step_that_fails_is_not_tried_again_for_every_claim(tmp_path: Path) -> None:
    lines: list[str] = []
    broken = SPEC.model_copy(update={"overrides": ("model.path=./nowhere",)})
    exports = Exports(make_session(tmp_path, announce=lines.append), broken)
    exports._key = lambda spec: "0" * 64  # type: ignore[method-assign]
    assert {exports.verdict(claim.name).status for claim in CLAIMS} == {"INCOMPLETE"}
    assert lines == ["export fidelity: train"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MachineError("the GPU is in use"), "INCOMPLETE"),
        (DiskError("no space left"), "INCOMPLETE"),
        (LockedError("the store is in use"), "INCOMPLETE"),
        (CheckError("llama.cpp refuses the file"), "FAIL"),
        (ForgeError("the probe crashed"), "FAIL"),
    ],
)
def test_an_accident_costs_the_claims_of_its_probe_and_is_no_failure_of_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: ForgeError, status: str
) -> None:
    def run_probe(module: str, *_: Any, deadline: float | None, **__: Any) -> dict[str, Any] | None:
        if deadline == 0.0:
            return None  # not in the store
        if module.endswith("divergence"):
            raise error
        return {"links": []}

    run = SimpleNamespace(adapter_sha256="a" * 64, workload={"name": "smoke"})
    monkeypatch.setattr("harness.session.run_probe", run_probe)
    monkeypatch.setattr("harness.export.exports.completed_record", lambda run_dir: run)
    monkeypatch.setattr(Exports, "exported", lambda self, spec: tmp_path)
    monkeypatch.setattr(Exports, "_evaluated", lambda self, run_dir: True)
    exports = Exports(make_session(tmp_path), SPEC)
    for name in ("chain", "greedy"):
        verdict = exports.verdict(name)
        assert (verdict.status, error.message in verdict.reason) == (status, True)
    assert "no record of base" in exports.verdict("provenance").reason


def test_a_session_that_leaves_the_export_out_makes_no_base(tmp_path: Path) -> None:
    session = make_session(tmp_path, only=("parity",)).limited_to("export")
    rows = [{"instruction": f"Recite {i}.", "input": "", "output": f"Ship {i} came by night. " * 9} for i in range(230)]
    session.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = judged_run(session)
    assert "model.path=small" in spec.overrides
    verdict = Exports(session, spec).verdict("merge")
    assert (verdict.status, "--gate-only" in verdict.reason) == ("INCOMPLETE", True)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_claims_bars_are_those_that_its_judge_takes(claim: Any) -> None:
    inspect.signature(claim.judge).bind({}, **claim.bars)
    assert claim.probe in PROBES
