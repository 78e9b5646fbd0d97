"""Claim: the Triton kernels compute what the reference computes, at any shape (here under Triton's interpreter).

The interpreter rounds bfloat16 towards zero where a GPU rounds to the nearest; the tolerance for it allows that.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forge.training.kernels import dropout, gpu, gpu_elementwise, ops, reference
from forge.training.kernels.dropout import keep_mask, step_keys
from tests.support.kernel_operands import MODULES, Buffers, assert_close, quantized, row_keys

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
tokens_ = st.integers(1, 130)
widths = st.integers(1, 140)
ranks_ = st.lists(st.sampled_from([1, 4, 7, 16, 17, 33, 64, 100, 256]), min_size=1, max_size=3)
rates = st.sampled_from([0.0, 0.1, 0.5])
quick = settings(max_examples=15)


@given(dtypes, tokens_, widths, ranks_, rates)
@example(torch.float32, 70, 600, [4, 33], 0.1)  # channels in parts
@example(torch.float32, 300, 70, [5, 16, 64], 0.1)  # tokens in parts
@example(torch.bfloat16, 65, 129, [256, 129], 0.1)  # too large for one launch
@quick
def test_lora(dtype: torch.dtype, tokens: int, width: int, ranks: list[int], p: float) -> None:
    make = Buffers(dtype)
    x, rows, modules = make.random(tokens, width), row_keys(tokens), MODULES[: len(ranks)]
    adapters = [make.random(rank, width, dtype=torch.float32) for rank in ranks]
    grads = [make.random(tokens, rank) for rank in ranks]

    found = gpu.lora_down(x, adapters, modules, rows, p)
    for value, expected in zip(found, reference.lora_down(x, adapters, modules, rows, p), strict=True):
        assert value.dtype == dtype
        assert value.is_contiguous()
        assert_close(value, expected, dtype)

    found = gpu.lora_grad_a(x, grads, modules, rows, p)
    for value, expected in zip(found, reference.lora_grad_a(x, grads, modules, rows, p), strict=True):
        assert value.dtype == torch.float32
        assert_close(value, expected, torch.float32)

    dx = make.random(tokens, width)
    expected = reference.lora_add_grad_x_(dx.clone(), grads, adapters, modules, rows, p)
    assert gpu.lora_add_grad_x_(dx, grads, adapters, modules, rows, p) is dx
    assert_close(dx, expected, dtype)
    make.assert_nothing_written_outside()


@given(tokens_, widths, st.sampled_from([0.01, 0.1, 0.5, 0.9]), st.integers(0, 2**31 - 1))
@quick
def test_the_mask_is_the_reference_s_to_the_bit(tokens: int, width: int, p: float, module: int) -> None:
    rows = row_keys(tokens, seed=module % 1000)
    ones = torch.ones(tokens, 1)
    dx = gpu.lora_add_grad_x_(torch.zeros(tokens, width), [ones], [torch.ones(1, width)], [module], rows, p)
    assert torch.equal(dx != 0, keep_mask(rows, module, width, p))
    assert torch.allclose(dx[dx != 0], torch.tensor(1 / (1 - p)))


def test_forward_and_both_gradients_have_one_mask() -> None:
    """x.A and dA see the same kept elements as dx: read back one by one by unit adapters and unit gradients."""
    tokens, width, p = 40, 90, 0.3
    rows, ones = row_keys(tokens), torch.ones(tokens, width)
    expected = keep_mask(rows, MODULES[0], width, p) / (1 - p)
    (forward,) = gpu.lora_down(ones, [torch.eye(width)], MODULES[:1], rows, p)
    (grad_a,) = gpu.lora_grad_a(ones, [torch.eye(tokens)], MODULES[:1], rows, p)
    assert torch.allclose(forward, expected)
    assert torch.allclose(grad_a, expected)


def test_step_keys_are_the_reference_s() -> None:
    keys = row_keys(3000)
    word = dropout._signed(dropout._word(b"42 7"))
    assert torch.equal(gpu.step_keys(keys, word), step_keys(keys, 42, 7))


@given(dtypes, tokens_, widths, st.sampled_from([1, 7, 16, 100]), rates)
@example(torch.float16, 70, 600, 16, 0.1)
@quick
def test_swiglu(dtype: torch.dtype, tokens: int, width: int, rank: int, p: float) -> None:
    make = Buffers(dtype)
    e, g, dh = (make.random(tokens, width) for _ in range(3))
    a, rows = make.random(rank, width), row_keys(tokens)
    assert_close(gpu_elementwise.swiglu(e, g), reference.swiglu(e, g), dtype)

    h, xa = gpu.swiglu_lora_down(e, g, a, MODULES[0], rows, p)
    assert torch.equal(h, gpu_elementwise.swiglu(e, g))
    assert torch.equal(xa, gpu.lora_down(h, [a], MODULES[:1], rows, p)[0])

    expected = reference.swiglu_backward_(dh.clone(), e.clone(), g.clone())
    found = gpu_elementwise.swiglu_backward_(dh, e, g)
    for value, buffer, want in zip(found, (dh, e, g), expected, strict=True):
        assert value is buffer
        assert_close(value, want, dtype)
    make.assert_nothing_written_outside()


@given(dtypes, st.integers(1, 60), widths, st.booleans())
@example(torch.float32, 3, 3584, True)
@example(torch.float16, 131, 128, False)  # per head: several rows in a program
@quick
def test_rms_norm(dtype: torch.dtype, tokens: int, width: int, is_added: bool) -> None:
    make = Buffers(dtype)
    x, residual, dy, add = (make.random(tokens, width) for _ in range(4))
    weight = make.random(width)
    if is_added:
        found = gpu_elementwise.add_rms_norm(x, residual, weight, 1e-6)
        expected = reference.add_rms_norm(x, residual, weight, 1e-6)
        if dtype != torch.bfloat16:
            assert torch.equal(found[0], expected[0])
    else:
        found = (x, *gpu_elementwise.rms_norm(x, weight, 1e-6))
        expected = (x, *reference.rms_norm(x, weight, 1e-6))
    for value, want in zip(found[:2], expected[:2], strict=True):
        assert_close(value, want, dtype)
    assert_close(found[2], expected[2], dtype if is_added and dtype == torch.bfloat16 else torch.float32)

    extra, rstd = add if is_added else None, reference.rms_norm(x, weight, 1e-6)[1]
    value = gpu_elementwise.rms_norm_backward(dy, x, weight, rstd, extra)
    want = reference.rms_norm_backward(dy, x, weight, rstd, extra)
    assert_close(value.float() + 1, want.float() + 1, dtype)  # + 1: a row of one element has no gradient
    make.assert_nothing_written_outside()


@given(dtypes, st.integers(1, 40), st.integers(1, 7), st.integers(1, 3), st.sampled_from([2, 12, 64]), st.booleans())
@quick
def test_rope(dtype: torch.dtype, tokens: int, heads_q: int, heads_k: int, dim: int, backward: bool) -> None:
    make = Buffers(dtype)
    qkv = make.random(tokens, heads_q + 2 * heads_k, dim)
    tables = [make.random(tokens, dim if backward else dim // 2, dtype=torch.float32) for _ in range(2)]
    expected = qkv.clone()
    for module, buffer in ((gpu_elementwise, qkv), (reference, expected)):
        module.rope_(buffer[:, :heads_q], buffer[:, heads_q : heads_q + heads_k], *tables, backward)
    assert_close(qkv, expected, dtype)
    make.assert_nothing_written_outside()


@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "blocksize"), [(64, 300, 64), (6, 100, 64), (1, 2, 64), (10, 1000, 32), (3, 4096, 4096)]
)
def test_nf4_to_the_bit(dtype: torch.dtype, rows: int, width: int, blocksize: int, is_nested: bool) -> None:
    packed, state = quantized((rows, width), blocksize, dtype, is_nested)
    make = Buffers(dtype)
    out = make.place(torch.full((rows, width), 7.0, dtype=dtype))
    assert gpu_elementwise.dequantize_nf4(packed, state, out) is out
    assert torch.equal(out, reference.dequantize_nf4(packed, state))
    make.assert_nothing_written_outside()


def test_nf4_in_bfloat16_is_the_float32_value_without_its_lower_bits() -> None:
    """What the interpreter can show of bfloat16; to the nearest is the GPU's own rounding."""
    packed, state = quantized((64, 300), 64, torch.bfloat16, is_nested=True)
    found = gpu_elementwise.dequantize_nf4(packed, state)
    state.dtype = torch.float32
    assert torch.equal(
        found.float(), (reference.dequantize_nf4(packed, state).view(torch.int32) & -65536).view(torch.float32)
    )


def test_the_same_call_gives_the_same_bits() -> None:
    make = Buffers(torch.float32)
    x, a, d, rows = make.random(270, 530), make.random(16, 530), make.random(270, 16), row_keys(270)
    for call in (
        lambda: gpu.lora_down(x, [a], MODULES[:1], rows, 0.1),
        lambda: gpu.lora_grad_a(x, [d], MODULES[:1], rows, 0.1),
    ):
        assert torch.equal(call()[0], call()[0])


def test_what_is_not_contiguous_is_refused() -> None:
    with pytest.raises(ValueError, match="the kernels read contiguous tensors"):
        gpu.lora_down(torch.ones(4, 8).T, [torch.ones(2, 4)], [0], None, 0.0)
    with pytest.raises(ValueError, match="dropout needs the row keys"):
        gpu.lora_down(torch.ones(4, 8), [torch.ones(2, 8)], [0], None, 0.1)


# The choice


def test_triton_computes_where_it_is_asked_to_and_never_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 2)
    assert (ops._lora(x), ops._elementwise(x)) == (reference, reference)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (ops._lora(x), ops._elementwise(x)) == (gpu, gpu_elementwise)
    assert (ops._lora(x.double()), ops._elementwise(x.double())) == (reference, reference)


def test_every_operation_can_be_called_through_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> list[torch.Tensor]:
        make = Buffers(torch.float32)
        x, e, g, a, d = (make.random(*shape) for shape in [(8, 16)] * 3 + [(4, 16), (8, 4)])
        weight, rows, q = make.random(16), row_keys(8), make.random(8, 2, 16)
        packed, state = quantized((4, 64), 64, torch.float32, is_nested=True)
        y, rstd = ops.rms_norm(x, weight, 1e-6)
        found = [y, ops.rms_norm_backward(e, x, weight, rstd), *ops.add_rms_norm(x, e, weight, 1e-6), ops.swiglu(e, g)]
        found += [*ops.lora_down(x, [a], [1], rows, 0.1), *ops.lora_grad_a(x, [d], [1], rows, 0.1)]
        found += [ops.lora_add_grad_x_(x.clone(), [d], [a], [1], rows, 0.1)]
        found += [*ops.swiglu_lora_down(e, g, a, 1, rows, 0.1), *ops.rope_(q, q.clone(), x, e)]
        return [*found, ops.dequantize_nf4(packed, state), *ops.swiglu_backward_(x, e, g)]

    expected = results()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for value, want in zip(results(), expected, strict=True):
        assert_close(value, want, torch.float32)


def test_fp4_is_refused() -> None:
    packed, state = quantized((4, 64), 64, torch.float32, is_nested=False)
    state.quant_type = "fp4"
    with pytest.raises(ValueError, match="the weight is quantised as fp4; this reads nf4"):
        ops.dequantize_nf4(packed, state)


def test_a_machine_without_triton_can_import_the_choice() -> None:
    code = "import sys; sys.modules['triton'] = None; import forge.training.kernels.ops, forge.training.kernels.dropout"
    subprocess.run([sys.executable, "-c", code], check=True)
