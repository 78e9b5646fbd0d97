"""Compile each kernel that a call would launch, for a GPU that is not there. Run as a process of its own.

``python -m tests.support.compiled_kernels 90`` calls every operation on CPU tensors, compiles each launch with Triton's
own ptxas for that compute capability and prints one JSON line per launch: kernel, registers, spilled and shared bytes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from forge.training.kernels import gpu, gpu_elementwise

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


def compile_launch(kernel: Any, capability: int, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """One launch's resources. Arguments are specialised as the launch would do it (alignment, divisibility by 16)."""
    signature, constants, attributes = {}, {}, {}
    named = zip(kernel.params, args, strict=True)
    for parameter, value in named:
        at = (parameter.num,)
        if parameter.is_constexpr:
            signature[parameter.name], constants[at] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            is_divisible = not parameter.do_not_specialize_on_alignment
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            is_divisible = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if is_divisible:
            attributes[at] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump.stdout + dump.stderr))
    return {
        "kernel": kernel.__name__,
        "registers": int(usage["REG"]),
        "spilled_bytes": int(usage["LOCAL"]) + int(usage["STACK"]),
        "shared_bytes": compiled.metadata.shared,
        "is_16_bit": not any(isinstance(a, torch.Tensor) and a.dtype == torch.float32 for a in args[:1]),
        "constants": {kernel.arg_names[at[0]]: value for at, value in constants.items()},
    }


def call_every_operation(dtype: torch.dtype, ranks: list[int], p: float, tokens: int = 1000) -> None:
    """The LoRA products alone; sizes only decide which kernels are launched."""
    width, modules = 3584, list(range(len(ranks)))
    x = torch.zeros(tokens, width, dtype=dtype)
    rows = torch.zeros(tokens, dtype=torch.int32)
    adapters = [torch.zeros(rank, width) for rank in ranks]
    grads = [torch.zeros(tokens, rank, dtype=dtype) for rank in ranks]
    gpu.lora_down(x, adapters, modules, rows, p)
    gpu.lora_grad_a(x, grads, modules, rows, p)
    gpu.lora_add_grad_x_(x, grads, adapters, modules, rows, p)
    gpu.swiglu_lora_down(x, x, adapters[0], 0, rows, p)


def call_the_rest(dtype: torch.dtype) -> None:
    gpu.step_keys(torch.zeros(1000, dtype=torch.int32), 1)
    for width in (128, 8192):
        x, weight, rstd = torch.zeros(100, width, dtype=dtype), torch.zeros(width, dtype=dtype), torch.zeros(100)
        gpu_elementwise.rms_norm(x, weight, 1e-6)
        gpu_elementwise.add_rms_norm(x, x, weight, 1e-6)
        gpu_elementwise.rms_norm_backward(x, x, weight, rstd)
        gpu_elementwise.rms_norm_backward(x, x, weight, rstd, x)
    gpu_elementwise.swiglu(x, x)
    gpu_elementwise.swiglu_backward_(x, x, x)
    qkv, table = torch.zeros(100, 36, 128, dtype=dtype), torch.zeros(100, 128)
    gpu_elementwise.rope_(qkv[:, :28], qkv[:, 28:32], table, table)
    code, state2 = torch.zeros(16), SimpleNamespace(absmax=torch.zeros(10), code=torch.zeros(256), blocksize=256)
    for absmax, nested in ((torch.zeros(2560, dtype=torch.uint8), state2), (torch.zeros(2560), None)):
        state = SimpleNamespace(
            absmax=absmax, state2=nested, offset=torch.zeros(()), code=code, blocksize=64, shape=(64, 2560), dtype=dtype
        )
        gpu_elementwise.dequantize_nf4(torch.zeros(64 * 1280, 1, dtype=torch.uint8), state)


def main(capability: int) -> None:
    seen = set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        key = (self.__name__, *[a.dtype if isinstance(a, torch.Tensor) else a for a in args])
        if key not in seen:
            seen.add(key)
            print(json.dumps(compile_launch(self, capability, args, options)), flush=True)

    JITFunction.run = run
    call_the_rest(torch.bfloat16)
    for ranks in ([16], [16, 16], [16, 16, 16], [64], [64, 64, 64], [128], [256]):
        call_every_operation(torch.bfloat16, ranks, 0.1)
    call_every_operation(torch.float32, [256], 0.1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
