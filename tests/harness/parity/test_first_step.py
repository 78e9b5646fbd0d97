"""Rungs 1 to 3 of the parity ladder on a CPU: real tiny models pass, and each planted fault turns its rung red."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.training.system.environment import ROOT
from forge.training.system.errors import CheckError, ConfigurationError
from forge.training.system.files import sha256_file
from harness.measurement.results import Store
from harness.parity import rungs
from harness.parity.claims import verdict_on
from harness.parity.first_step.checks import Check, differing_inputs, first_step_checks, layout_checks
from harness.parity.first_step.compare import MeasuredStep
from harness.parity.first_step.judge import find_checks, judge_inputs
from harness.parity.first_step.measure import MeasuredSteps, measure_steps, own_steps
from harness.parity.probes import first_step
from harness.parity.session import Ladder
from harness.session import Session
from tests.support.first_steps import BF16, PACKED, PADDED, Bench, missed, overrides, write_bases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bases(tmp_path_factory.mktemp("first_step"))


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    return Bench(folder, "qwen2")


# --------------------------------------------------------------------------------------------------------------------
# Sound arms


def test_documents_of_very_different_lengths_make_the_step_and_every_gradient_is_there(bench: Bench) -> None:
    reference = bench.take("reference")
    num_trained = reference.small["num_trained"]
    assert len(num_trained) == 8
    assert num_trained.max() > 5 * num_trained.min()
    assert all(np.linalg.norm(reference.gradient(matrix)) > 0 for matrix in reference.matrices)
    assert len(reference.matrices) == 2 * 7 * 2  # A and B of seven layers' parts in two layers
    assert np.isfinite(reference.small["token_losses"]).sum() > 8


def sound_layouts(bench: Bench) -> list[MeasuredStep]:
    """In bfloat16, as the gate's: float32's last bits are the processor's, and more of them in a long packed row."""
    layouts = [("8x1", PACKED), ("4x2", PADDED), ("1x8", PADDED)]
    return [bench.take("trl", layout, padding, more=BF16) for layout, padding in layouts]


@pytest.mark.slow
def test_padded_and_packed_steps_of_any_layout_pass(bench: Bench) -> None:
    assert [line for layout in sound_layouts(bench) for line in bench.rung_2(layout, BF16)] == []
    assert bench.rung_3(*sound_layouts(bench), more=BF16) == []


@pytest.mark.slow
def test_in_float32_layouts_differ_by_last_bits_alone(bench: Bench) -> None:
    layouts = [bench.take("trl", "8x1", PACKED), bench.take("trl", "4x2", PADDED), bench.take("trl", "1x8")]
    assert [line for layout in layouts for line in bench.rung_2(layout)] == []
    assert bench.rung_3(*layouts[1:]) == []
    checks = layout_checks(bench.take("reference"), layouts[-1], layouts)
    assert [check.sentence() for check in checks if not check.value < 1e-6] == []


def test_documents_losses_are_the_sum_of_the_steps(bench: Bench) -> None:
    step = bench.take("trl", "8x1", PACKED)
    total = step.small["document_losses"].sum() / step.small["num_trained"].sum()
    assert total == pytest.approx(step.facts["step_loss"], rel=1e-5)
    assert total == pytest.approx(bench.take("reference").facts["step_loss"], rel=1e-5)


@pytest.mark.slow
def test_bfloat16_passes_by_its_own_rounding_and_not_by_float32s(bench: Bench) -> None:
    layouts = [bench.take("trl", "8x1", PACKED, more=BF16), bench.take("trl", "4x2", PACKED, more=BF16)]
    assert [line for layout in layouts for line in bench.rung_2(layout, BF16)] == []
    assert bench.rung_3(*layouts, more=BF16) == []
    reference, single = bench.take("reference", more=BF16), bench.take("trl", "1x8")
    assert missed(first_step_checks(reference, bench.take("trl", "1x8", more=BF16), layouts[0])) == []
    with pytest.raises(CheckError, match="workload_sha256"):
        first_step_checks(reference, single, layouts[0])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_other_architectures_pass_the_first_three_rungs(folder: Path, architecture: str) -> None:
    other = Bench(folder, architecture)
    assert differing_inputs([other.inputs(), other.inputs()]) == []
    assert [line for layout in sound_layouts(other) for line in other.rung_2(layout, BF16)] == []
    assert other.rung_3(*sound_layouts(other), more=BF16) == []


# --------------------------------------------------------------------------------------------------------------------
# Planted faults


@pytest.mark.parametrize(
    ("fault", "seen_by"),
    [
        ("learning-rate", "learning_rates"),
        ("dropout", "dropouts: [0.05] | [0.1]"),
        ("frozen-matrix", "trainable_names_sha256"),
    ],
)
def test_a_setting_that_differs_in_one_arm_turns_the_inputs_red(bench: Bench, fault: str, seen_by: str) -> None:
    sound, faulty = bench.inputs(), bench.inputs(fault)
    assert differing_inputs([sound, sound]) == []
    assert seen_by in "\n".join(differing_inputs([sound, faulty]))


def test_other_weights_or_documents_turn_the_inputs_red(bench: Bench) -> None:
    sound = bench.inputs()
    assert "weights_sha256" in "\n".join(differing_inputs([sound, bench.inputs(None, BF16)]))
    shorter = "\n".join(differing_inputs([sound, bench.inputs(None, "data.max_length=120")]))
    assert "train_examples_sha256" in shorter
    assert "labels_sha256" in shorter


def test_labels_shifted_by_one_turn_the_first_step_red(bench: Bench) -> None:
    assert any("token's loss" in line for line in bench.rung_2(bench.take("trl", "4x2", PACKED, "labels-shifted")))


def test_a_loss_averaged_by_micro_batch_turns_step_equivalence_red(bench: Bench) -> None:
    faulty = [bench.take("trl", layout, PADDED, "micro-batch-mean") for layout in ("4x2", "1x8")]
    assert any(" against trl 1x8" in line for line in bench.rung_3(*faulty))
    assert any("against float32" in line for line in bench.rung_3(faulty[1]))


def test_packing_without_boundaries_turns_the_first_step_red_and_is_named_a_leak(bench: Bench) -> None:
    lines = bench.rung_2(bench.take("trl", "8x1", PACKED, "no-boundaries"))
    assert any("other documents' losses" in line for line in lines)
    assert any("token's loss" in line for line in lines)


@pytest.mark.slow
def test_a_frozen_matrix_and_dropout_turn_the_first_step_red_too(bench: Bench) -> None:
    frozen = bench.rung_2(bench.take("trl", "8x1", PADDED, "frozen-matrix"))
    assert any("cosine of the gradient" in line for line in frozen)
    assert any("documents' gradients" in line for line in bench.rung_2(bench.take("trl", "8x1", PADDED, "dropout")))


@pytest.mark.slow
def test_a_learning_rate_is_not_the_first_steps_to_see(bench: Bench) -> None:
    """Why rung 1 reads the optimizer: a gradient does not depend on what is done with it."""
    assert bench.rung_2(bench.take("trl", "8x1", PADDED, "learning-rate")) == []


# --------------------------------------------------------------------------------------------------------------------
# Judging and the command


def test_steps_of_other_work_are_not_compared(bench: Bench) -> None:
    with pytest.raises(CheckError, match="adapter_sha256"):
        first_step_checks(bench.take("reference"), bench.take("trl", "1x8"), bench.take("reference", more="seed=7"))


def test_what_is_not_a_number_never_holds() -> None:
    assert not Check("a", float("nan"), 1.0).holds
    assert not Check("a", float("nan"), 1.0, least=True).holds
    assert Check("a", float("nan"), 1.0).to_dict()["value"] is None


def test_a_check_is_plain_json_and_comes_back_from_it_as_it_was() -> None:
    for check in (Check("a", np.float64(1.0), np.nextafter(1.0, 2), True, {"worst": "q"}), Check("b", np.nan, 1.0)):
        content = json.loads(json.dumps(check.to_dict(), allow_nan=False))
        again = Check.from_dict(content)
        assert (again.holds, again.name, again.least, again.more) == (check.holds, check.name, check.least, check.more)
        assert again.to_dict() == content
    judged = verdict_on(2, "PASS", "", {"checks": [Check("a", np.float64(1), 1.0).to_dict()]}).to_dict()
    assert json.loads(json.dumps(judged))["figures"]["checks"][0]["holds"] is True


def test_an_unknown_backend_is_refused(bench: Bench) -> None:
    workload = first_step.frozen_workload("smoke", overrides(bench.base, bench.folder / "train.jsonl"))
    with pytest.raises(ConfigurationError, match="no backend 'other'"):
        first_step.measure(workload, "other", [])


def test_the_command_says_what_is_wrong_in_one_line() -> None:
    command = [sys.executable, "-m", "harness.parity.probes.first_step", "smoke", "--backend", "trl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "nothing to measure" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_ladders_first_three_rungs_pass_through_its_own_processes(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Recite `{i}.md`", "input": "", "output": f"Ship {i}. " + "It counts. " * (1 + i % 12)}
        for i in range(230)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = ("model.quantization=none", BF16, "data.max_length=176", "lora.rank=4")
    ladder = Ladder(
        Session(store=Store(tmp_path / "store"), train=tmp_path / "train.jsonl"),
        base=str(folder / "qwen2"),
        baseline="trl",
        candidate="trl",
        step_layouts=("4x2:none", "1x8:none"),
        num_positions=6,
        num_side_by_side=1,
        overrides=small,
    )
    verdicts = [rungs.verdict(ladder, number) for number in (1, 2, 3)]
    assert [verdict.status for verdict in verdicts] == ["PASS"] * 3, [verdict.reason for verdict in verdicts]
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "store" / "probes").iterdir())
    assert list((tmp_path / "store" / "parity").glob("checks-*")), (
        "what was found is kept with the digests of its files"
    )


def counted(ladder: Ladder, measured: MeasuredSteps, quantization: str) -> list[Check]:
    """Takes the place of a rung's checks: needs its files."""
    paths = [measured.folder / facts["file"] for facts in measured.facts.values()]
    return [Check(f"{quantization}: {path.read_text()}", 0.0, 1.0) for path in paths]


def of_short_texts(kind: type[Ladder], folder: Path) -> Ladder:
    """A ladder that trains nothing: its base has no weights."""
    (folder / "base").mkdir()
    row = '{"instruction": "Recite %d.", "input": "", "output": "Ship %d came by night."}\n'
    (folder / "train.jsonl").write_text("".join(row % (i, i) for i in range(230)))
    session = Session(store=Store(folder / "store"), train=folder / "train.jsonl")
    return kind(session, base=str(folder / "base"), num_side_by_side=2)


def test_judged_steps_are_not_measured_again_and_lost_ones_beside_the_old_never_in_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[Any, Any] = {}

    class Recording(Ladder):
        def probes(self, name: str, calls: Any, *, is_prefetch: bool = False) -> list[Any]:
            """As a store: what was answered once is answered alike, and measured no more."""
            return [answers.get(call) or answers.setdefault(call, self.measure(call)) for call in calls]

        def measure(self, call: Any) -> dict[str, Any]:
            arguments = call[1]
            backend, folder = arguments[2], Path(next(a for a in arguments if a.startswith("--out="))[6:])
            folder.mkdir(parents=True, exist_ok=True)
            steps = [arguments[place + 1] for place, a in enumerate(arguments) if a == "--step"]
            files = [folder / f"{backend}-{step}".replace(":", "-") for step in steps]
            for file in files:
                file.write_text(f"{len(answers)}")
            return {"steps": [{"file": file.name, "file_sha256": sha256_file(file)} for file in files]}

    ladder = of_short_texts(Recording, tmp_path)
    checks = find_checks(ladder, counted, own_steps(ladder))
    assert list(checks) == ["nf4", "none"]
    num = len(answers)
    shutil.rmtree(tmp_path / "parity" / "steps")
    assert find_checks(ladder, counted, own_steps(ladder)) == checks
    assert len(answers) == num, "what was judged is not measured again"
    monkeypatch.setattr("harness.parity.first_step.judge.STEP_BARS", (1.4,))
    assert find_checks(ladder, counted, own_steps(ladder)) != checks, "judged by other bars"
    assert len(answers) == 2 * num, "a store only grows"


def test_stored_steps_are_known_without_a_process_and_fetch_no_other_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[Any, Any] = {}

    class Stored(Ladder):
        def probes(self, name: str, calls: Any, *, is_prefetch: bool = False) -> list[Any]:
            if self.session.measures:
                answers.update({call: {"steps": [{}] * call[1].count("--step")} for call in calls})
            return [answers.get(call) for call in calls]

    made: list[str] = []
    monkeypatch.setattr(
        "harness.parity.architectures.make_base_as", lambda base, model_type, directory: made.append(model_type)
    )
    ladder = of_short_texts(Stored, tmp_path)
    rungs.prefetch(ladder, 2)
    assert made == ["llama", "qwen3"]
    assert len(answers) > len({call for call in answers if str(tmp_path / "base") in "".join(call[1])}) > 0
    answers.clear()
    measure_steps(ladder, own_steps(ladder))
    num = len(answers)
    rungs.prefetch(ladder, 2)
    assert (len(answers), len(made)) == (num, 2), "the store has the steps of the ladder's own base"


def test_stored_inputs_of_another_workload_are_no_verdict(tmp_path: Path) -> None:
    class Stored(Ladder):
        def probes(self, name: str, calls: Any, *, is_prefetch: bool = False) -> list[Any]:
            return [{"inputs": {"backend": backend, "workload_sha256": "0" * 64}} for backend, _ in calls]

    judged = judge_inputs(of_short_texts(Stored, tmp_path))
    assert (judged.status, "another one" in judged.reason) == ("INCOMPLETE", True)
