"""What a layer keeps for the backward pass, in pinned host memory: copied out and back beside the computation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HostMemory:
    """A stack of tensors on the host. What was put last is taken first, as a backward pass does.

    Pinned buffers are kept and used again by every micro-batch. On a CPU it holds the tensors as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        self._free: list[Tensor] = []
        self._stack: list[tuple[Tensor, torch.Size, torch.dtype]] = []
        self._coming: tuple[Tensor, Any] | None = None

    @property
    def num_bytes(self) -> int:
        """Of pinned memory that it holds now."""
        return sum(int(buffer.numel()) for buffer in [*self._free, *(buffer for buffer, *_ in self._stack)])

    def clear(self) -> None:
        """Forget what was put: a step that was given up leaves its tensors here."""
        self._free += [buffer for buffer, *_ in self._stack if self._stream is not None]
        self._stack, self._coming = [], None

    def put(self, tensor: Tensor) -> None:
        """Copy a contiguous tensor out; the caller may let go of it."""
        if self._stream is None:
            self._stack.append((tensor, tensor.shape, tensor.dtype))
            return
        size = tensor.numel() * tensor.element_size()
        buffer = self._buffer(size)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer[:size].copy_(tensor.view(-1).view(torch.uint8), non_blocking=True)
        tensor.record_stream(self._stream)
        self._stack.append((buffer, tensor.shape, tensor.dtype))

    def take(self) -> Tensor:
        """What was put last, on the device; what was put before it begins to come."""
        if self._stream is None:
            return self._stack.pop()[0]
        tensor, done = self._coming if self._coming is not None else self._fetch()
        self._coming = self._fetch() if self._stack else None
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        tensor.record_stream(current)
        return tensor

    def _fetch(self) -> tuple[Tensor, Any]:
        buffer, shape, dtype = self._stack.pop()
        with torch.cuda.stream(self._stream):  # in order with the copies out: a buffer is whole before it is read
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
            tensor.view(-1).view(torch.uint8).copy_(buffer[: tensor.numel() * tensor.element_size()], non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        self._free.append(buffer)  # the same stream writes to it next
        return tensor, done

    def _buffer(self, size: int) -> Tensor:
        fitting = [i for i, buffer in enumerate(self._free) if buffer.numel() >= size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))
        if self._free:  # too small for what comes now: it would only take room beside its successor
            self._free.remove(min(self._free, key=Tensor.numel))
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
