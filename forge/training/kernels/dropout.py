"""LoRA dropout by counter: a mask is a function of seed, step, document, position, module and channel.

Nothing is stored and nothing is drawn in an order, so a recomputation, a resumed run and every layout of the same
documents have the same masks. All arithmetic is modulo 2**32::

    token key   = mix32(document key + mix32(position * ODD))       once per example
    row key     = mix32(token key + word of (seed, step))           once per micro-batch
    column key  = mix32(module key + mix32(channel * ODD))          once per column
    hash        = scramble(row key + column key)                    each element; kept where hash / 2 >= threshold

scramble is mix32 without its last step, which leaves the upper 16 bits alone; those decide but for one in 65,536.

Position and channel are mixed before the sum: otherwise two documents (or modules) whose keys differ by a multiple of
ODD would have the same masks, shifted by some positions (or channels). Keys have 32 bits: among 100,000 tokens of a
step one pair has the same mask by chance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

# mix32 is "lowbias32" (C. Wellons, Prospecting for hash functions): two multiplications, avalanche bias 0.17 in 1,000.
# gpu.py computes the same with these same constants.
MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B
ODD = 0x9E3779B1

Keys = npt.NDArray[np.int32]


def document_key(ids: npt.NDArray[np.integer]) -> int:
    """32 bits from a document's token ids."""
    return _word(np.ascontiguousarray(ids, dtype="<i8").tobytes())


def token_keys(documents: Sequence[Sequence[int]]) -> Keys:
    """Keys of documents' tokens laid end to end, shape (tokens,)."""
    return _keys([(document, len(document)) for document in documents])


def padded_token_keys(documents: Sequence[Sequence[int]], width: int) -> Keys:
    """Keys of documents padded on the right to ``width`` tokens, shape (documents * width,).

    Padding has the keys of the positions that follow. Raises ValueError where a document is longer than ``width``.
    """
    longest = max(map(len, documents), default=0)
    if longest > width:
        raise ValueError(f"a document of {longest} tokens does not fit into rows of {width}")
    return _keys([(document, width) for document in documents])


def step_keys(keys: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Row keys of one optimizer step, int32 (tokens,), on the device of the token ``keys``."""
    word = _signed(_word(f"{seed} {step}".encode()))
    if keys.is_cuda:
        from forge.training.kernels import gpu

        return gpu.step_keys(keys, word)
    return _mix32_(keys + word)


def module_key(name: str) -> int:
    """31 bits from a module's name, for instance ``model.layers.3.mlp.up_proj``."""
    return _word(name.encode()) >> 1


def threshold(p: float) -> int:
    """The 31-bit number below which an element is dropped. Raises ValueError unless 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"a dropout rate is at least 0 and below 1, not {p}")
    return round(p * 2**31)


def keep_mask(rows: torch.Tensor, module: int, num_channels: int, p: float) -> torch.Tensor:
    """Which elements are kept, bool (tokens, num_channels), for row keys int32 (tokens,). The kernels equal it."""
    channels = torch.arange(num_channels, dtype=torch.int32, device=rows.device)
    columns = _mix32_(_mix32_(channels * _signed(ODD)) + module)
    hashes = _scramble_(rows[:, None] + columns[None, :])
    return hashes.bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF) >= threshold(p)


def _keys(documents: Sequence[tuple[Sequence[int], int]]) -> Keys:
    if not documents:
        return np.zeros(0, np.int32)
    longest = max(length for _, length in documents)
    positions = _mix32(np.arange(longest, dtype=np.uint32) * np.uint32(ODD))
    keys = [_mix32(positions[:length] + np.uint32(document_key(np.asarray(ids)))) for ids, length in documents]
    return np.concatenate(keys).view(np.int32)


def _word(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "little")


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _mix32(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(MULTIPLIER_1)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(MULTIPLIER_2)
    return x ^ (x >> np.uint32(16))


def _mix32_(x: torch.Tensor) -> torch.Tensor:
    _scramble_(x)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _scramble_(x: torch.Tensor) -> torch.Tensor:
    """In place, on int32: torch's shift keeps the sign, so what it brings in is masked."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(MULTIPLIER_1))
    return x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(MULTIPLIER_2))
