"""Operands of every operation, followed by NaN: reading over a border spoils the result, writing is seen."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from forge.training.kernels.dropout import module_key, step_keys, token_keys

# Relative to the largest rounding of one element: a sum of rounded values is as far off as the values are, or less.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
MODULES = [module_key(name) for name in ("q_proj", "k_proj", "v_proj")]
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


class Buffers:
    """Random tensors, each followed by NaN in its own buffer."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.rests: list[Tensor] = []

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.place(torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype))

    def place(self, values: Tensor) -> Tensor:
        buffer = torch.full((values.numel() + 512,), torch.nan, dtype=values.dtype)
        self.rests.append(buffer[values.numel() :])
        return buffer[: values.numel()].copy_(values.flatten()).view(values.shape)

    def assert_nothing_written_outside(self) -> None:
        assert all(rest.isnan().all() for rest in self.rests)


def row_keys(tokens: int, seed: int = 0) -> Tensor:
    """Of a packed row of two documents."""
    ids = torch.randint(0, 1000, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return step_keys(torch.from_numpy(token_keys([ids[: tokens // 3], ids[tokens // 3 :]])), 1, 2)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """By relative norm, at the rounding of ``dtype``."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], f"{float(error):.3g}"  # a NaN is not


def quantized(
    shape: tuple[int, int], blocksize: int, dtype: torch.dtype, is_nested: bool
) -> tuple[Tensor, SimpleNamespace]:
    """Random NF4 data in the layout of bitsandbytes' Params4bit and QuantState."""
    generator = torch.Generator().manual_seed(shape[0])
    size = shape[0] * shape[1]
    packed = torch.randint(0, 256, (size // 2, 1), generator=generator, dtype=torch.uint8)
    num_blocks = -(-size // blocksize)
    state = SimpleNamespace(shape=shape, dtype=dtype, blocksize=blocksize, quant_type="nf4", code=torch.tensor(NF4))
    state.absmax, state.offset, state.state2 = torch.rand(num_blocks, generator=generator), None, None
    if is_nested:
        state.absmax = torch.randint(0, 256, (num_blocks,), generator=generator, dtype=torch.uint8)
        state.offset = torch.tensor(0.037)
        absmax2 = torch.rand(-(-num_blocks // 256), generator=generator)
        state.state2 = SimpleNamespace(code=torch.linspace(-1, 1, 256), absmax=absmax2, blocksize=256)
    return packed, state
