"""Inputs nobody would write: values and texts with something changed, and what every reader must make of them."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge.training.system.errors import ForgeError

T = TypeVar("T")
LIMIT_SECONDS = 10.0  # of processor time for one input; most take milliseconds

STRANGE_TEXTS = [
    *("", " ", "\n", "\0", "null", "~", "NaN", "1e-4", "1e999", "0x10", "-0", "9" * 400, "/", "..", "~nobody/x", "a/b"),
    *("/dev/zero", "/proc/self/mem", "https://u:p@h/", "{path}", "{0}", "%s", "\u2028", "\ufeff", "<|im_end|>"),
    *("\ud800", "é" * 130, "x" * 300, "../../etc/passwd", "embedded", "tiny", "!!python/object:os.system"),
    *("&a", "*a", "[", "{", "'"),
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, -(10**30)])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(STRANGE_TEXTS)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside a value of mappings and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in inside for place in [(*path, key), *places(each, (*path, key))]]


@st.composite
def mutated(draw: st.DrawFn, original: dict[str, Any]) -> dict[str, Any]:
    """``original`` with one to three of its values replaced, removed, renamed, wrapped or given company."""
    result = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        known = places(result)
        if not known:
            break
        *path, key = draw(st.sampled_from(known))
        holder = result
        for part in path:
            holder = holder[part]
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "rename", "add"]))
        if change == "replace":
            holder[key] = draw(VALUES)
        elif change == "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"a": holder[key]}, str(holder[key])]))
        elif change == "remove" or isinstance(holder, list):
            del holder[key]
        elif change == "rename":
            holder[draw(st.text(max_size=12))] = holder.pop(key)
        else:
            holder[draw(st.text(max_size=12))] = draw(VALUES)
    return result


FRAGMENTS = [
    *("!!python/object/apply:os.system [id]", "!!bool x", "!!int ''", "!!timestamp x", "!!binary x", "!!set {a}"),
    *("&a ", "*a", "<<: {a: 1}", "? [a]\n: b", "\t", "\0", "[", "]", "{", "}", ": ", "- ", "\n", "%YAML 1.1\n---\n"),
    *("---\n", "...\n", "|", ">", "'", '"', "\\", "#", "\ufeff", "\x85", "\ud800", "[" * 100, "{a: " * 50, "=: ="),
    *("0b1", "1:30", "@", "`"),
]


@st.composite
def spliced(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> str:
    """A text with fragments put in, or stretches taken out, at places of no meaning."""
    text = draw(texts)
    for _ in range(draw(st.integers(0, 3))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.sampled_from([0, 0, 1, 5, 40])))
        text = text[:begin] + draw(st.sampled_from(FRAGMENTS) | st.text(max_size=5)) + text[end:]
    return text


def survives(function: Callable[[], T]) -> T | None:
    """The result, or ``None`` for a documented error with a message that can be shown and stored."""
    result, error, started = None, None, time.process_time()
    try:
        result = function()
    except ForgeError as caught:
        error = caught
    assert time.process_time() - started < LIMIT_SECONDS
    if error is not None:
        assert error.message.strip()
        assert 2 <= error.exit_code <= 9
        assert len(str(error)) < 20_000
    return result


def fuzz(quick: int, slow: int) -> Any:
    """One property as two tests: with few inputs, and with many and marked slow."""
    return pytest.mark.parametrize(
        "effort", [pytest.param(quick, id="quick"), pytest.param(slow, id="slow", marks=pytest.mark.slow)]
    )


def attempt(effort: int, strategy: st.SearchStrategy[T], body: Callable[[T], None]) -> None:
    """Try ``body`` on ``effort`` inputs."""
    num_tried = 0

    @settings(max_examples=effort, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(value: T) -> None:
        nonlocal num_tried
        num_tried += 1
        body(value)

    run()
    assert num_tried >= effort


def json_bytes(content: Any) -> bytes:
    return json.dumps(content).encode()


JSON_SPOILS = st.sampled_from(
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\0" * 50, b"[" * 100_000, b'{"a":' * 50_000, b"NaN"]
)
