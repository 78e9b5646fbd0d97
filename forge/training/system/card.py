"""A smaller GPU within the one that is there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Card:
    """While it lasts, this process has a GPU of ``budget_bytes`` within the real one, and PyTorch says so.

    CUDA's context and what others hold are included. ``None``: all of it.
    """

    def __init__(self, budget_bytes: int | None) -> None:
        import torch

        self._real, self._real_fraction = torch.cuda.mem_get_info, torch.cuda.get_per_process_memory_fraction
        self.total_bytes = self._real()[1]
        self.budget_bytes = budget_bytes or self.total_bytes
        self.is_real = self.budget_bytes <= self.total_bytes

    def __enter__(self) -> Card:
        import torch

        self.limit()
        torch.cuda.mem_get_info = self.free_and_total
        torch.cuda.get_per_process_memory_fraction = lambda device=None: 1.0  # of what mem_get_info says there is
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        torch.cuda.mem_get_info, torch.cuda.get_per_process_memory_fraction = self._real, self._real_fraction
        torch.cuda.set_per_process_memory_fraction(1.0)

    def limit(self) -> None:
        """Cap the allocator at what CUDA's context, which grows as kernels are loaded, leaves of the budget."""
        import torch

        free, _ = self._real()
        overhead = self.total_bytes - free - torch.cuda.memory_reserved()
        self.cap_bytes = self.budget_bytes - overhead
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, self.cap_bytes) / self.total_bytes))

    def free_and_total(self, device: Any = None) -> tuple[int, int]:
        """Free and total bytes, as `torch.cuda.mem_get_info` says them."""
        import torch

        free = max(0, self.cap_bytes - torch.cuda.memory_reserved())
        return min(free, self._real(device)[0]), min(self.budget_bytes, self.total_bytes)


def card_of(budget_bytes: int | None) -> AbstractContextManager[Any]:
    """A :class:`Card` where a budget is set and there is a GPU; a CPU's memory cannot be capped."""
    import torch

    return Card(budget_bytes) if budget_bytes is not None and torch.cuda.is_available() else nullcontext()
