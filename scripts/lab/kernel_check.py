"""Every Triton operation against plain torch on a GPU, at sizes of a 7B model; prints relative norms and microseconds."""

from __future__ import annotations

import sys
from typing import Any

import torch

from forge.training.kernels import gpu, reference
from forge.training.kernels.dropout import keep_mask, module_key, step_keys

DEVICE, BF16 = "cuda", torch.bfloat16


def error(ours: Any, expected: Any) -> float:
    """Relative norm of the difference, the largest of several."""
    if not isinstance(ours, torch.Tensor):
        return max(error(a, b) for a, b in zip(ours, expected, strict=True))
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def microseconds(call: Any) -> float:
    """The median of a call, by events."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=60, return_mode="median")) * 1e3


def main() -> int:
    """0 where every operation agrees."""
    worst = 0.0
    for tokens, width, rank in ((257, 3584, 16), (4096, 3584, 16), (8192, 18944, 16), (1000, 3584, 100)):
        torch.manual_seed(tokens)
        x = torch.randn(tokens, width, device=DEVICE, dtype=BF16)
        dx = torch.randn_like(x)
        rows = step_keys(torch.randint(-(2**31), 2**31 - 1, (tokens,), dtype=torch.int32, device=DEVICE), 1, 2)
        keys = [module_key(name) for name in ("q", "v")]
        a = [torch.randn(rank, width, device=DEVICE, dtype=BF16) * 0.02 for _ in keys]
        d = [torch.randn(tokens, rank, device=DEVICE, dtype=BF16) for _ in keys]
        weight = torch.randn(width, device=DEVICE, dtype=BF16)
        e, g = torch.randn_like(x), torch.randn_like(x)
        rstd = reference.rms_norm(x, weight, 1e-6)[1]
        q, k = x[:, :3072].view(tokens, 24, 128), x[:, 3072:3584].view(tokens, 4, 128)
        angles = torch.rand(tokens, 64, device=DEVICE) * 6
        cos, sin = (t(angles).repeat(1, 2).to(BF16) for t in (torch.cos, torch.sin))
        cases: list[tuple[str, Any, Any]] = [
            ("lora_down", lambda m: m.lora_down(x, a, keys, rows, 0.1), None),
            ("lora_down 1", lambda m: m.lora_down(x, a[:1], keys[:1], None, 0.0), None),
            ("lora_grad_a", lambda m: m.lora_grad_a(x, d, keys, rows, 0.1), None),
            ("lora_add_grad_x_", lambda m: m.lora_add_grad_x_(dx.clone(), d, a, keys, rows, 0.1), None),
            ("swiglu", lambda m: m.swiglu(e, g), None),
            ("swiglu_backward_", lambda m: m.swiglu_backward_(dx.clone(), e.clone(), g.clone()), None),
            ("rms_norm", lambda m: m.rms_norm(x, weight, 1e-6), None),
            ("add_rms_norm", lambda m: m.add_rms_norm(x, dx, weight, 1e-6), None),
            ("rms_norm_backward", lambda m: m.rms_norm_backward(dx, x, weight, rstd, e), None),
            ("rope_", lambda m: m.rope_(q.clone(), k.clone(), cos, sin, False), None),
            ("rope_ backward", lambda m: m.rope_(q.clone(), k.clone(), cos, sin, True), None),
        ]
        for name, call, _ in cases:
            try:
                own = error(call(gpu), call(reference))
                time = microseconds(lambda call=call: call(gpu))
            except Exception as failure:
                own, time = float("inf"), 0.0
                print(f"{type(failure).__name__}: {str(failure)[:300]}")
            worst = max(worst, own)
            print(f"{tokens:6} x {width:5} rank {rank:3} {name:18} {own:.2e} {time:8.1f} us")
        kept = gpu.lora_down(torch.ones_like(x), [torch.eye(rank, width, device=DEVICE, dtype=BF16)], keys[:1], rows, 0.1)[0]
        same = bool(((kept != 0) == keep_mask(rows, keys[0], width, 0.1)[:, :rank]).all())
        print("mask equal to the bit:", same)
        worst = max(worst, 0.0 if same else 1.0)
    try:
        import bitsandbytes.functional as bnb

        weight = torch.randn(18944, 3584, device=DEVICE, dtype=BF16)
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        expected, ours = bnb.dequantize_4bit(packed, state), gpu.dequantize_nf4(packed, state, None)
        print("dequantize_nf4 equal to the bit:", torch.equal(expected, ours), end="; ")
        print(f"{microseconds(lambda: gpu.dequantize_nf4(packed, state, None)):.1f} us,", end=" ")
        print(f"bitsandbytes {microseconds(lambda: bnb.dequantize_4bit(packed, state)):.1f} us")
    except ImportError:
        print("dequantize_nf4: no bitsandbytes here")
    return 0 if worst < 0.02 else 1


if __name__ == "__main__":
    sys.exit(main())
