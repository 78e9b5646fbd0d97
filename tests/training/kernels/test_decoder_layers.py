"""Forge's layers against transformers and PEFT, in float64 (their norms and rotations are in float32)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from forge.training.kernels.dropout import keep_mask, module_key, padded_token_keys, step_keys, token_keys
from forge.training.kernels.install import ForgeLayers, compare_with_own, why_not
from forge.training.system.errors import MachineError
from harness.parity.probes.masks import ExplicitMasks

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
DOCUMENTS = [list(np.random.default_rng(i).integers(0, 97, size=n)) for i, n in enumerate((17, 5, 30, 9))]
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = ("q_proj", "v_proj", "up_proj", "down_proj")


def make_model(
    kind: str = "qwen2",
    targets: tuple[str, ...] = SOME,
    dropout: float = 0.0,
    rank: int = 4,
    has_bias: bool = True,
    **lora: Any,
) -> Any:
    """A small model with an adapter whose B is not zero. ``has_bias``: for a Llama."""
    torch.manual_seed(3)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=has_bias, mlp_bias=has_bias))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    model.config.use_cache = False
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=list(targets), **lora)
    model = get_peft_model(model.double(), config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or name.endswith(("norm.weight", ".bias")):
                parameter.uniform_(0.2, 0.6).mul_(-1 if "lora" in name else 1)
    return model.train()


def forge_layers(model: Any, **arguments: Any) -> ForgeLayers:
    defaults: dict[str, Any] = {"tile_tokens": None, "keep_gib": None, "offload": False, "dequantize_once": False}
    return ForgeLayers(model, **{**defaults, **arguments}, dtype=torch.float64)


def gradients(model: Any, layers: ForgeLayers | None, groups: list[list[list[int]]], padded: bool = False) -> list[Any]:
    """The loss summed over all documents and every trained parameter's gradient, in micro-batches of ``groups``."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for group in groups:
        lengths = [len(ids) for ids in group]
        width = max(lengths)
        if padded:
            ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in group])
            labels = torch.tensor([[*ids, *[-100] * (width - len(ids))] for ids in group])
            inputs = {"input_ids": ids, "position_ids": torch.arange(width).expand(len(group), -1)}
            keys, lengths = padded_token_keys(group, width), [width] * len(group)
        else:
            ids = torch.tensor([[token for document in group for token in document]])
            labels = torch.tensor([[label for d in group for label in (-100, *d[1:])]])
            inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
            keys = token_keys(group)
        if layers is not None:
            layers.begin(lengths, torch.from_numpy(keys), seed=7, step=2)
        elif not padded:
            assert len(group) == 1
        logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        loss.backward()
        total += float(loss.detach())
    if layers is not None:
        layers.end()
    return [torch.tensor(total), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_equal(first: list[Any], second: list[Any], tolerance: float = 3e-5, rounding: float = 0.0) -> None:
    """``rounding``: of the largest gradient's norm; what is zero by mathematics has that much of it in float64."""
    largest = max(float(b.norm()) for b in second[1:])
    for a, b in zip(first, second, strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm()) + rounding * largest


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("targets", "lora"),
    [
        (SOME, {}),
        (EVERY, {"use_rslora": True}),
        (("k_proj",), {}),
        (("o_proj", "gate_proj"), {"rank": 7}),
        (("down_proj",), {}),
    ],
)
@pytest.mark.parametrize("keep_gib", [None, 0.0])
def test_layers_compute_what_peft_computes(
    kind: str, targets: tuple[str, ...], lora: Any, keep_gib: float | None
) -> None:
    model = make_model(kind, targets, **lora)
    expected = gradients(model, None, [[d] for d in DOCUMENTS])
    layers = forge_layers(model, keep_gib=keep_gib, tile_tokens=8)
    assert_equal(gradients(model, layers, [DOCUMENTS[:3], DOCUMENTS[3:]]), expected)


LAYOUTS: dict[str, Any] = {
    "1 x 4": [DOCUMENTS],
    "2 x 2": [DOCUMENTS[:2], DOCUMENTS[2:]],
    "another order": [[DOCUMENTS[3], DOCUMENTS[0]], [DOCUMENTS[2]], [DOCUMENTS[1]]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "arguments", [{}, {"keep_gib": 0.0}, {"keep_gib": 3e-4}, {"tile_tokens": 7}, {"keep_gib": 0.0, "tile_tokens": 16}]
)
def test_no_layout_changes_the_gradients_of_a_step_with_dropout(layout: str, padded: bool, arguments: Any) -> None:
    model = make_model(targets=EVERY, dropout=0.3)
    expected = gradients(model, forge_layers(model), [[d] for d in DOCUMENTS])
    for layer in model.base_model.model.model.layers:
        del layer.forward
    assert_equal(gradients(model, forge_layers(model, **arguments), LAYOUTS[layout], padded), expected)


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(["llama", "llama without bias", "qwen2", "qwen3"]),
    targets=st.sets(st.sampled_from(EVERY), min_size=1),
    rank=st.integers(4, 256),
    is_rslora=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    tile=st.none() | st.integers(1, 50),
    keep_gib=st.sampled_from([None, 0.0, 1e-4]),
    is_padded=st.booleans(),
)
def test_any_adapter_on_documents_of_any_length_is_pefts_with_explicit_masks(
    kind: str,
    targets: set[str],
    rank: int,
    is_rslora: bool,
    dropout: float,
    lengths: list[int],
    tile: int | None,
    keep_gib: float | None,
    is_padded: bool,
) -> None:
    documents = [list(np.random.default_rng(100 + i).integers(0, 97, size=n)) for i, n in enumerate(lengths)]
    has_bias = kind != "llama without bias"
    chosen = tuple(name for name in EVERY if name in targets)
    model = make_model(kind.split()[0], chosen, dropout, rank, has_bias, use_rslora=is_rslora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # so that what an adapter adds is of the base's size whatever its rank
                parameter.mul_(0.5 * rank ** (-0.5 if is_rslora else 0) / rank)
    layers = forge_layers(model, tile_tokens=tile, keep_gib=keep_gib)
    found = gradients(model, layers, [documents], is_padded)
    masks = ExplicitMasks(model, seed=7)
    assert masks.num_modules == (len(model.base_model.model.model.layers) * len(targets) if dropout else 0)
    expected: list[Any] = []
    for document in documents:
        masks.begin([document], None, 2, "cpu")
        own = gradients(model, None, [[document]])
        expected = [a + b for a, b in zip(expected, own, strict=True)] if expected else own
    assert_equal(found, expected, rounding=1e-12)


def test_a_few_layers_are_kept_within_the_budget() -> None:
    layers = forge_layers(make_model(), keep_gib=3e-4)
    assert 0 < layers.num_kept(sum(map(len, DOCUMENTS))) < 3
    assert layers.num_kept(10**9) == 0


def test_dropout_is_pefts_with_the_mask_of_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(targets=EVERY, dropout=0.3)
    document = DOCUMENTS[2]
    rows = step_keys(torch.from_numpy(token_keys([document])), 7, 2)
    for name, module in model.named_modules():
        if ".lora_dropout." in name and name.endswith("default"):
            linear = "model.layers." + name.split("model.layers.")[1].split(".lora_dropout")[0]

            def drop(x: Any, key: int = module_key(linear)) -> Any:
                return x * keep_mask(rows, key, x.shape[-1], 0.3) / 0.7

            monkeypatch.setattr(module, "forward", drop)
    expected = gradients(model, None, [[document]])
    assert_equal(gradients(model, forge_layers(model), [[document]]), expected)


def test_kept_recomputed_and_offloaded_gradients_are_equal_to_the_bit() -> None:
    model = make_model(targets=EVERY, dropout=0.1)
    results = []
    for arguments in ({}, {"keep_gib": 0.0}, {"keep_gib": 0.0, "offload": True}):
        results.append(gradients(model, forge_layers(model, **arguments), [DOCUMENTS]))
        for layer in model.base_model.model.model.layers:
            del layer.forward
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_check_before_the_first_step_sees_a_wrong_scale() -> None:
    model = make_model()
    layers = forge_layers(model)

    def take_step() -> None:
        ids = torch.tensor([DOCUMENTS[2]])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    before = {name: p.clone() for name, p in model.named_parameters()}
    assert compare_with_own(model, layers, take_step, len(DOCUMENTS[2])) < 1e-6
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.base_model.model.model.layers[1].mlp.up_proj.scaling["default"] *= 1.5
    with pytest.raises(MachineError, match=r"does not compute what the stack computes: gradients differ by"):
        compare_with_own(model, layers, take_step, len(DOCUMENTS[2]))


def test_what_is_not_supported_is_said() -> None:
    assert why_not(make_model()) is None
    assert "variant of LoRA" in str(why_not(make_model(use_dora=True)))
    model = make_model()
    model.config.layer_types = ["sliding_attention"] * 3
    assert "sliding window" in str(why_not(model))
