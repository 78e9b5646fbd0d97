"""GGUF files: made by llama.cpp's converter, quantised by its library, verified before anyone uses them.

Every function here works through a child process and writes beside the target, which appears
under its name only when complete.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

from forge.training.adapter.lora import check_adapter, write_canonical_adapter
from forge.training.config.quantizations import QUANTIZED, Quantization
from forge.training.export.proven import FileProof
from forge.training.llamacpp.parent import Answer, Progress, run_child, time_limit_seconds
from forge.training.models.base import refuse_unsafe_files
from forge.training.system.errors import CheckError, ConfigurationError, DataError
from forge.training.system.files import disk_errors, refuse_existing, sha256_file

SECONDS_PER_TOKEN = 5.0  # a limit: a 7B model in 16 bits on two cores
_HEADER = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of metadata entries
_VERSIONS = (2, 3)
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, dimensions, one extent, type, offset
_MIN_ENTRY_BYTES = 8 + 4 + 1  # key length, value type, one byte


@dataclass(frozen=True)
class GgufReport:
    """What a verified file holds. ``fallbacks``: tensors that could not take the file's type."""

    name: str
    num_bytes: int
    sha256: str
    architecture: str
    file_type: str
    num_tensors: int
    tensor_types: dict[str, int]
    fallbacks: list[str]
    pre_tokenizer: str | None
    num_vocabulary_tokens: int | None
    has_chat_template: bool
    proof: FileProof | None = None  # None: verified only, as an earlier Forge did


def convert_to_gguf(
    model_dir: Path,
    out: Path,
    outtype: Quantization = "f16",
    *,
    model_name: str | None = None,
    chat_template: str | None = None,
    force: bool = False,
) -> Answer:
    """Convert a Hugging Face directory (safetensors, tokenizer) with llama.cpp's own converter.

    ``chat_template``: the one that was trained, where the converter would choose another of the directory's.
    Raises :class:`CheckError` if the converter refuses the model, :class:`DiskError`.
    """
    _require_files(model_dir, "config.json", "tokenizer.json")
    refuse_unsafe_files(model_dir)
    num_bytes = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    if not num_bytes:  # the converter would write a file without tensors and report success
        raise DataError(f"{model_dir} holds no *.safetensors")
    with _partial(out, force) as partial:
        return run_child(
            "convert",
            {
                "model_dir": str(model_dir.absolute()),
                "target": str(partial),
                "outtype": outtype,
                "model_name": model_name or out.stem,
                "chat_template": chat_template,
            },
            doing=f"convert {model_dir} to GGUF",
            limit_seconds=time_limit_seconds(num_bytes),
        )


def convert_lora_to_gguf(adapter_dir: Path, base_dir: Path, out: Path) -> Answer:
    """Convert a PEFT adapter, rewritten first so that llama.cpp's only scale, alpha / rank, is PEFT's.

    Raises :class:`DataError` for what a GGUF adapter cannot carry, :class:`CheckError`, :class:`DiskError`.
    """
    _require_files(base_dir, "config.json")
    refuse_unsafe_files(base_dir)
    check_adapter(adapter_dir, base_dir)
    with _partial(out, force=False) as partial:
        canonical = partial.parent / "adapter"
        write_canonical_adapter(adapter_dir, base_dir, canonical)
        return run_child(
            "convert_lora",
            {"adapter_dir": str(canonical), "base_dir": str(base_dir.absolute()), "target": str(partial)},
            doing=f"convert the adapter {adapter_dir} to GGUF",
            limit_seconds=time_limit_seconds((canonical / "adapter_model.safetensors").stat().st_size),
        )


def quantize(
    source: Path, target: Path, quantization: Quantization, *, imatrix: Path | None = None, force: bool = False
) -> Answer:
    """Quantise a 16- or 32-bit GGUF file. Which tensors fell back to another type, :func:`verify_gguf` tells.

    ``imatrix``: an importance matrix that :func:`collect_importance` wrote.

    Raises :class:`ConfigurationError`, :class:`CheckError` with llama.cpp's reason, :class:`DiskError`.
    """
    if quantization not in QUANTIZED:
        raise ConfigurationError(f"unknown quantisation {quantization!r}", remedy=f"one of {', '.join(QUANTIZED)}")
    if os.path.realpath(source) == os.path.realpath(target):  # llama.cpp dies of SIGBUS and destroys the file
        raise ConfigurationError(f"source and target of the quantisation are the same file: {source}")
    check_header(source)
    with _partial(target, force) as partial:
        return run_child(
            "quantize",
            {
                "source": str(source.absolute()),
                "target": str(partial),
                "quantization": quantization,
                "imatrix": str(imatrix.absolute()) if imatrix else None,
            },
            doing=f"quantise {source} to {quantization}",
            limit_seconds=time_limit_seconds(4 * source.stat().st_size),  # 15 MB/s on two busy cores
            memory_limit_bytes=memory_limit_bytes(source.stat().st_size),
        )


def collect_importance(
    source: Path, target: Path, sequences: list[list[int]], progress: Progress | None = None
) -> Answer:
    """Evaluate sequences of ids with a 16- or 32-bit file and write what its quantisation shall weigh to ``target``.

    Raises :class:`CheckError`, :class:`DataError`.
    """
    num_bytes, num_tokens = source.stat().st_size, sum(map(len, sequences))
    return run_child(
        "collect_importance",
        {"path": str(source.absolute()), "target": str(target.absolute()), "sequences": sequences},
        doing=f"collect an importance matrix with {source}",
        limit_seconds=time_limit_seconds(num_bytes) + SECONDS_PER_TOKEN * num_tokens,
        memory_limit_bytes=memory_limit_bytes(num_bytes),
        progress=progress,
    )


def check_header(path: Path) -> None:
    """Refuse what is not a GGUF file, or claims more entries than fit, before any parser sees it.

    A 49-byte file with a huge count kept a parser busy for ever. Raises :class:`CheckError`,
    :class:`DataError` if there is no such file.
    """
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"cannot read {path}: {'not a file' if path.exists() else 'No such file'}")
    try:
        with open(path, "rb") as stream:
            header = stream.read(_HEADER.size)
            num_bytes = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if header[:4] != b"GGUF":
        raise CheckError(f"{path} is not a GGUF file: it begins with {header[:4]!r}")
    if len(header) < _HEADER.size:
        raise CheckError(f"{path} is cut off: {num_bytes} bytes")
    _, version, num_tensors, num_entries = _HEADER.unpack(header)
    if version not in _VERSIONS:
        raise CheckError(f"{path} has GGUF version {version}; {_VERSIONS[0]} and {_VERSIONS[1]} can be read")
    if num_tensors * _MIN_TENSOR_BYTES + num_entries * _MIN_ENTRY_BYTES > num_bytes - _HEADER.size:
        claim = f"{num_tensors:,} tensors and {num_entries:,} metadata entries"
        raise CheckError(f"{path} claims {claim}, which do not fit into its {num_bytes:,} bytes")


def verify_gguf(path: Path, *, adapter: bool = False, base: Path | None = None) -> GgufReport:
    """Check a file before it is handed out: header, structure, tokenizer, every value, one token evaluated.

    An adapter's values are checked by applying it to ``base``, a GGUF model, where one is given.
    Raises :class:`CheckError` saying what is wrong; never crashes or hangs with the file.
    """
    return measure_verification(path, adapter=adapter, base=base)[0]


def measure_verification(path: Path, *, adapter: bool = False, base: Path | None = None) -> tuple[GgufReport, Answer]:
    """:func:`verify_gguf`, and what it cost."""
    check_header(path)
    num_bytes = path.stat().st_size
    if base is not None:
        check_header(base)
        num_bytes += base.stat().st_size
    started, digest = time.monotonic(), _digest_meanwhile(path)
    answer = run_child(
        "verify",
        {"path": str(path.absolute()), "adapter": adapter, "base": str(base.absolute()) if base else None},
        doing=f"verify {path}",
        limit_seconds=time_limit_seconds(num_bytes),
        memory_limit_bytes=memory_limit_bytes(num_bytes),
    )
    report = GgufReport(name=path.name, num_bytes=path.stat().st_size, sha256=digest.result(), **answer.value)
    return report, replace(answer, seconds=time.monotonic() - started)


def _digest_meanwhile(path: Path) -> Future[str]:
    """A file's SHA-256, found while the child works: hashlib releases the interpreter's lock."""
    digest: Future[str] = Future()

    def find() -> None:
        try:
            digest.set_result(sha256_file(path))
        except OSError as error:
            digest.set_exception(DataError(f"cannot read {path} to its end: {error.strerror}"))

    Thread(target=find, daemon=True).start()  # an interrupted export ends at once, not after 15 GB
    return digest


def memory_limit_bytes(num_bytes: int) -> int:
    """Address space for loading a file: mapped, repacked for the CPU, and what threads reserve."""
    return (16 << 30) + 4 * num_bytes


def _require_files(directory: Path, *names: str) -> None:
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise DataError(f"{directory} lacks {', '.join(missing)}", remedy="name a complete model directory")


@contextmanager
def _partial(target: Path, force: bool) -> Iterator[Path]:
    """A name beside the target for a child to write; it takes the target's name if the block ends well."""
    refuse_existing(target, force)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=target.parent.absolute(), prefix=f".{target.name}.", suffix=".part"
        ) as folder:
            partial = Path(folder) / "model.gguf"
            yield partial
            if not partial.is_file():
                raise CheckError(f"{target} was not written, although llama.cpp reports success")
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, target)
