"""Merging an adapter into its base: W + scale * B @ A, tensor by tensor, without loading a model.

Each output shard has its input's header, byte for byte, so layout, names and data types stay;
tensors that the adapter does not change are copied as bytes. Memory needed is a few copies of
the largest changed tensor, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from forge.training.adapter.adapter_config import read_adapter_config
from forge.training.adapter.lora import WEIGHTS, Adapter, Factors, inspect_adapter
from forge.training.adapter.provenance import require_own_base
from forge.training.models.weights import (
    FLOAT_DTYPES,
    INDEX,
    ModelWeights,
    Shard,
    Tensor,
    read_exactly,
    read_tensor,
    read_weights,
)
from forge.training.system.errors import DataError
from forge.training.system.files import (
    read_json_object,
    require_free_bytes,
    sha256_file,
    sha256_json,
    staged_directory,
    write_json,
)
from forge.training.system.oom import memory_errors

RECORD = "merge.json"
_COPY_BYTES = 16 << 20

# What a model directory needs beside its weights; weights of other formats are never taken along.
_COMPANIONS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    *("LICENSE", "LICENSE.txt", "NOTICE", INDEX),
)


@dataclass(frozen=True)
class MergeRecord:
    """What a merge did. Norms are Frobenius norms over all changed tensors together.

    ``adapter_config_sha256`` is over what the adapter's configuration says of the mathematics;
    ``rounding_norm`` is the part of the change that the weights' own data type could not hold;
    ``largest_changed_weight`` is the largest absolute value among the tensors that it changed;
    ``merged_sha256`` identifies the merged weights as ``base_sha256`` does the base's: it is what
    :func:`forge.training.models.digests.base_sha256` says of ``out_dir``.
    """

    adapter_sha256: str
    adapter_config_sha256: str
    base_sha256: str | None
    merged_sha256: str
    shard_sha256: dict[str, str]
    num_changed_tensors: int
    num_copied_tensors: int
    num_bytes: int
    delta_norm: float
    rounding_norm: float
    device: str
    largest_changed_weight: float | None = None  # None: merged by an earlier Forge


def merge_adapter(
    base_dir: Path | str,
    adapter_dir: Path | str,
    out_dir: Path | str,
    *,
    force: bool = False,
    expected_base_sha256: str | None = None,
    device: str = "auto",
    in_float32: bool = False,
    progress: Callable[[str], None] | None = None,
) -> MergeRecord:
    """Merge a LoRA adapter into the original weights of its base and write a complete model directory.

    ``device`` is where the products are computed: ``auto`` is CUDA where there is one. Sums are in
    float32, rounded once to the weight's own type; ``in_float32`` keeps them: every float of the model is then stored
    in float32, twice the size of a 16-bit base. ``expected_base_sha256`` is what training saw.
    Raises :class:`DataError` if base and adapter do not belong together or the adapter cannot be
    merged (see :mod:`~forge.training.adapter.lora`), :class:`DiskError`. Nothing is left behind then.
    """
    import torch

    base_dir, adapter_dir, out_dir = Path(base_dir), Path(adapter_dir), Path(out_dir)
    base = read_weights(base_dir)
    _check_base(base, expected_base_sha256)
    adapter = inspect_adapter(adapter_dir, base)
    for name in adapter.factors:
        if base.tensors[name].dtype not in FLOAT_DTYPES:
            raise DataError(f"{base_dir}: {name} is {base.tensors[name].dtype}; only 16- and 32-bit weights are merged")
    num_bytes = float32_bytes(base) if in_float32 else base.num_bytes
    what = "the merge in float32" if in_float32 else "the merge"
    require_free_bytes(out_dir.absolute().parent, num_bytes, what, "free space, or choose another place")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    merger = _Merger(adapter, device, in_float32)
    with staged_directory(out_dir, force=force) as staging, memory_errors("the merge"):
        for name in _COMPANIONS:
            if (base_dir / name).is_file():
                shutil.copyfile(base_dir / name, staging / name)
        if in_float32:
            write_json(staging / "config.json", {**base.config, "torch_dtype": "float32"})
        digests = {}
        for number, shard in enumerate(base.shards, start=1):
            if progress is not None:
                progress(f"merge: file {number} of {len(base.shards)}, {shard.num_bytes / 1e9:.2f} GB")
            digests[shard.path.name] = merger.write_shard(shard, staging / shard.path.name)
        if merger.without_effect:
            raise DataError(
                f"{adapter_dir} has no effect on {merger.without_effect[0]} ({len(merger.without_effect)} of "
                f"{len(adapter.factors)} tensors): its change is lost in the rounding to the base's data type",
                remedy="train longer, or with a higher learning rate",
            )
        record = MergeRecord(
            adapter_sha256=sha256_file(adapter_dir / WEIGHTS),
            adapter_config_sha256=adapter.config.digest(),
            base_sha256=expected_base_sha256,
            merged_sha256=sha256_json(digests),
            shard_sha256=digests,
            num_changed_tensors=len(adapter.factors),
            num_copied_tensors=len(base.tensors) - len(adapter.factors),
            num_bytes=num_bytes,
            delta_norm=math.sqrt(merger.delta_squares),
            rounding_norm=math.sqrt(merger.rounding_squares),
            device=merger.device,
            largest_changed_weight=merger.largest,
        )
        write_json(staging / RECORD, asdict(record))
    return record


def float32_bytes(base: ModelWeights) -> int:
    """Bytes of a model's weights with every float in float32."""
    wide = sum(4 * math.prod(t.shape) for t in base.tensors.values() if t.dtype in FLOAT_DTYPES)
    return wide + sum(t.end - t.begin for t in base.tensors.values() if t.dtype not in FLOAT_DTYPES)


def usable_merge(
    directory: Path, base_dir: Path, adapter_dir: Path, expected_base_sha256: str
) -> dict[str, Any] | None:
    """The record of a merge made before if it is of this base and this adapter, and unchanged since; else ``None``.

    Unchanged: every weight by its digest, and every file beside them is the base's. Raises :class:`DataError`
    for an invalid record.
    """
    if not (directory / RECORD).is_file():
        return None
    record = read_json_object(directory / RECORD)
    made_of = {
        "base_sha256": expected_base_sha256,
        "adapter_sha256": sha256_file(adapter_dir / WEIGHTS),
        "adapter_config_sha256": read_adapter_config(adapter_dir).digest(),
    }
    digests = record.get("shard_sha256")
    if any(record.get(key) != value for key, value in made_of.items()) or not isinstance(digests, dict):
        return None
    same = sorted(path.name for path in directory.glob("*.safetensors")) == sorted(digests)
    same = same and all(_same_file(base_dir / name, directory / name) for name in _COMPANIONS)
    same = same and all(sha256_file(directory / name) == digest for name, digest in digests.items())
    return record if same and record.get("merged_sha256") == sha256_json(digests) else None


def _same_file(wanted: Path, present: Path) -> bool:
    if not wanted.is_file() or not present.is_file():
        return wanted.is_file() == present.is_file()
    return wanted.read_bytes() == present.read_bytes()


def _check_base(base: ModelWeights, expected_sha256: str | None) -> None:
    if base.config.get("quantization_config"):
        raise DataError(
            f"{base.directory} is quantised; merging into quantised weights would lose what was learned",
            remedy="name the original 16-bit model of the same name",
        )
    if expected_sha256 is not None:
        require_own_base(base.directory, expected_sha256)


class _Merger:
    """Writes merged shards and adds up what the merge changed."""

    def __init__(self, adapter: Adapter, device: str, in_float32: bool) -> None:
        self.adapter = adapter
        self.device = device
        self.in_float32 = in_float32
        self.without_effect: list[str] = []
        self.delta_squares = 0.0
        self.rounding_squares = 0.0
        self.largest = 0.0

    def write_shard(self, shard: Shard, target: Path) -> str:
        """Write one merged file and return its SHA-256."""
        digest = hashlib.sha256()
        with open(shard.path, "rb") as source, open(target, "wb") as out:

            def write(data: Any) -> None:
                digest.update(data)
                out.write(data)

            if self.in_float32:
                write(_float32_preamble(shard))
                source.seek(shard.preamble_bytes)
            else:
                _copy(source, shard.preamble_bytes, write)
            for tensor in shard.tensors:
                factors = self.adapter.factors.get(tensor.name)
                if factors is None and self.in_float32 and tensor.dtype in FLOAT_DTYPES:
                    write(_bytes_of(read_tensor(source, tensor).float()))
                elif factors is None:
                    _copy(source, tensor.end - tensor.begin, write)
                else:
                    write(self._merge(source, tensor, factors))
        return digest.hexdigest()

    def _merge(self, source: IO[bytes], tensor: Tensor, factors: Factors) -> Any:
        import torch

        original = read_tensor(source, tensor).to(self.device)
        a, b = (values.to(self.device, torch.float32) for values in self.adapter.read(factors))
        delta = (b @ a).mul_(factors.scale)
        exact = original.float() + delta  # never in place: a float32 weight is its own .float()
        merged = exact if self.in_float32 else exact.to(original.dtype)
        if not bool(merged.isfinite().all()):
            raise DataError(f"{tensor.name} is not finite after the merge: NaN, or beyond the range of {tensor.dtype}")
        if torch.equal(merged, original.to(merged.dtype)):
            self.without_effect.append(tensor.name)
        self.largest = max(self.largest, float(merged.abs().max()))
        self.delta_squares += _square_sum(delta)
        self.rounding_squares += _square_sum(exact - merged)
        return _bytes_of(merged)


def _bytes_of(tensor: Any) -> Any:
    import torch

    return tensor.cpu().contiguous().view(torch.uint8).numpy().data


def _float32_preamble(shard: Shard) -> bytes:
    """The header of a file with the same tensors in the same order, every float in float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in shard.tensors:
        is_float = tensor.dtype in FLOAT_DTYPES
        size = 4 * math.prod(tensor.shape) if is_float else tensor.end - tensor.begin
        dtype = "F32" if is_float else tensor.dtype
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _square_sum(tensor: Any) -> float:
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _copy(source: IO[bytes], num_bytes: int, write: Callable[[bytes], None]) -> None:
    for begin in range(0, num_bytes, _COPY_BYTES):
        write(read_exactly(source, min(_COPY_BYTES, num_bytes - begin)))
