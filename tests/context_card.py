"""``python -m tests.context_card BASE [CUT]``: the context probe, TRL's real trainer on a CPU that seems to be a GPU.

Only the allocator is made up: a GiB is taken from the start, another by CUDA, and every token of a step takes 10 MiB.
``CUT``: the model is given that many tokens at most, as a library does that cuts what is longer than it was told.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from forge.training.probes import context
from forge.training.workload import load_workload

GIB = 1 << 30
TOKEN_BYTES = 10 << 20
TOTAL = 100 * GIB
num_tokens, cap = 0, TOTAL
taken: list[int] = []


def watch(module: torch.nn.Module, _inputs: Any, embedded: Any) -> None:
    global num_tokens
    if isinstance(module, torch.nn.Embedding):
        num_tokens = embedded.shape[0] * embedded.shape[1]
        taken.append(num_tokens)


def synchronize() -> None:
    if peak() > cap:
        raise torch.OutOfMemoryError("CUDA out of memory: planted")


def peak() -> int:
    return GIB + num_tokens * TOKEN_BYTES


def set_fraction(fraction: float) -> None:
    global cap
    cap = int(fraction * TOTAL)


def pretend() -> None:
    """Put the made-up allocator in the place of CUDA's."""
    real = torch.cuda.is_available
    torch.cuda.is_available = lambda: sys._getframe(1).f_code.co_filename == context.__file__ or real()
    torch.cuda.empty_cache = torch.cuda.reset_peak_memory_stats = lambda: None
    torch.cuda.synchronize = synchronize
    torch.cuda.max_memory_reserved = peak
    torch.cuda.memory_reserved = torch.cuda.memory_allocated = lambda: GIB
    torch.cuda.mem_get_info = lambda device=None: (TOTAL - 2 * GIB, TOTAL)
    torch.cuda.set_per_process_memory_fraction = set_fraction
    torch.nn.modules.module.register_module_forward_hook(watch)


def main() -> None:
    """Print the probe's answer with the lengths of all steps."""
    base, *cut = sys.argv[1:]
    pretend()
    if cut:
        take = context.Prober._take
        context.Prober._take = lambda self, length: take(self, min(length, int(cut[0])))  # type: ignore[method-assign]
    workload = load_workload("smoke", [f"model.path={base}", "training.max_steps=2"])
    lengths = [64, 128, 256, 512, 1024]
    found = context.measure_context(workload, "trl", [], budgets_gib=[8, 2, 4], lengths=lengths, seconds=100.0)
    print(json.dumps(found | {"taken": taken}))


if __name__ == "__main__":
    main()
