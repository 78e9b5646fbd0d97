"""Any metric as a pytest-benchmark entry.

pytest-benchmark is here the recorder and the comparer, not the stopwatch: the stopwatch is in the run that left the
samples. :func:`record_metric` replays them through a clock that jumps by one sample per round, so what is stored is
exactly what was measured. Every metric is lower-is-better. What has no samples (what was not run, say) goes to
:func:`record_facts`.

Checked against pytest-benchmark 5.3.1. How entries are shown, kept and compared: pytest_plugin.py. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from forge.training.system.environment import describe_gpu
from harness.verdict import STATUSES

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Unit = Literal["seconds", "bytes", "nats"]
UNITS = ("seconds", "bytes", "nats")
NO_UNIT = "none"  # of facts
RECORD_KINDS = (
    *("metric", "claim", "ablation", "max_context", "matmul_peak", "not_run"),
    *("parity", "export", "reliability"),
)

_MAX_EXACT = 2**53  # a whole number above it may change when it becomes a float


class ReplayClock:
    """A timer that shows what it was set to: ``@pytest.mark.benchmark(group=..., timer=CLOCK)``."""

    __name__ = "replay"  # else the JSON's options.timer holds an address in memory

    def __init__(self) -> None:
        self.now = 0.0
        self.is_read = False

    def __call__(self) -> float:
        self.is_read = True
        return self.now

    def rewind(self) -> None:
        """Back to zero, so that end - start is the sample itself and no difference of rounded numbers."""
        self.now, self.is_read = 0.0, False


CLOCK = ReplayClock()


def record_metric(
    benchmark: BenchmarkFixture, samples: Sequence[float], *, metric: str, unit: Unit, **extra: Any
) -> None:
    """Store measured samples as this test's entry; the test is marked ``timer=CLOCK``.

    ``samples`` are Python floats or ints in ``unit``, one per round, lower is better; seconds and bytes are not
    negative. ``extra`` becomes ``extra_info`` beside ``metric`` and ``unit``. Its keys: ``workload``,
    ``workload_sha256``, ``backend``, ``plan``, ``arm``, ``code_sha256``, ``run_ids``, ``verdict``, ...; without
    them ``record_kind`` is "metric" and ``gpu`` this machine's. It holds plain JSON values only: pytest-benchmark would
    store a numpy scalar as the text "UNSERIALIZABLE[...]" and NaN as invalid JSON.

    Raises ``TypeError`` or ``ValueError`` naming the value that cannot be stored, ``RuntimeError`` where the entry
    would not be stored (benchmarks switched off) or not as given (no ``timer=CLOCK``). Then nothing is recorded.
    """
    if unit not in UNITS:
        raise ValueError(f"unit is {unit!r}; known: {', '.join(UNITS)}")
    if not samples:
        raise ValueError(f"{metric}: there are no samples; what was not measured is recorded with record_facts")
    values = [_sample(value, f"{metric}: sample {index}", unit) for index, value in enumerate(samples)]
    _replay(benchmark, values, {"metric": metric, "unit": unit, "record_kind": "metric", **extra})


def record_facts(benchmark: BenchmarkFixture, *, metric: str, record_kind: str, **extra: Any) -> None:
    """Store ``extra_info`` alone: FLOPs, context points, a claim without a complete pair, what was not run.

    The entry is in the JSON with unit "none" and one sample of 0.0, and in no table. Errors as :func:`record_metric`.
    """
    _replay(benchmark, [0.0], {"metric": metric, "unit": NO_UNIT, "record_kind": record_kind, **extra})


def _replay(benchmark: BenchmarkFixture, values: list[float], extra: dict[str, Any]) -> None:
    extra = {**extra, "gpu": extra["gpu"] if "gpu" in extra else (describe_gpu() or {}).get("name")}
    _check_json(extra, "extra_info")
    if extra["record_kind"] not in RECORD_KINDS:
        raise ValueError(f"record_kind is {extra['record_kind']!r}; known: {', '.join(RECORD_KINDS)}")
    if "verdict" in extra and (extra["verdict"] or {}).get("status") not in STATUSES:
        raise ValueError(f"verdict has no status of {', '.join(STATUSES)}: {extra['verdict']!r}")
    if benchmark.disabled:
        raise RuntimeError("benchmarks are switched off (xdist or --benchmark-disable): this entry would not be stored")
    feed = iter(values)

    def play() -> None:
        if not CLOCK.is_read:  # raised inside the benchmark, so that no entry is stored
            raise RuntimeError("this test would be timed, not recorded: mark it @pytest.mark.benchmark(timer=CLOCK)")
        CLOCK.now = next(feed)

    benchmark.extra_info.update(extra)
    benchmark.pedantic(play, setup=CLOCK.rewind, rounds=len(values))
    assert benchmark.stats is not None
    assert benchmark.stats.stats.data == values


def _sample(value: Any, where: str, unit: str) -> float:
    if type(value) not in (int, float):  # bool and numpy.float64 are subclasses
        raise TypeError(f"{where} is a {_type_name(value)}, not a Python float or int: convert it with float()")
    if type(value) is int and abs(value) > _MAX_EXACT:
        raise ValueError(f"{where} is {value}: above 2^53, not exact as a float")
    if not math.isfinite(value):
        raise ValueError(f"{where} is {value}: not a finite number")
    if value < 0 and unit != "nats":
        raise ValueError(f"{where} is {value} {unit}: negative")
    return float(value)


def _check_json(value: Any, where: str) -> None:
    """Raise unless JSON gives this value back as it is (tuples become lists)."""
    if value is None or type(value) in (bool, int, str):
        return
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}: not a finite number; use None for what is not known")
    elif type(value) is dict:
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r}, a {_type_name(key)}: JSON keys are text")
            _check_json(inner, f"{where}.{key}")
    elif type(value) in (list, tuple):
        for index, inner in enumerate(value):
            _check_json(inner, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {_type_name(value)}: not a plain JSON value")


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
