"""Claims about what evaluation and export accept: this run's own base, tokenizer, adapter; finished, unchanged."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from forge.training.adapter import lora
from forge.training.adapter.provenance import read_own_base, require_own_adapter, require_own_base
from forge.training.evaluation.evaluate import evaluate_run
from forge.training.export.export import export_run
from forge.training.system.errors import CheckError, DataError, ForgeError
from forge.training.system.files import sha256_file
from forge.training.train.record import read_record
from tests.support.tiny_model import scratch, shared_base, write_base
from tests.support.tiny_run import edit_json, made_up_run, write_run

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
Tensors = dict[str, Any]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return made_up_run(tmp_path / "run")


@cache
def deeper_base() -> Path:
    """The shared base's shape with one layer more."""
    write_base(scratch() / "deeper", num_steps=0, num_hidden_layers=3)
    return scratch() / "deeper"


def with_tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    """Change the adapter's weights, and have the record say that the run wrote them so."""

    def spoil(run: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = run / "adapter" / WEIGHTS
        save_file(change(load_file(path)), path)
        edit_json(run / "run.json", adapter_sha256=sha256_file(path))

    return spoil


def with_config(**fields: object) -> Callable[[Path], None]:
    return lambda run: edit_json(run / "adapter" / CONFIG, **fields)


def poisoned(value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[KEY.format("A")][0, 0] = value
        return tensors

    return change


def use_base(run: Path, base: Path) -> None:
    """The run's record names this base and tokenizer as what it was trained on."""
    write_run(run, base)


def own_base(run: Path) -> Path:
    base = run.parent / "base"
    shutil.copytree(shared_base(), base)
    edit_json(run / "run.json", base_path=str(base))
    return base


def other_adapter(run: Path) -> None:
    """Another run's: the same shapes, the same configuration, other values."""
    from safetensors.torch import load_file, save_file

    path = run / "adapter" / WEIGHTS
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)


def pickled(run: Path) -> None:
    (run / "adapter" / WEIGHTS).rename(run / "adapter" / "adapter_model.bin")


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no adapter": (lambda run: shutil.rmtree(run / "adapter"), "is missing"),
    "no weights": (lambda run: (run / "adapter" / WEIGHTS).unlink(), "is missing"),
    "no configuration": (lambda run: (run / "adapter" / CONFIG).unlink(), "adapter_config.json is missing"),
    "pickled weights": (pickled, "only safetensors adapters|is missing"),
    "another run's adapter": (other_adapter, "is not the adapter that this run trained"),
    "one bit of the adapter": (lambda run: flip_last_byte(run / "adapter" / WEIGHTS), "is not the adapter"),
    "no digest of an adapter": (lambda run: edit_json(run / "run.json", adapter_sha256=None), "is not the adapter"),
    "half a pair": (
        with_tensors(lambda t: {k: v for k, v in t.items() if k != KEY.format("B")}),
        "only one of lora_A and lora_B",
    ),
    "half the modules": (with_tensors(lambda t: dict(list(t.items())[:14])), "is incomplete: no factors for"),
    "foreign keys": (with_tensors(lambda t: {k.replace("up_proj", "w3"): v for k, v in t.items()}), "another base"),
    "NaN": (with_tensors(poisoned(float("nan"))), "holds NaN or infinity"),
    "infinity": (with_tensors(poisoned(float("inf"))), "holds NaN or infinity"),
    "one module untrained": (
        with_tensors(lambda t: t | {KEY.format("B"): t[KEY.format("B")] * 0}),
        r"was never trained: lora_B of model.layers.1.mlp.up_proj is zero \(1 of 14 modules\)",
    ),
    "another rank in the weights": (
        with_tensors(lambda t: {k: v[:2] if "lora_A" in k else v[:, :2].contiguous() for k, v in t.items()}),
        "where adapter_config.json says rank 4",
    ),
    "another rank in the configuration": (with_config(r=8), "where adapter_config.json says rank 8"),
    "alpha changed": (
        with_config(lora_alpha=16),
        "model.layers.0.mlp.down_proj has rank 4 and scale 4, .* rank 4 and scale 2",
    ),
    "rsLoRA changed": (with_config(use_rslora=True), r"scale 4, .* rank 4 and scale 2 \(14 of 14"),
    "alpha of one module changed": (with_config(alpha_pattern={"q_proj": 9}), r"scale 2\.25.*\(2 of 14 modules\)"),
    "a deeper base": (
        lambda run: use_base(run, deeper_base()),
        r"no factors for model\.layers\.2\.mlp\.down_proj \(7 of 21 modules",
    ),
    "another tokenizer": (
        lambda run: edit_json(own_base(run) / "tokenizer_config.json", eos_token="<|endoftext|>"),
        "the tokenizer in .* is not the run's: SHA-256",
    ),
    "another chat template": (
        lambda run: (own_base(run) / "chat_template.jinja").write_text("{{ messages }}"),
        "the tokenizer in .* is not the run's",
    ),
    "code of its own": (
        lambda run: edit_json(own_base(run) / "config.json", text_config={"auto_map": {"AutoConfig": "evil.Evil"}}),
        r"asks for code of its own \(auto_map\)",
    ),
    "a tokenizer file outside": (
        lambda run: edit_json(own_base(run) / "tokenizer_config.json", vocab_file="../../.env"),
        "leaves the model's folder",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_belong_to_the_run_is_refused_with_its_cause(run_dir: Path, name: str) -> None:
    spoil, complaint = FAULTS[name]
    spoil(run_dir)
    run = read_record(run_dir)
    with pytest.raises(DataError, match=complaint) as refusal:
        require_own_adapter(run, run_dir, read_own_base(run))
    assert refusal.value.exit_code == 3


def test_the_runs_own_parts_are_accepted(run_dir: Path) -> None:
    run = read_record(run_dir)
    base = read_own_base(run)
    require_own_base(base.directory, run.inputs.base_sha256)
    assert require_own_adapter(run, run_dir, base) == (run_dir / "adapter" / WEIGHTS).stat().st_size


def test_another_base_of_equal_shape_is_known_by_its_content(run_dir: Path) -> None:
    base = own_base(run_dir)
    flip_last_byte(next(base.glob("*00001-of*")))
    run = read_record(run_dir)
    require_own_adapter(run, run_dir, read_own_base(run))  # nothing but the digest tells
    with pytest.raises(DataError, match="is not the base that was trained on: SHA-256"):
        require_own_base(base, run.inputs.base_sha256)


JUDGES: dict[str, Callable[[Path], object]] = {
    "evaluate": lambda run: evaluate_run(run, device="cpu"),
    "export": lambda run: export_run(run, quantizations=["f16"]),
}


def left(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.name != ".lock"}


def is_refused(judge: str, run: Path, complaint: str, kind: type[ForgeError] = DataError) -> None:
    before, started = left(run), time.monotonic()
    with pytest.raises(kind, match=complaint):
        JUDGES[judge](run)
    assert left(run) == before
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("status", ["running", "interrupted", "diverged", "out_of_memory", "failed"])
def test_a_run_that_did_not_complete_is_accepted_by_nothing(run_dir: Path, judge: str, status: str) -> None:
    edit_json(run_dir / "run.json", status=status)
    is_refused(judge, run_dir, f"is {status} at step 7 of 7")


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("name", ["alpha changed", "another tokenizer", "another run's adapter", "code of its own"])
def test_evaluation_and_export_both_ask(run_dir: Path, judge: str, name: str) -> None:
    spoil, complaint = FAULTS[name]
    spoil(run_dir)
    is_refused(judge, run_dir, complaint)


@pytest.mark.parametrize("judge", JUDGES)
def test_a_run_that_began_anew_while_the_lock_was_awaited_is_refused(
    run_dir: Path, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train --force` between the first look at the record and the lock."""
    from contextlib import contextmanager

    import forge.training.evaluation.evaluate as evaluate
    from forge.training.export import export

    @contextmanager
    def slowly_locked(directory: Path) -> Any:
        edit_json(directory / "run.json", status="running")
        yield

    for module in (evaluate, export):
        monkeypatch.setattr(module, "locked", slowly_locked)
    is_refused(judge, run_dir, "is running at step")


def test_an_adapter_that_would_keep_a_parser_busy_for_ever_ends_at_its_limit(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_config(target_modules=r"(.*.*.*.*.*.*.*.*)*\d!")(run_dir)
    monkeypatch.setattr(lora, "time_limit_seconds", lambda _: 1.5)
    started = time.monotonic()
    with pytest.raises(CheckError, match=r"cannot read the adapter .*: no answer within 2 s; the process was ended"):
        lora.check_adapter(run_dir / "adapter", shared_base())
    assert time.monotonic() - started < 30


def test_an_adapter_that_needs_too_much_memory_is_one_error(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """18 MB of text that becomes 340 MB of empty lists."""
    config = (run_dir / "adapter" / CONFIG).read_text().rstrip().removesuffix("}")
    (run_dir / "adapter" / CONFIG).write_text(f'{config}, "more": [{"[]," * 6_000_000}[]]}}')
    monkeypatch.setattr(lora, "_CHECK_BYTES", 384 << 20)
    with pytest.raises(CheckError, match=r"cannot read the adapter .*: it needs more memory than it is given"):
        lora.check_adapter(run_dir / "adapter", shared_base())
