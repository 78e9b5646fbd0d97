"""Claims about merging: the numbers are PEFT's, everything else is untouched, every misfit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from forge.training.adapter.merge import float32_bytes, merge_adapter
from forge.training.models.weights import read_weights
from forge.training.system.errors import DataError, DiskError
from tests.support.tiny_model import shared_adapter, shared_base, write_adapter


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """Imported when the first test runs: collecting the tests imports no torch."""
    global torch, load_file, save_file, AutoModelForCausalLM
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM


WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def copy_adapter(target: Path, **config: Any) -> Path:
    """A changeable copy of the shared adapter, with fields of its configuration replaced."""
    shutil.copytree(shared_adapter(), target)
    written = json.loads((target / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps(written | config))
    return target


def rewrite(adapter: Path, change: Any) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file(change(tensors), adapter / WEIGHTS)


def test_merged_weights_are_base_plus_scaled_product_and_all_else_is_the_same_bytes(tmp_path: Path) -> None:
    base_dir, merged_dir = shared_base(), tmp_path / "merged"
    record = merge_adapter(base_dir, shared_adapter(), merged_dir)
    base, merged, adapter = tensors_of(base_dir), tensors_of(merged_dir), load_file(shared_adapter() / WEIGHTS)
    assert list(base) == list(merged)
    num_changed = 0
    for name, before in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in adapter:
            num_changed += 1
            exact = before.float() + 8 / 4 * adapter[f"{prefix}B.weight"].float() @ adapter[f"{prefix}A.weight"].float()
            torch.testing.assert_close(merged[name], exact.bfloat16(), rtol=2**-7, atol=1e-6)
            assert not torch.equal(merged[name], before)
        else:
            assert torch.equal(merged[name].view(torch.uint8), before.view(torch.uint8))
    assert num_changed == record.num_changed_tensors == 14
    assert num_changed + record.num_copied_tensors == len(base)
    assert 0 < record.rounding_norm < 0.05 * record.delta_norm


def test_a_merge_in_float32_holds_the_exact_sums_and_all_else_widened(tmp_path: Path) -> None:
    record = merge_adapter(shared_base(), shared_adapter(), tmp_path / "wide", in_float32=True)
    base, merged, adapter = (
        *(tensors_of(directory) for directory in (shared_base(), tmp_path / "wide")),
        load_file(shared_adapter() / WEIGHTS),
    )
    assert base.keys() == merged.keys()
    for name, before in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        exact = before.float()
        if f"{prefix}A.weight" in adapter:
            exact = exact + 8 / 4 * adapter[f"{prefix}B.weight"].float() @ adapter[f"{prefix}A.weight"].float()
        assert merged[name].dtype == torch.float32
        torch.testing.assert_close(merged[name], exact, rtol=1e-6, atol=1e-7)
    assert record.rounding_norm == 0.0
    weights = read_weights(tmp_path / "wide")
    assert weights.config["torch_dtype"] == "float32"
    assert record.num_bytes == float32_bytes(read_weights(shared_base())) == 4 * weights.num_parameters


def test_merged_directory_has_the_layout_of_the_base_and_no_other_weights(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(shared_base(), base)
    for name in ("pytorch_model.bin", "consolidated.pth", "README.md", "training_args.bin"):
        (base / name).write_bytes(b"not to be copied")
    merge_adapter(base, shared_adapter(), tmp_path / "merged")
    expected = {path.name for path in shared_base().iterdir()} | {"merge.json"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == expected
    for name in ("model.safetensors.index.json", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 3


@pytest.mark.parametrize(
    ("tied", "lora"),
    [
        (True, {}),
        (True, {"use_rslora": True, "r": 8}),
        (True, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 32}}),
        (True, {"target_modules": r".*layers\.1\..*(q|v)_proj"}),
        (True, {"layers_to_transform": [1], "exclude_modules": ["o_proj"]}),
        (False, {"target_modules": ["q_proj", "lm_head"]}),
    ],
    ids=["plain", "rslora", "patterns", "regular-expression", "one-layer", "untied-lm-head"],
)
def test_merged_logits_are_those_of_peft(tmp_path: Path, tied: bool, lora: dict[str, Any]) -> None:
    base = shared_base(tied=tied, dtype="float32")
    peft_model = write_adapter(base, tmp_path / "adapter", **lora)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        wanted, found = peft_model(ids).logits, merged(ids).logits
        with peft_model.disable_adapter():
            without = peft_model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - without).abs().max() > 0.01


@pytest.mark.parametrize(
    ("lora", "complaint"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["q_proj", "lm_head"]}, "ties lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "not LoRA factors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_a_merge_would_falsify_are_refused(tmp_path: Path, lora: dict[str, Any], complaint: str) -> None:
    write_adapter(shared_base(), tmp_path / "adapter", **lora)
    with pytest.raises(DataError, match=complaint):
        merge_adapter(shared_base(), tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"a_future_method": {"x": 1}}, "a_future_method"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"r": 8}, "says rank 8"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"target_modules": ["q_proj"]}, "does not name"),
    ],
)
def test_adapter_configurations_that_do_not_fit_the_weights_are_refused(
    tmp_path: Path, config: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        merge_adapter(shared_base(), copy_adapter(tmp_path / "adapter", **config), tmp_path / "merged")


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"


def poisoned(value: float) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[KEY.format("A")][0, 0] = value
        tensors[KEY.format("B")][0, 0] = 100
        return tensors

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: {k: v for k, v in t.items() if k != KEY.format("B")}, "only one of lora_A and lora_B"),
        (lambda t: {k: v for k, v in t.items() if "up_proj" not in k or "layers.1" not in k}, "no factors for"),
        (lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}, "belongs to another base"),
        (lambda t: {k.replace("up_proj", "w3"): v for k, v in t.items()}, "belongs to another base"),
        (lambda t: t | {KEY.format("A"): torch.zeros(4, 128)}, "the base has"),
        (lambda t: t | {"base_model.model.model.norm.weight": torch.zeros(256)}, "not LoRA factors"),
        (lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()}, "never trained"),
        (lambda t: {k: v * 1e-12 if "lora_B" in k else v for k, v in t.items()}, "no effect"),
        (poisoned(float("nan")), "NaN or infinity"),
        (poisoned(float("inf")), "NaN or infinity"),
        (poisoned(3e38), "not finite"),
    ],
    ids=["half", "layer", "deeper", "foreign", "shape", "extra", "zero", "rounded-away", "nan", "inf", "overflow"],
)
def test_faulty_adapter_weights_are_refused_and_leave_nothing(tmp_path: Path, change: Any, complaint: str) -> None:
    adapter = copy_adapter(tmp_path / "adapter")
    rewrite(adapter, change)
    with pytest.raises(DataError, match=complaint):
        merge_adapter(shared_base(), adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("break_base", "complaint"),
    [
        (lambda base: truncate(next(base.glob("*00002-of*"))), "its header says"),
        (lambda base: next(base.glob("*00002-of*")).unlink(), "is missing"),
        (lambda base: next(base.glob("*00001-of*")).write_bytes(b"\xff" * 64), "not a complete safetensors file"),
        (lambda base: (base / "model.safetensors.index.json").unlink(), "holds no model.safetensors"),
        (lambda base: (base / "config.json").write_text("{"), "not readable JSON"),
        (lambda base: (base / "config.json").write_text('{"quantization_config": {"bits": 4}}'), "is quantised"),
    ],
    ids=["truncated", "missing-shard", "garbage", "no-index", "config", "quantised"],
)
def test_faulty_bases_are_refused(tmp_path: Path, break_base: Any, complaint: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(shared_base(), base)
    break_base(base)
    with pytest.raises(DataError, match=complaint):
        merge_adapter(base, shared_adapter(), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_base_of_equal_shape_is_refused_by_its_digest(tmp_path: Path) -> None:
    from forge.training.models.digests import base_sha256

    trained_on = base_sha256(shared_base())
    record = merge_adapter(shared_base(), shared_adapter(), tmp_path / "merged", expected_base_sha256=trained_on)
    assert record.merged_sha256 == base_sha256(tmp_path / "merged") != trained_on
    with pytest.raises(DataError, match="not the base that was trained on"):
        merge_adapter(tmp_path / "merged", shared_adapter(), tmp_path / "twice", expected_base_sha256=trained_on)


def test_an_existing_output_stays_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").write_text("kept")
    with pytest.raises(DiskError, match="exists already"):
        merge_adapter(shared_base(), shared_adapter(), tmp_path / "merged")
    assert (tmp_path / "merged" / "precious").read_text() == "kept"
    merge_adapter(shared_base(), shared_adapter(), tmp_path / "merged", force=True)
    assert not (tmp_path / "merged" / "precious").exists()
