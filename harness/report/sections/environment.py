"""On what it was measured: the GPU, the checkout, the packages of each backend, clocks and temperatures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harness.report.arms import BACKENDS
from harness.report.evidence import Evidence
from harness.report.page.content import Row, Section, Table
from harness.report.page.numbers import NONE, count, gib, spread, with_range
from harness.report.run import Run


def build(evidence: Evidence, used: Iterable[Run]) -> Section:
    """``used``: the runs that the report's numbers come from."""
    runs = list(used)
    by_backend = {name: found for name in BACKENDS if (found := [r for r in runs if r.backend == name and r.record])}
    parts = [Table("Where the gate ran", ("What", "Value"), tuple(_facts(evidence, runs)), texts=2)]
    if by_backend:
        columns = ("Package", *by_backend)
        texts = len(columns)
        parts.append(Table("Packages of the backends", columns, tuple(_packages(by_backend)), texts=texts))
        columns = ("Variable", *by_backend)
        parts.append(
            Table("Settings that bear on speed and memory", columns, tuple(_settings(by_backend)), texts=texts)
        )
        columns = (
            "Backend",
            "SM clock, MHz",
            "Lowest, MHz",
            "Power, W",
            "Hottest, °C",
            "Throttled",
            "Others on the GPU",
        )
        parts.append(Table("The GPU while it was measured", columns, tuple(map(_watched, by_backend.items()))))
    return Section(
        "environment",
        "Environment",
        parts=tuple(part for part in parts if part.rows),
        notes=(
            "Several runs: the median and, in brackets, the extremes. Each run's own environment is in its record.",
        ),
    )


def _facts(evidence: Evidence, runs: list[Run]) -> Iterable[Row]:
    machine, commit = evidence.machine, evidence.commit
    found = machine.get("gpu")
    gpu: dict[str, Any] = found if isinstance(found, dict) else {}
    facts: dict[str, Any] = {
        "GPU": gpu.get("name") or next((name for run in runs if (name := _gpu(run).get("name"))), None),
        "GPU memory": gib(gpu["memory_total_bytes"]) if gpu.get("memory_total_bytes") else None,
        "Driver, CUDA it brings": _joined(gpu.get("driver"), gpu.get("driver_cuda")),
        "Compute capability": gpu.get("compute_capability"),
        "Highest clocks, MHz (SM, memory)": _joined(gpu.get("max_sm_clock_mhz"), gpu.get("max_memory_clock_mhz")),
        "Power limit, W": gpu.get("power_limit_watts"),
        "torch, Python of the gate": _joined(machine.get("torch"), machine.get("python")),
        "System": _joined(machine.get("system"), machine.get("machine")),
        "CPU of the runs": ", ".join(dict.fromkeys(model for run in runs if (model := _cpu(run)))),
        "Machines (GPU and boot)": ", ".join(dict.fromkeys(run.outcome.machine for run in runs)),
        "Commit": _joined(commit.get("id"), "with uncommitted changes" if commit.get("dirty") else None),
        "Gate ended": evidence.made_at,
    }
    return (Row((name, str(value))) for name, value in facts.items() if value)


def _packages(by_backend: dict[str, list[Run]]) -> Iterable[Row]:
    found = {backend: _environment(runs[0]).get("packages") or {} for backend, runs in by_backend.items()}
    names = dict.fromkeys(name for packages in found.values() for name, version in packages.items() if version)
    yield _examples(by_backend)
    for name in names:
        yield Row((name, *(str(packages.get(name) or NONE) for packages in found.values())))


def _settings(by_backend: dict[str, list[Run]]) -> Iterable[Row]:
    found = {backend: _environment(runs[0]).get("settings") or {} for backend, runs in by_backend.items()}
    names = dict.fromkeys(name for settings in found.values() for name in settings)
    yield _examples(by_backend)
    for name in names:
        yield Row((name, *(str(settings.get(name) or NONE) for settings in found.values())))


def _examples(by_backend: dict[str, list[Run]]) -> Row:
    ids = tuple(runs[0].id for runs in by_backend.values())
    return Row(("as seen in run", *ids), ids)


def _watched(pair: tuple[str, list[Run]]) -> Row:
    backend, runs = pair
    seen = [run.outcome.monitor for run in runs]
    throttled = dict.fromkeys(reason for monitor in seen for reason in monitor.throttle_reasons)
    others = max((n for m in seen if (n := m.num_foreign_processes_max) is not None), default=None)

    cells = (
        backend,
        with_range(spread([monitor.sm_clock_mhz_median for monitor in seen])),
        count(min((clock for m in seen if (clock := m.sm_clock_mhz_min) is not None), default=None)),
        with_range(spread([monitor.power_watts_median for monitor in seen])),
        count(max((heat for m in seen if (heat := m.temperature_celsius_max) is not None), default=None)),
        ", ".join(throttled) or "no",
        count(others),
    )
    return Row(cells, tuple(run.id for run in runs))


def _environment(run: Run) -> dict[str, Any]:
    return run.record.environment if run.record else {}


def _gpu(run: Run) -> dict[str, Any]:
    return _environment(run).get("gpu") or {}


def _cpu(run: Run) -> str | None:
    cpu = _environment(run).get("cpu") or {}
    return f"{cpu.get('model')}, {cpu.get('num_usable_cores')} cores" if cpu.get("model") else None


def _joined(*values: Any) -> str:
    return ", ".join(str(value) for value in values if value)
