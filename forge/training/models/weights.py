"""A safetensors checkpoint on disk, read by its headers: which tensor lies where, without loading any.

Format: 8 bytes little-endian header length, a JSON header, the tensors' bytes
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from forge.training.system.errors import DataError
from forge.training.system.files import read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # torch's names
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: the upper half of a float32
_STRETCH_ELEMENTS = 1 << 22
_STRETCH_BYTES = 16 << 20


@dataclass(frozen=True)
class Tensor:
    """One tensor's place: ``begin`` and ``end`` are byte offsets in its file."""

    name: str
    dtype: str  # as safetensors spells it: F32, BF16, ...
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One file, its tensors in the order of their bytes; ``preamble_bytes`` is what precedes them."""

    path: Path
    num_bytes: int
    preamble_bytes: int
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class ModelWeights:
    """All weight files of a model directory and its config.json."""

    directory: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def file_of(self, tensor: Tensor) -> Path:
        """The file that holds a tensor."""
        return next(shard.path for shard in self.shards if tensor in shard.tensors)

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output layer shares the embedding's weights."""
        default = "lm_head.weight" not in self.tensors
        return bool(self.config.get("tie_word_embeddings", default))


def read_weights(directory: Path) -> ModelWeights:
    """Read the headers of a model directory. Raises :class:`DataError` if it is incomplete or not safetensors."""
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory", remedy="name the base model's directory")
    config = read_json_object(directory / "config.json")
    index_path = directory / INDEX
    if index_path.is_file():
        weight_map = read_json_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DataError(f"{index_path} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if strange:
            raise DataError(f"{index_path} names files that are not weights of this directory: {strange[:3]}")
    elif (directory / SINGLE).is_file():
        weight_map, names = None, [SINGLE]
    else:
        raise DataError(f"{directory} holds no {SINGLE} and no {INDEX}", remedy="only safetensors weights are read")
    shards = tuple(read_shard(directory / name) for name in names)
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    if weight_map is not None and set(weight_map) != set(tensors):
        differing = sorted(set(weight_map) ^ set(tensors))
        raise DataError(f"{index_path} and its shards disagree on {len(differing)} tensors, such as {differing[0]}")
    return ModelWeights(directory=directory, config=config, shards=shards, tensors=tensors)


def read_shard(path: Path) -> Shard:
    """Read one file's header, checked against its size. Raises :class:`DataError`."""
    try:
        num_bytes = path.stat().st_size
        with open(path, "rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            if header_bytes > min(_MAX_HEADER_BYTES, num_bytes - 8):
                raise DataError(f"{path} is not a complete safetensors file: its header does not fit")
            header = json.loads(stream.read(header_bytes))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing", remedy="copy the model again; a shard is absent") from error
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise DataError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise DataError(f"{path} is not a safetensors file: its header is a {type(header).__name__}")
    preamble = 8 + header_bytes
    tensors = sorted(_read_entries(path, header, preamble), key=lambda tensor: (tensor.begin, tensor.end))
    position = preamble
    for tensor in tensors:
        if tensor.begin != position:
            raise DataError(f"{path}: the bytes of {tensor.name} do not follow the tensor before it")
        position = tensor.end
    if position != num_bytes:
        raise DataError(f"{path} has {num_bytes:,} bytes where its header says {position:,}", remedy="copy it again")
    return Shard(path=path, num_bytes=num_bytes, preamble_bytes=preamble, tensors=tuple(tensors))


def _read_entries(path: Path, header: dict[str, Any], preamble: int) -> list[Tensor]:
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            (begin, end), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: the header's entry for {name:.200} is not understood") from error
        if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)) or begin > end:
            raise DataError(f"{path}: the header's entry for {name:.200} has impossible numbers")
        if not isinstance(dtype, str):
            raise DataError(f"{path}: the header's entry for {name:.200} has no data type")
        size = DTYPE_BYTES.get(dtype)
        if size is not None and math.prod(shape) * size != end - begin:
            raise DataError(f"{path}: {name:.200} has {end - begin} bytes, which is not {dtype} of {shape}")
        tensors.append(Tensor(name, dtype, shape, preamble + begin, preamble + end))
    return tensors


def read_exactly(source: IO[bytes], num_bytes: int) -> bytes:
    """So many bytes of an open file. Raises :class:`DataError` where it ends before."""
    raw = source.read(num_bytes)
    if len(raw) != num_bytes:
        raise DataError(f"{source.name} became shorter while it was read")
    return raw


def read_tensor(source: IO[bytes], tensor: Tensor) -> Any:
    """A 16- or 32-bit tensor (torch, CPU) from its open file, which is left at the tensor's end."""
    import torch

    source.seek(tensor.begin)
    raw = bytearray(tensor.end - tensor.begin)
    if source.readinto(raw) != len(raw):  # type: ignore[attr-defined]
        raise DataError(f"{source.name} became shorter while it was read")
    return torch.frombuffer(raw, dtype=getattr(torch, FLOAT_DTYPES[tensor.dtype])).view(tensor.shape)


def read_whole(source: IO[bytes], shard: Shard) -> Iterator[tuple[Tensor | None, bytes]]:
    """Every byte of an open file in order, in stretches of at most 16 MiB, with the tensor that they belong to.

    ``None``: the header. Raises :class:`DataError` where the file ends before.
    """
    source.seek(0)
    for tensor, begin, end in [(None, 0, shard.preamble_bytes), *((t, t.begin, t.end) for t in shard.tensors)]:
        for at in range(begin, end, _STRETCH_BYTES):
            yield tensor, read_exactly(source, min(_STRETCH_BYTES, end - at))


def largest_magnitude(raw: bytes, dtype: str) -> float:
    """The largest absolute value among stored floats, NaN where there is one; 0 for other data types.

    Without the sign, floats are ordered as the whole numbers of the same bits, and NaN comes last.
    """
    if dtype not in FLOAT_DTYPES or not raw:
        return 0.0
    wide = dtype == "F32"
    bits = np.frombuffer(raw, dtype="<u4" if wide else "<u2") & (0x7FFFFFFF if wide else 0x7FFF)
    largest = int(bits.max())
    if dtype == "F16":
        return float(np.uint16(largest).view(np.float16))
    return float(np.uint32(largest if wide else largest << 16).view(np.float32))


def read_float_values(source: IO[bytes], tensor: Tensor) -> Iterator[np.ndarray]:
    """A 16- or 32-bit tensor's values in order, as float32 or float16 arrays of at most 4 million, without torch."""
    stored = np.dtype(_STORED[tensor.dtype])
    for begin in range(tensor.begin, tensor.end, _STRETCH_ELEMENTS * stored.itemsize):
        source.seek(begin)
        raw = read_exactly(source, min(_STRETCH_ELEMENTS * stored.itemsize, tensor.end - begin))
        values = np.frombuffer(raw, dtype=stored)
        yield (values.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else values
