"""On what it was measured: the GPU, the checkout, the packages of each backend, clocks and temperatures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from forge.training.backends import BACKENDS
from forge.training.report.page.content import Row, Section, Table
from forge.training.report.page.numbers import NONE, gib
from harness.report.evidence import Evidence, Run
from harness.report.page.numbers import count, spread, with_range


def build(evidence: Evidence, used: Iterable[Run]) -> Section:
    """``used``: the runs that the report's numbers come from."""
    runs = list(used)
    by_backend: dict[str, list[Run]] = {
        name: of_backend
        for name in BACKENDS
        if (of_backend := [run for run in runs if run.backend == name and run.record])
    }
    parts = [Table("Where the gate ran", ("What", "Value"), tuple(_facts(evidence, runs)), texts=2)]
    if by_backend:
        for caption, column, key in (
            ("Packages of the backends", "Package", "packages"),
            ("Settings that bear on speed and memory", "Variable", "settings"),
        ):
            rows = tuple(_of_backends(key, by_backend))
            parts.append(Table(caption, (column, *by_backend), rows, texts=1 + len(by_backend)))
        columns = (
            *("Backend", "SM clock, MHz", "Lowest, MHz", "Power, W", "Hottest, °C"),
            *("Throttled", "Others on the GPU"),
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
    gpu: dict[str, Any] = machine["gpu"] if isinstance(machine.get("gpu"), dict) else {}
    facts: dict[str, Any] = {
        "GPU": gpu.get("name") or next((name for run in runs if (name := _gpu(run).get("name"))), None),
        "GPU memory": gib(gpu["memory_total_bytes"]) if gpu.get("memory_total_bytes") else None,
        "Driver, CUDA of the driver": _joined(gpu.get("driver"), gpu.get("driver_cuda")),
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


def _of_backends(key: str, by_backend: dict[str, list[Run]]) -> Iterable[Row]:
    """What the first run of each backend recorded under ``key`` of its environment, by name."""
    values = [_environment(runs[0]).get(key) or {} for runs in by_backend.values()]
    ids = tuple(runs[0].id for runs in by_backend.values())
    yield Row(("as seen in run", *ids), ids)
    for name in dict.fromkeys(name for of_backend in values for name, value in of_backend.items() if value):
        yield Row((name, *(str(of_backend.get(name) or NONE) for of_backend in values)))


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
