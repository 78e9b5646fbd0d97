"""Claim: the reference computes what others define: autograd in float64, transformers' modules, the format of NF4."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forge.training.kernels import reference
from forge.training.kernels.dropout import keep_mask
from tests.support.kernel_operands import MODULES, Buffers, assert_close, quantized, row_keys

FLOAT64 = torch.float64
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
sizes = st.integers(1, 40)
rates = st.sampled_from([0.0, 0.1, 0.5])


@given(sizes, sizes, st.lists(st.integers(1, 20), min_size=1, max_size=3), rates)
def test_lora_is_a_linear_layer_with_dropout_and_its_gradients(
    tokens: int, width: int, ranks: list[int], p: float
) -> None:
    make = Buffers(FLOAT64)
    rows, modules = row_keys(tokens), MODULES[: len(ranks)]
    x = make.random(tokens, width).requires_grad_()
    adapters = [make.random(rank, width).requires_grad_() for rank in ranks]
    grads = [make.random(tokens, rank) for rank in ranks]
    masks = [keep_mask(rows, module, width, p) for module in modules]
    expected = [(x * mask / (1 - p)) @ a.T for mask, a in zip(masks, adapters, strict=True)]
    torch.autograd.backward(expected, grads)
    with torch.no_grad():
        for found, want in zip(reference.lora_down(x, adapters, modules, rows, p), expected, strict=True):
            assert_close(found, want, FLOAT64)
        for found, a in zip(reference.lora_grad_a(x, grads, modules, rows, p), adapters, strict=True):
            assert_close(found, a.grad, FLOAT64)
        before = make.random(tokens, width)
        found = before.clone()
        assert reference.lora_add_grad_x_(found, grads, adapters, modules, rows, p) is found
        assert_close(found, before + x.grad, FLOAT64)


@given(sizes, sizes, rates)
def test_swiglu_is_silu_times_gate_and_its_gradients(tokens: int, width: int, p: float) -> None:
    make = Buffers(FLOAT64)
    e, g = (make.random(tokens, width).requires_grad_() for _ in range(2))
    dh, a, rows = make.random(tokens, width), make.random(3, width), row_keys(tokens)
    expected = torch.nn.functional.silu(e) * g
    expected.backward(dh)
    with torch.no_grad():
        assert_close(reference.swiglu(e, g), expected, FLOAT64)
        h, xa = reference.swiglu_lora_down(e, g, a, MODULES[0], rows, p)
        assert torch.equal(h, reference.swiglu(e, g))
        assert torch.equal(xa, reference.lora_down(h, [a], MODULES[:1], rows, p)[0])
        buffers = dh.clone(), e.clone(), g.clone()
        found = reference.swiglu_backward_(*buffers)
    assert all(a is b for a, b in zip(found, buffers, strict=True))
    for value, want in zip(found, (expected.detach(), e.grad, g.grad), strict=True):
        assert_close(value, want, FLOAT64)


@given(sizes, sizes)
def test_the_gradient_of_a_norm_is_autograd_s(tokens: int, width: int) -> None:
    make = Buffers(FLOAT64)
    x, residual, weight = make.random(tokens, width), make.random(tokens, width), make.random(width)
    dy, add = make.random(tokens, width), make.random(tokens, width)
    s, y, rstd = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(s, x + residual)
    s.requires_grad_()
    expected = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-6) * weight
    expected.backward(dy)
    assert_close(y, expected.detach(), FLOAT64)
    assert_close(reference.rms_norm_backward(dy, s.detach(), weight, rstd) + 1, s.grad + 1, FLOAT64)
    assert_close(reference.rms_norm_backward(dy, s.detach(), weight, rstd, add), s.grad + add, FLOAT64)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_norm_is_that_of_qwen_and_llama_to_the_bit(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    make = Buffers(dtype)
    x = make.random(50, 96)
    for module in (Qwen2RMSNorm(96, eps=1e-6), LlamaRMSNorm(96, eps=1e-6)):
        module.weight.data = make.random(96)
        assert torch.equal(reference.rms_norm(x, module.weight.data, 1e-6)[0], module(x))


@pytest.mark.parametrize("is_half", [True, False])
def test_rope_is_that_of_transformers_and_backward_undoes_it(is_half: bool) -> None:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    make = Buffers(FLOAT64)
    qkv = make.random(30, 9, 16)
    angles = make.random(30, 8).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    q, k = qkv.clone()[None, :, :6].transpose(1, 2), qkv.clone()[None, :, 6:8].transpose(1, 2)
    expected = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    found, tables = qkv.clone(), [t[:, :8] if is_half else t for t in (cos, sin)]
    reference.rope_(found[:, :6], found[:, 6:8], *tables)
    assert_close(found[:, :6], expected[0][0].transpose(0, 1), FLOAT64)
    assert_close(found[:, 6:8], expected[1][0].transpose(0, 1), FLOAT64)
    assert torch.equal(found[:, 8:], qkv[:, 8:])
    reference.rope_(found[:, :6], found[:, 6:8], *tables, backward=True)
    assert_close(found, qkv, FLOAT64)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("is_nested", [True, False])
def test_nf4_is_read_as_its_format_says(dtype: torch.dtype, is_nested: bool) -> None:
    packed, state = quantized((6, 100), 64, dtype, is_nested)
    found = reference.dequantize_nf4(packed, state).flatten()
    for i in range(600):
        byte = int(packed[i // 2, 0])
        scale = np.float32(state.absmax[i // 64])
        if is_nested:
            outer = np.float32(state.state2.absmax[i // 64 // 256])
            scale = np.float32(state.state2.code[int(state.absmax[i // 64])]) * outer + np.float32(state.offset)
        value = np.float32(state.code[byte & 15 if i % 2 else byte >> 4]) * scale
        assert found[i] == torch.tensor(value).to(dtype)
    out = torch.empty(6, 100, dtype=dtype)
    assert (
        reference.dequantize_nf4(packed.view(-1, 2).view(torch.bfloat16), state, out) is out
    )  # however the bytes are stored
    assert torch.equal(out.flatten(), found)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_narrow_type_differs_from_float64_by_its_rounding(dtype: torch.dtype, p: float) -> None:
    make = Buffers(dtype)
    x, e, g, dh, weight = (make.random(*shape) for shape in [(50, 700)] * 4 + [(700,)])
    adapters, grads, rows = (
        [make.random(9, 700), make.random(4, 700)],
        [make.random(50, 9), make.random(50, 4)],
        row_keys(50),
    )

    def results(to: torch.dtype) -> list[torch.Tensor]:
        a, d = [t.to(to) for t in adapters], [t.to(to) for t in grads]
        x_, e_, g_, dh_, weight_ = (t.to(to, copy=True) for t in (x, e, g, dh, weight))
        y, rstd = reference.rms_norm(x_, weight_, 1e-6)
        found = [y, rstd, reference.rms_norm_backward(dh_, x_, weight_, rstd, e_)]
        found += reference.lora_down(x_, a, MODULES[:2], rows, p) + reference.lora_grad_a(x_, d, MODULES[:2], rows, p)
        found += [reference.lora_add_grad_x_(dh_.clone(), d, a, MODULES[:2], rows, p), reference.swiglu(e_, g_)]
        return [*found, *reference.swiglu_backward_(dh_, e_, g_)]

    for found, expected in zip(results(dtype), results(FLOAT64), strict=True):
        assert_close(found, expected, dtype)


def test_dropout_without_row_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout needs the row keys"):
        reference.lora_down(torch.ones(2, 2), [torch.ones(1, 2)], [0], None, 0.1)
