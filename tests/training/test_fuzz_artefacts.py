"""Fuzzed adapters and GGUF files: whatever they hold, one readable error or none, soon, and the parent lives on.

Adapters are parsed by the project's own reader, mostly in this process and some in the child process that the product
uses; GGUF files by llama.cpp's reader and loader, in the product's child, which takes one file after another.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from forge.training.adapter.lora import inspect_adapter
from forge.training.export.gguf import check_header, convert_lora_to_gguf, memory_limit_bytes
from forge.training.llamacpp.parent import Child
from forge.training.models.weights import ModelWeights, read_weights
from forge.training.system.errors import CheckError, DataError, ForgeError
from tests.support.tiny_model import gguf_file, scratch, shared_adapter, shared_base

QUICK = settings(max_examples=60, suppress_health_check=list(HealthCheck))
THOROUGH = settings(max_examples=1500, suppress_health_check=list(HealthCheck))
_LIMIT_SECONDS = 20.0
_LARGEST = 2**64 - 1

NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 7, 8, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, _LARGEST]),
    st.integers(0, 5000),
)
NUDGES = st.integers(-5, -1)  # for put(): by -2 to 2
LEAVES: SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["LORA", "none", "q_proj", ".*", "(", "a{9999999999}", "[", "(?i)x", "all-linear", "\ud800", ""]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
)


@pytest.fixture(scope="module", autouse=True)
def _made_before() -> None:
    """Good parts are made before hypothesis draws: training a model uses random numbers of its own."""
    base(), good_adapter(), layout()


# Adapters


@cache
def base() -> ModelWeights:
    return read_weights(shared_base())


@cache
def good_adapter() -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Configuration, header of the weights and the bytes behind it."""
    raw = (shared_adapter() / "adapter_model.safetensors").read_bytes()
    (num_bytes,) = struct.unpack_from("<Q", raw)
    config = json.loads((shared_adapter() / "adapter_config.json").read_text())
    return config, json.loads(raw[8 : 8 + num_bytes]), raw[8 + num_bytes :]


def write_adapter(directory: Path, config: bytes, header: bytes, data: bytes, length: int | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_bytes(config)
    num_bytes = len(header) if length is None else length
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", num_bytes) + header + data)
    return directory


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


@st.composite
def adapters(draw: DrawFn) -> tuple[bytes, bytes, bytes, int | None]:
    """A good adapter with one to three things wrong, or right after all: fields, entries, numbers, bytes, lengths."""
    config, header, data = (copy.deepcopy(part) for part in good_adapter())
    length = None
    raw_config, raw_header = b"", b""
    for _ in range(draw(st.integers(1, 3))):
        match draw(st.sampled_from(["config", "config", "entry", "entry", "key", "bytes", "cut", "length", "garbage"])):
            case "config":
                config[draw(st.sampled_from([*config, "use_dora", "bias", "more"]))] = draw(VALUES)
            case "entry":
                name = draw(st.sampled_from(sorted(header)))
                if isinstance(header[name], dict) and draw(st.booleans()):
                    header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(
                        st.one_of(VALUES, st.lists(NUMBERS, max_size=4), st.sampled_from(["F16", "F64", "I64", "F8"]))
                    )
                else:
                    header[name] = draw(VALUES)
            case "key":
                name = draw(st.sampled_from(sorted(header)))
                header[draw(st.one_of(st.text(max_size=30), st.just(name.replace("lora_A", "lora_B"))))] = header.pop(
                    name
                )
            case "bytes":
                changed = bytearray(data)
                for _ in range(draw(st.integers(1, 8))):
                    changed[draw(st.integers(0, len(changed) - 1))] = draw(st.sampled_from([0, 127, 128, 255]))
                data = bytes(changed)
            case "cut":
                data = data[: draw(st.integers(0, len(data) - 1))]
                if not data:
                    data = b"\0"
            case "length":
                length = draw(NUMBERS)
            case "garbage":
                raw_header = draw(st.binary(max_size=60))
                raw_config = draw(st.sampled_from([b"", b"[" * 100_000, b'{"r":' * 5000, b"\xff\xfe", b"[]", b"1"]))
    return raw_config or encoded(config), raw_header or encoded(header), Spoiled(data), length


def is_one_error(error: ForgeError) -> None:
    event(re.sub(r"\d[\d,]*|'.*?'", "N", " ".join(w for w in error.message.split()[:14] if "/" not in w))[:60])
    assert isinstance(error, DataError | CheckError)
    assert error.message.strip()
    assert len(error.message) < 8000
    assert " failed: " not in error.message, "the child did not expect it"


def inspects(parts: tuple[bytes, bytes, bytes, int | None]) -> None:
    directory = write_adapter(scratch() / "fuzzed-adapter", *parts)
    try:
        found = inspect_adapter(directory, base())
    except DataError as error:
        is_one_error(error)
    else:  # then nothing of the mathematics was lost: every factor is of the base's shape and its scale a number
        assert found.factors
        for name, factors in found.factors.items():
            assert (factors.b.shape[0], factors.a.shape[1]) == base().tensors[name].shape
            assert 0 < factors.scale < float("inf")


@given(adapters())
@QUICK
def test_a_fuzzed_adapter_is_read_or_is_one_error(parts: tuple[bytes, bytes, bytes, int | None]) -> None:
    inspects(parts)


@pytest.mark.slow
@given(adapters())
@THOROUGH
def test_many_fuzzed_adapters_are_read_or_are_one_error(parts: tuple[bytes, bytes, bytes, int | None]) -> None:
    inspects(parts)


# In the product's own child process


class Survivor:
    """A child process that takes one request after another and is started anew when one has killed it."""

    def __init__(self, memory_limit: int) -> None:
        self._memory_limit, self._child = memory_limit, None
        self.num_deaths = 0

    def ask(self, task: str, **arguments: Any) -> dict[str, Any] | ForgeError:
        if self._child is None:
            self._child = Child(memory_limit_bytes=self._memory_limit)
            self._child.__enter__()
        started = time.monotonic()
        try:
            return self._child.ask(task, arguments, doing=task, limit_seconds=_LIMIT_SECONDS).value
        except ForgeError as error:
            if "child process" in error.message or "no answer" in error.message:
                self.num_deaths += 1
                self.close()
            return error
        finally:
            assert time.monotonic() - started < _LIMIT_SECONDS + 5

    def close(self) -> None:
        if self._child is not None:
            self._child.__exit__()
        self._child = None


@pytest.fixture(scope="module")
def child() -> Iterator[Survivor]:
    made = Survivor(memory_limit_bytes(4 << 20))
    yield made
    made.close()


@pytest.mark.slow
@given(adapters())
@settings(THOROUGH, max_examples=400)
def test_fuzzed_adapters_in_the_child_are_read_or_are_one_error(
    child: Survivor, parts: tuple[bytes, bytes, bytes, int | None]
) -> None:
    directory = write_adapter(scratch() / "fuzzed-adapter", *parts)
    found = child.ask("check_adapter", adapter_dir=str(directory), base_dir=str(shared_base()))
    if isinstance(found, ForgeError):
        is_one_error(found)


# GGUF


class Layout:
    """Where things lie in the good file: what a parser reads before it has checked anything."""

    def __init__(self, content: bytes) -> None:
        from forge.training.llamacpp.native import import_gguf

        path = scratch() / "layout.gguf"
        path.write_bytes(content)
        reader = import_gguf().GGUFReader(path)
        self.content = content
        self.data_offset = int(reader.data_offset)
        self.entries = [
            (int(field.offset), len(name.encode())) for name, field in reader.fields.items() if field.offset > 20
        ]
        self.infos = [(int(tensor.field.offset), len(tensor.name.encode())) for tensor in reader.tensors]


@cache
def layout() -> Layout:
    """Of a model."""
    return Layout(gguf_file("q8_0").read_bytes())


@cache
def lora_layout() -> Layout:
    """Of an adapter for it."""
    path = scratch() / "good-lora.gguf"
    convert_lora_to_gguf(shared_adapter(), shared_base(), path)
    return Layout(path.read_bytes())


class Spoiled(bytes):
    """A file's content that a failing test does not print; hypothesis prints how to make it again."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


@st.composite
def gguf_files(draw: DrawFn, of: Callable[[], Layout] = layout) -> bytes:
    """A good file with one to three numbers, types, names or bytes of its header changed, or cut off."""
    good = of()
    content = bytearray(good.content)
    for _ in range(draw(st.integers(1, 3))):
        match draw(st.sampled_from(["counts", "entry", "entry", "info", "info", "bytes", "bytes", "data", "cut"])):
            case "counts":
                struct.pack_into(
                    "<Q", content, draw(st.sampled_from([8, 16])), draw(st.one_of(NUMBERS, st.integers(0, 99)))
                )
            case "entry":
                start, length = draw(st.sampled_from(good.entries))
                where = start + draw(st.sampled_from([0, 8 + length, 8 + length + 4, 8 + length + 8, 8 + length + 16]))
                put(content, where, draw(st.sampled_from("IQ")), draw(st.one_of(NUMBERS, NUDGES)))
            case "info":
                start, length = draw(st.sampled_from(good.infos))
                where = start + draw(
                    st.sampled_from([0, 8 + length, 12 + length, 20 + length, 28 + length, 32 + length])
                )
                put(content, where, draw(st.sampled_from("IQ")), draw(st.one_of(NUMBERS, NUDGES)))
            case "bytes":
                for _ in range(draw(st.integers(1, 6))):
                    content[draw(st.integers(4, good.data_offset - 1)) % len(content)] = draw(st.integers(0, 255))
            case "data":
                content[draw(st.integers(good.data_offset, len(good.content) - 1)) % len(content)] = draw(
                    st.integers(0, 255)
                )
            case "cut":
                del content[draw(st.integers(24, len(good.content) - 1)) :]
    return Spoiled(content)


def put(content: bytearray, where: int, kind: str, value: int) -> None:
    """Write a number, or for a negative one change what is there by as much."""
    size = struct.calcsize(kind)
    if where + size <= len(content):
        (found,) = struct.unpack_from(f"<{kind}", content, where)
        struct.pack_into(f"<{kind}", content, where, (found + value + 3 if value < 0 else value) % 256**size)


def asked(child: Survivor, content: bytes, operation: str, **arguments: Any) -> dict[str, Any] | None:
    """As the product does it: the header looked at here, the rest by llama.cpp in a child process.

    ``None``: the file was refused by one error, here or there.
    """
    path = scratch() / "fuzzed.gguf"
    path.write_bytes(content)
    try:
        check_header(path)
    except CheckError as error:
        is_one_error(error)
        return None
    found = child.ask(operation, path=str(path), **arguments)
    if isinstance(found, ForgeError):
        is_one_error(found)
        return None
    return found


def survives(child: Survivor, content: bytes) -> None:
    found = asked(child, content, "verify", adapter=False, base=None)
    assert found is None or found["num_tensors"] > 0


@given(gguf_files())
@settings(QUICK, max_examples=40)
def test_a_fuzzed_gguf_file_is_verified_or_is_one_error(child: Survivor, content: bytes) -> None:
    survives(child, content)


@pytest.mark.slow
@given(gguf_files())
@THOROUGH
def test_many_fuzzed_gguf_files_are_verified_or_are_one_error(child: Survivor, content: bytes) -> None:
    survives(child, content)


@pytest.mark.slow
@given(gguf_files())
@settings(THOROUGH, max_examples=800)
def test_fuzzed_gguf_files_are_opened_for_chat_or_are_one_error(child: Survivor, content: bytes) -> None:
    """``chat`` opens a file from elsewhere through llama-cpp-python, without looking at its structure before."""
    how = {"lora": None, "context_tokens": 64, "is_insisted": False, "free_bytes": 1 << 30, "gpu_layers": 0}
    asked(child, content, "open_chat", **how)


@pytest.mark.slow
@given(gguf_files(lora_layout))
@settings(THOROUGH, max_examples=400)
def test_fuzzed_gguf_adapters_are_applied_or_are_one_error(child: Survivor, content: bytes) -> None:
    asked(child, content, "verify", adapter=True, base=str(gguf_file("q8_0")))


def test_the_fuzzed_adapter_begins_as_a_good_one() -> None:
    """Else nothing behind the first check would ever be fuzzed."""
    config, header, data = good_adapter()
    directory = write_adapter(scratch() / "good-adapter", encoded(config), encoded(header), data)
    assert len(inspect_adapter(directory, base()).factors) == 14
    shutil.rmtree(directory)


def test_the_fuzzed_file_begins_as_a_good_one(child: Survivor) -> None:
    path = scratch() / "good-again.gguf"
    path.write_bytes(layout().content)
    found = child.ask("verify", path=str(path), adapter=False, base=None)
    assert isinstance(found, dict)
    assert found["file_type"] == "q8_0"
