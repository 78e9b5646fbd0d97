#!/usr/bin/env python3
"""Check every operation of forge.training.kernels on this GPU, and time it: ``kernel_bench.py OUT.json``.

Each operation is compared with the reference in float64 (relative norm), called twice (the same bits), and timed by
``triton.testing.do_bench`` (median). ``share`` is the bytes that it must move, each input and output once, over the
seconds it took, as a share of a large copy's bandwidth measured here. Sizes are Qwen2-7B's. Needs torch, triton and
numpy; with bitsandbytes NF4 is also compared with it, to the bit. Exit code 8 where a check fails.

``--tiny`` runs small sizes on a CPU under Triton's interpreter: no times that mean anything, the same checks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from torch import Tensor

from forge.training.kernels import dropout, ops, reference

IS_TINY = "--tiny" in sys.argv
P = 0.1
# Of a result in this type, against float64: some are rounded twice. The interpreter rounds bfloat16 towards zero.
LIMITS = {torch.bfloat16: 1.2e-2 if IS_TINY else 4e-3, torch.float16: 1e-3, torch.float32: 2e-5}
HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128


@dataclass(frozen=True)
class Sizes:
    tokens: Sequence[int]
    hidden: int
    intermediate: int
    ranks: Sequence[int]
    copied_bytes: int


FULL = Sizes((257, 4096, 16384), 3584, 18944, (16, 64), 2**32)
TINY = Sizes((5, 70), 96, 160, (4,), 2**16)


@dataclass(frozen=True)
class Case:
    """One operation on one set of operands. ``call(module, operands)`` returns its results."""

    name: str
    call: Callable[[Any, list[Tensor]], Sequence[Tensor]]
    operands: list[Tensor]
    written: Sequence[int] = ()  # operands that are written as well
    is_exact: bool = False  # against the reference in the same type: on a GPU to the bit


@dataclass(frozen=True)
class Result:
    name: str
    tokens: int
    rank: int
    dtype: str
    error: float
    limit: float
    is_repeatable: bool
    microseconds: float
    moved_bytes: int
    share: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.limit and self.is_repeatable


def random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


def row_keys(device: str, tokens: int) -> Tensor:
    ids = torch.randint(0, 150_000, (tokens,)).tolist()
    return dropout.step_keys(torch.from_numpy(dropout.token_keys([ids])).to(device), 42, 1)


def lora_down(modules: list[int], rows: Tensor, f: Any, t: list[Tensor]) -> Sequence[Tensor]:
    return list(f.lora_down(t[0], t[1:], modules, rows, P))


def lora_grad_a(modules: list[int], rows: Tensor, f: Any, t: list[Tensor]) -> Sequence[Tensor]:
    return list(f.lora_grad_a(t[0], t[1:], modules, rows, P))


def lora_add_grad_x_(modules: list[int], rows: Tensor, f: Any, t: list[Tensor]) -> Sequence[Tensor]:
    n = len(modules)
    return [f.lora_add_grad_x_(t[0], t[1 : n + 1], t[n + 1 :], modules, rows, P)]


def dequantize_nf4(state: Any, f: Any, t: list[Tensor]) -> Sequence[Tensor]:
    return [f.dequantize_nf4(t[0], state)]


def lora_cases(sizes: Sizes, device: str, dtype: torch.dtype, tokens: int, rank: int) -> Iterator[Case]:
    rows = row_keys(device, tokens)
    modules = [dropout.module_key(name) for name in "qkv"]
    for n, width in ((1, sizes.hidden), (2, sizes.hidden), (3, sizes.hidden), (1, sizes.intermediate)):
        x = random(device, dtype, tokens, width)
        adapters = [random(device, dtype, rank, width) for _ in range(n)]
        grads = [random(device, dtype, tokens, rank) for _ in range(n)]
        bound, name = (modules[:n], rows), f"{n} of {width}"
        yield Case(f"lora_down, {name}", partial(lora_down, *bound), [x, *adapters])
        yield Case(f"lora_grad_a, {name}", partial(lora_grad_a, *bound), [x, *grads])
        yield Case(f"lora_add_grad_x_, {name}", partial(lora_add_grad_x_, *bound), [x, *grads, *adapters], written=[0])
    e, g = (random(device, dtype, tokens, sizes.intermediate) for _ in range(2))
    a = random(device, dtype, rank, sizes.intermediate)
    yield Case("swiglu_lora_down", lambda f, t: f.swiglu_lora_down(*t, modules[0], rows, P), [e, g, a])


def other_cases(sizes: Sizes, device: str, dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    wide = [random(device, dtype, tokens, sizes.intermediate) for _ in range(3)]
    yield Case("swiglu", lambda f, t: [f.swiglu(*t)], wide[:2])
    yield Case("swiglu_backward_", lambda f, t: f.swiglu_backward_(*t), wide, written=[0, 1, 2])
    for name, rows, width in (("", tokens, sizes.hidden), (" per head", tokens * HEADS, HEAD_DIM)):
        x, dy, add = (random(device, dtype, rows, width) for _ in range(3))
        weight = random(device, dtype, width)
        rstd = reference.rms_norm(x, weight, 1e-6)[1]
        yield Case("rms_norm" + name, lambda f, t: f.rms_norm(*t, 1e-6), [x, weight])
        yield Case("rms_norm_backward" + name, lambda f, t: [f.rms_norm_backward(*t)], [dy, x, weight, rstd])
        if not name:
            yield Case("add_rms_norm", lambda f, t: f.add_rms_norm(*t, 1e-6), [x, dy, weight])
            yield Case("rms_norm_backward, add", lambda f, t: [f.rms_norm_backward(*t)], [dy, x, weight, rstd, add])
    qkv = random(device, dtype, tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
    q, k = qkv[:, :HEADS], qkv[:, HEADS : HEADS + KV_HEADS]
    tables = [random(device, torch.float32, tokens, HEAD_DIM // 2) for _ in range(2)]
    yield Case("rope_", lambda f, t: f.rope_(*t), [q, k, *tables], written=[0, 1])


def nf4_state(device: str, dtype: torch.dtype, rows: int, width: int) -> tuple[Tensor, Any]:
    """Random packed weights and their doubly quantised scales, as bitsandbytes lays them out."""
    num_blocks = rows * width // 64
    absmax2 = torch.rand(-(-num_blocks // 256), device=device) * 0.05
    code2 = torch.linspace(-1, 1, 256, device=device)
    code = torch.linspace(-1, 1, 16, device=device) ** 3  # any table serves
    state = SimpleNamespace(
        shape=torch.Size((rows, width)), dtype=dtype, blocksize=64, quant_type="nf4", code=code, nested=True,
        absmax=torch.randint(0, 256, (num_blocks,), device=device, dtype=torch.uint8),
        offset=torch.tensor(0.0371, device=device),
        state2=SimpleNamespace(absmax=absmax2, code=code2, blocksize=256, dtype=torch.float32),
    )  # fmt: skip
    return torch.randint(0, 256, (rows * width // 2, 1), device=device, dtype=torch.uint8), state


def nf4_cases(sizes: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    for rows, width in ((512, sizes.hidden), (sizes.hidden, sizes.hidden), (sizes.intermediate, sizes.hidden)):
        packed, state = nf4_state(device, dtype, rows, width)
        name = f"dequantize_nf4, {rows} x {width}"
        yield Case(name, partial(dequantize_nf4, state), [packed], is_exact=True)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """By norm. NaN where anything is NaN."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def measure(case: Case, device: str, bandwidth: float, tokens: int, rank: int, dtype: torch.dtype) -> Result:
    def fresh(to: torch.dtype | None = None) -> list[Tensor]:
        return [t.to(to, copy=True) if to and t.is_floating_point() else t.clone() for t in case.operands]

    expected = case.call(reference, fresh(None if case.is_exact else torch.float64))
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is not written stays NaN
    found, again = ([t.clone() for t in case.call(ops, fresh())] for _ in range(2))
    torch.use_deterministic_algorithms(False)
    if case.is_exact and not IS_TINY:
        limit, error = 0.0, 0.0 if all(map(torch.equal, found, expected)) else math.inf
    else:
        # rstd is float32, of rounded sums: judged as what it comes from
        errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
        limits = [LIMITS[dtype if "rms" in case.name else value.dtype] for value in found]
        error, limit = max(zip(errors, limits, strict=True), key=lambda pair: pair[0] / pair[1])
        error = math.nan if any(map(math.isnan, errors)) else error
    is_repeatable = all(map(torch.equal, found, again))
    operands = fresh()
    moved = sum(t.numel() * t.element_size() for t in operands)
    moved += sum(operands[i].numel() * operands[i].element_size() for i in case.written)
    moved += 0 if case.written else sum(t.numel() * t.element_size() for t in found)
    del expected, found, again
    seconds = timed(lambda: case.call(ops, operands), device)
    name = str(dtype).removeprefix("torch.")
    share = moved / seconds / bandwidth
    return Result(case.name, tokens, rank, name, error, limit, is_repeatable, seconds * 1e6, moved, share)


def timed(call: Callable[[], Any], device: str) -> float:
    """Median seconds of a call."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    return float(triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")) / 1e3


def copy_bandwidth(num_bytes: int, device: str) -> float:
    """Bytes a second, read plus written."""
    source = torch.randint(0, 256, (num_bytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * num_bytes / timed(lambda: target.copy_(source), device)


def masks_are_equal(device: str) -> bool:
    """Masks, through a LoRA gradient of ones, and row keys: those of the reference to the bit."""
    rows, ones = row_keys(device, 1000), torch.ones(1000, 1, device=device)
    for p in (0.01, 0.1, 0.5):
        a, dx = torch.ones(1, 3584, device=device), torch.zeros(1000, 3584, device=device)
        ops.lora_add_grad_x_(dx, [ones], [a], [12345], rows, p)
        if not torch.equal(dx != 0, dropout.keep_mask(rows, 12345, 3584, p)):
            return False
    keys = torch.from_numpy(dropout.token_keys([list(range(5000))]))
    return bool(torch.equal(dropout.step_keys(keys.to(device), 42, 1).cpu(), dropout.step_keys(keys, 42, 1)))


def equals_bitsandbytes(device: str) -> bool | None:
    """Whether NF4 equals bitsandbytes' own, to the bit, in three types; None where bitsandbytes is not installed."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError:
        return None
    for dtype in LIMITS:
        for is_nested in (True, False):
            weight = random(device, dtype, 1024, 3584)
            packed, state = quantize_4bit(weight, compress_statistics=is_nested, quant_type="nf4")
            if not torch.equal(ops.dequantize_nf4(packed, state), dequantize_4bit(packed, state)):
                return False
    return True


def run(sizes: Sizes, device: str) -> dict[str, Any]:
    started, compiled = time.perf_counter(), []
    triton.knobs.runtime.jit_post_compile_hook = lambda **options: compiled.append(options["repr"])
    bandwidth = copy_bandwidth(sizes.copied_bytes, device)
    results, compiled_by_tokens = [], {}
    for tokens in sizes.tokens:
        before = len(compiled)
        for rank in sizes.ranks:
            for case in lora_cases(sizes, device, torch.bfloat16, tokens, rank):
                results.append(measure(case, device, bandwidth, tokens, rank, torch.bfloat16))
        for case in other_cases(sizes, device, torch.bfloat16, tokens):
            results.append(measure(case, device, bandwidth, tokens, 0, torch.bfloat16))
        compiled_by_tokens[tokens] = len(compiled) - before
    for case in nf4_cases(sizes, device, torch.bfloat16):
        results.append(measure(case, device, bandwidth, 0, 0, torch.bfloat16))
    for dtype in (torch.float16, torch.float32):
        cases = [*lora_cases(sizes, device, dtype, sizes.tokens[0], sizes.ranks[0])]
        cases += [*other_cases(sizes, device, dtype, sizes.tokens[0]), *nf4_cases(sizes, device, dtype)]
        results += [measure(case, device, bandwidth, sizes.tokens[0], sizes.ranks[0], dtype) for case in cases]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, interpreted",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "copy_bytes_per_second": bandwidth,
        "compiled_by_tokens": compiled_by_tokens,
        "masks_are_equal": masks_are_equal(device),
        "equals_bitsandbytes": equals_bitsandbytes(device),
        "results": [asdict(result) | {"is_right": result.is_right} for result in results],
        "seconds": time.perf_counter() - started,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Check and time every operation of forge.training.kernels on this GPU."
    )
    parser.add_argument("out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--tiny", action="store_true", help="small sizes on a CPU, under Triton's interpreter")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("error: no CUDA GPU here; --tiny runs the checks on a CPU", file=sys.stderr)
        return 4
    torch.manual_seed(0)
    report = run(TINY, "cpu") if options.tiny else run(FULL, "cuda")
    options.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"{'operation':36} tokens rank {'type':9}    error   limit        us  share")
    for r in report["results"]:
        if r["is_right"] and r["dtype"] != "bfloat16":
            continue  # in the file
        mark = "" if r["is_right"] else "  WRONG" if r["error"] > r["limit"] else "  NOT REPEATABLE"
        print(
            f"{r['name']:36} {r['tokens']:6} {r['rank']:4} {r['dtype']:9} {r['error']:8.1e} {r['limit']:7.0e}"
            f" {r['microseconds']:9.1f} {r['share']:6.1%}{mark}"
        )
    summary = {key: value for key, value in report.items() if key != "results"}
    print(json.dumps(summary))
    is_right = all(r["is_right"] for r in report["results"]) and report["masks_are_equal"]
    return 0 if is_right and report["equals_bitsandbytes"] is not False else 8


if __name__ == "__main__":
    sys.exit(main())
