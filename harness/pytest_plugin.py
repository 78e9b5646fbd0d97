"""Pytest's hooks for recorded entries: the JSON is kept, units are shown, different GPUs are not compared.

conftest.py imports the functions named ``pytest_*``: ``pytest-benchmark compare`` looks for hooks by name in
./conftest.py and nowhere else, outside a pytest session. Checked against pytest-benchmark 5.3.1. No torch here.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from forge.training.system.environment import describe_gpu, has_cuda_gpu, package_version
from forge.training.system.files import write_text
from harness.compare import NO_GPU, gpu_name
from harness.recorder import NO_UNIT

if TYPE_CHECKING:
    from pytest_benchmark.session import BenchmarkSession

# Unit -> (what the table prints between "time in " and "s", factor)
_SCALES = {"seconds": ("", 1.0), "bytes": ("mebibyte", 2.0**-20), "nats": ("nat", 1.0)}

# Of the GPU, what stays the same from one minute to the next and bears on speed.
_GPU_FACTS = (
    *("name", "num_gpus", "driver", "driver_cuda", "compute_capability", "memory_total_bytes"),
    *("max_sm_clock_mhz", "max_memory_clock_mhz", "power_limit_watts"),
)

_BEGAN = pytest.StashKey[float]()

# --------------------------------------------------------------------------------------------------------------------
# A session's time and options

SUITES = ("parity", "export", "reliability")  # whole in --gate-only, which names the parts of harness/perf one by one


def pytest_addoption(parser: pytest.Parser) -> None:
    """The gate's options; docs/gate.md."""
    group = parser.getgroup("gate", "the acceptance gate (-m gpu)")
    group.addoption("--gate-train", metavar="FILE", help="documents to train on: the JSONL that `forge dataset` wrote")
    group.addoption("--gate-store", metavar="DIR", default="runs/gate/store", help="results; the next session resumes")
    group.addoption("--gate-seconds", metavar="N", type=float, help="start nothing that would not end in N seconds")
    group.addoption("--gate-run-seconds", metavar="N", type=float, help="stop a run after N seconds (default 900)")
    group.addoption("--gate-only", metavar="NAMES", help="measure only these, comma-separated, in this order")
    group.addoption("--gate-model", metavar="PATH", help="base model (default: random weights of Qwen2-7B's shape)")


def pytest_configure(config: pytest.Config) -> None:
    """What would lose or skip results is refused before the first test.

    The clock begins here: ``--gate-seconds`` are the whole session's, whatever it measures first.
    """
    config.stash[_BEGAN] = time.monotonic()
    prepare_json(config)
    if asks_for_gpu(config):
        refuse_idle_recorder(config)
        gate_only(config)


def pytest_sessionstart(session: pytest.Session) -> None:
    """``pytest -m gpu`` without a CUDA GPU is a failure, not a green run of nothing."""
    if asks_for_gpu(session.config) and not has_cuda_gpu():
        pytest.exit("pytest -m gpu needs a CUDA GPU and this machine shows none", returncode=4)


def asks_for_gpu(config: pytest.Config) -> bool:
    """Whether the gate's tests are to be run, not only listed."""
    marked = str(config.getoption("-m") or "")
    return "gpu" in marked.replace("not gpu", "") and not config.getoption("collectonly")


def announcer(config: pytest.Config) -> Callable[[str], None]:
    """Prints a line on stderr at once, past pytest's capture, with the session's second before it."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    one_at_a_time = threading.Lock()

    def announce(line: str) -> None:
        with one_at_a_time, capture.global_and_fixture_disabled() if capture else nullcontext():
            print(f"[{time.monotonic() - config.stash[_BEGAN]:4.0f} s] {line}", file=sys.stderr, flush=True)

    return announce


def gate_deadline(config: pytest.Config) -> float | None:
    """When ``--gate-seconds`` are over, on :func:`time.monotonic`'s clock; ``None`` without that option."""
    seconds: float | None = config.getoption("--gate-seconds")
    return None if seconds is None else config.stash[_BEGAN] + seconds


def gate_only(config: pytest.Config) -> tuple[str, ...]:
    """What ``--gate-only`` names; nothing without it. ``pytest.UsageError`` (exit 4) for what no suite measures."""
    from harness.perf.suite import ORDER

    known, only = (*SUITES, *ORDER), tuple(filter(None, (config.getoption("--gate-only") or "").split(",")))
    unknown = [name for name in only if name not in known]
    if unknown:
        raise pytest.UsageError(f"--gate-only: the gate measures no {unknown[0]!r}; known: {', '.join(known)}")
    return only


# --------------------------------------------------------------------------------------------------------------------
# Keeping what was recorded


def prepare_json(config: pytest.Config) -> None:
    """Make the folder of ``--benchmark-json`` before the first test; without it all results are lost after the last.

    Raises ``pytest.UsageError`` (exit 4) where the file could not be written.
    """
    path: Path | None = config.getoption("benchmark_json", None)
    if path is None:
        return
    if path.is_dir():
        raise pytest.UsageError(f"--benchmark-json={path} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise pytest.UsageError(f"--benchmark-json={path} cannot be written: {error.strerror}") from error


def refuse_idle_recorder(config: pytest.Config) -> None:
    """For a run that must record: raise ``pytest.UsageError`` (exit 4) where pytest-benchmark would quietly do nothing.

    Under xdist it disables itself, stores no JSON and the run is green; ``--benchmark-only`` skips every test without
    an entry of its own.
    """
    if config.getoption("dist", "no") != "no" or config.getoption("numprocesses", None):
        raise pytest.UsageError("-m gpu cannot run under xdist, which records nothing: leave out -n and --dist")
    if os.environ.get("PYTEST_XDIST_WORKER"):
        raise pytest.UsageError(
            "-m gpu cannot run in an xdist worker, which records nothing: unset PYTEST_XDIST_WORKER"
        )
    for option in ("disable", "skip", "only"):
        if config.getoption(f"benchmark_{option}", False):
            raise pytest.UsageError(f"-m gpu with --benchmark-{option} would leave tests out: leave that option out")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After each test with an entry: all entries so far in ``PATH.partial``.

    pytest-benchmark writes once, at the end: a later test that takes the process down would take the results with it.
    """
    path: Path | None = item.config.getoption("benchmark_json", None)
    session: BenchmarkSession | None = getattr(item.config, "_benchmarksession", None)
    has_entry = "benchmark" in getattr(item, "fixturenames", ())
    if path is None or session is None or not session.benchmarks or not has_entry:
        return
    from pytest_benchmark.utils import safe_dumps

    hook, config = item.config.hook, item.config
    content = hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=session.benchmarks,
        include_data=True,
        machine_info=session.get_machine_info(),
        commit_info=hook.pytest_benchmark_generate_commit_info(config=config),
    )
    write_text(_partial(path), safe_dumps({"is_partial": True, **content}, ensure_ascii=True, indent=4) + "\n")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """pytest-benchmark's wrapper around this hook has written the JSON: the partial one has served."""
    path: Path | None = session.config.getoption("benchmark_json", None)
    if path is not None and path.exists():
        _partial(path).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# A gate is judged in order and never by what it left out

_SUITE_ORDER = ("harness/parity/", "harness/perf/", "harness/export/", "harness/reliability/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Parity before speed: how fast a wrong model is trained is of no interest. The sort is stable."""

    def place(item: pytest.Item) -> int:
        return next((place for place, name in enumerate(_SUITE_ORDER) if item.nodeid.startswith(name)), -1)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skipped test of the gate (``pytest.skip`` in its body, a fixture or a library) is a failed one."""
    report = yield
    if report.skipped and item.get_closest_marker("gpu") is not None:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"a test of the gate was skipped, and a gate that skips proves nothing: {why}"
    return report


# --------------------------------------------------------------------------------------------------------------------
# What is shown and compared


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_scale_unit(
    config: Any, unit: str, benchmarks: Sequence[Mapping[str, Any]], best: Any, worst: Any, sort: str
) -> tuple[str, float]:
    """One unit per metric, whatever the size: "time in s", "time in mebibytes", "time in nats"; others by default."""
    from pytest_benchmark.plugin import pytest_benchmark_scale_unit as scale_time

    ours = _unit(benchmarks[0])
    has_choice = bool(config) and config.getoption("benchmark_time_unit", None) not in (None, "auto")
    if ours not in _SCALES or (ours == "seconds" and has_choice):
        prefix, factor = scale_time(config, unit, benchmarks, best, worst, sort)
        return str(prefix), float(factor)
    return _SCALES[ours] if unit == "seconds" else ("", 1.0)  # else "operations": 1 / mean


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_group_stats(
    config: Any, benchmarks: Iterable[Mapping[str, Any]], group_by: str
) -> list[tuple[str | None, list[Mapping[str, Any]]]]:
    """The default groups, but one unit per table (a table has one scale) and without facts.

    ``pytest-benchmark compare`` (``config`` is ``None``) asks no other hook that could refuse: entries of different
    GPUs end it here with exit code 4.
    """
    from pytest_benchmark.plugin import pytest_benchmark_group_stats as group

    benchmarks = list(benchmarks)
    infos = [entry.get("extra_info") or {} for entry in benchmarks]
    names = sorted({info["gpu"] or NO_GPU for info in infos if "gpu" in info})
    if config is None and len(names) > 1:
        print(f"error: these results are of different GPUs and cannot be compared: {', '.join(names)}", file=sys.stderr)
        raise SystemExit(4)
    groups = []
    for label, members in group(config, [entry for entry in benchmarks if _unit(entry) != NO_UNIT], group_by):
        units = list(dict.fromkeys(_unit(entry) for entry in members))
        for unit in units:
            name = label if len(units) == 1 else f"{label or ''} ({unit or 'timed'})".strip()
            groups.append((name, [entry for entry in members if _unit(entry) == unit]))
    return groups


def _unit(entry: Mapping[str, Any]) -> str | None:
    value = (entry.get("extra_info") or {}).get("unit")
    return value if isinstance(value, str) else None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """What the results depend on and nothing else: no host name, nothing that changes by the minute.

    ``gpu`` is ``None`` where NVML shows none. ``torch`` is this interpreter's, read without importing it; the runs' own
    environments are in their records.
    """
    gpu = describe_gpu()
    return {
        "gpu": {key: gpu.get(key) for key in _GPU_FACTS} if gpu else None,
        "torch": package_version("torch"),
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(machine_info: dict[str, Any], compared_benchmark: dict[str, Any]) -> None:
    """``--benchmark-compare`` against another GPU's results is refused: ``pytest.UsageError``, exit 4."""
    here, there = gpu_name(machine_info), gpu_name(compared_benchmark.get("machine_info") or {})
    if here != there:
        raise pytest.UsageError(f"the saved results are of another GPU: {there}; this machine has {here}")
