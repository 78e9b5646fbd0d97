"""``python -m tests.support.fake_card BASE BUDGET_GIB|all [CUT]``: TRL's real trainer on a made-up GPU.

Only the allocator is made up: a GiB is taken from the start, another by CUDA, half of one more once kernels are loaded,
and every token of a step takes 10 MiB.
``CUT``: the model is given that many tokens at most, as a library does that cuts what is longer than it was told.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from forge.training.checks import max_context as context
from forge.training.planner import short_run

GIB = 1 << 30
TOKEN_BYTES = 10 << 20
TOTAL = 100 * GIB
num_tokens, cap = 0, TOTAL
taken: list[int] = []
told: list[float] = []  # by PyTorch to a backend that loads its model: free and total bytes, the share it may take


def watch(module: torch.nn.Module, _inputs: Any, embedded: Any) -> None:
    global num_tokens
    if isinstance(module, torch.nn.Embedding):
        num_tokens = embedded.shape[0] * embedded.shape[1]
        taken.append(num_tokens)
        if peak() > cap:
            raise torch.OutOfMemoryError("CUDA out of memory: planted")


def peak() -> int:
    return GIB + num_tokens * TOKEN_BYTES


def set_fraction(fraction: float) -> None:
    global cap
    cap = int(fraction * TOTAL)


def memory(device: Any = None) -> tuple[int, int]:
    context_bytes = GIB if not taken else GIB + GIB // 2
    return TOTAL - GIB - context_bytes, TOTAL


def pretend() -> None:
    """Put the made-up allocator in the place of CUDA's."""
    real = torch.cuda.is_available
    torch.cuda.is_available = lambda: sys._getframe(1).f_code.co_filename == short_run.__file__ or real()
    torch.cuda.empty_cache = torch.cuda.reset_peak_memory_stats = torch.cuda.synchronize = lambda: None
    torch.cuda.max_memory_reserved = peak
    torch.cuda.memory_reserved = torch.cuda.memory_allocated = lambda: GIB
    torch.cuda.mem_get_info = memory
    torch.cuda.set_per_process_memory_fraction = set_fraction
    torch.nn.modules.module.register_module_forward_hook(watch)


def listen() -> None:
    """Note in ``told``."""
    from forge.training.backends import trl

    build = trl.build

    def built(job: Any, observer: Any) -> Any:
        told.extend([*torch.cuda.mem_get_info(), torch.cuda.get_per_process_memory_fraction()])
        return build(job, observer)

    trl.build = built


def main() -> None:
    """Print the probe's answer with the lengths of all steps, what the backend was told and the cap that is left."""
    base, budget, *cut = sys.argv[1:]
    pretend()
    listen()
    if cut:
        take = context.Prober._take
        context.Prober._take = lambda self, length: take(self, min(length, int(cut[0])))  # type: ignore[method-assign]
    found = context.measure_context(
        "smoke",
        [f"model.path={base}"],
        "trl",
        [],
        budget_gib=None if budget == "all" else float(budget),
        lengths=[64, 128, 256, 512, 1024],
        seconds=100.0,
    )
    print(json.dumps(found | {"taken": taken, "told": told, "cap_at_the_end": cap}))


if __name__ == "__main__":
    main()
