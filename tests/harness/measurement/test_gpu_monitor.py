"""What is seen of the GPU from outside a run; what NVML would answer is made up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.errors import MachineError
from harness.measurement.gpu_monitor import GpuMonitor, machine_id, wait_until_free
from harness.measurement.results import Outcome, Store
from harness.measurement.runner import run_once
from tests.support.fake_runs import SPEC, fake


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def run(store: Store, command: Any, **more: Any) -> Outcome:
    return run_once(SPEC, store=store, command=command, **{"time_limit_seconds": 60, "grace_seconds": 1, **more})


def state(others: int = 0, used: int = 1 << 28, reasons: tuple[str, ...] = (), clock: int = 1980) -> dict[str, Any]:
    return {
        "num_other_processes": others,
        "memory_used_bytes": used,
        "throttle_reasons": list(reasons),
        "sm_clock_mhz": clock,
        "temperature_celsius": 40 + others,
        "power_watts": 300.0,
    }


class Readings:
    """Answers its states one after the other, then the last for ever."""

    def __init__(self, *states: dict[str, Any]) -> None:
        self.states = list(states)

    def __call__(self) -> dict[str, Any]:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]


def test_a_gpu_in_use_is_not_measured_on() -> None:
    with pytest.raises(MachineError, match="not free: 1 other process on it"):
        wait_until_free(Readings(state(others=1)), patience_seconds=0)
    with pytest.raises(MachineError, match=r"not free: 3\.0 GiB of its memory"):
        wait_until_free(Readings(state(used=3 << 30)), patience_seconds=0)
    assert wait_until_free(Readings(state(others=1), state()), patience_seconds=0.05) == state()


def test_a_foreign_process_during_a_run_is_a_refusal_with_the_reason(store: Store) -> None:
    read_gpu = Readings(state(), state(), state(others=1), state(others=3, used=9 << 30), state(others=1))
    outcome = run(store, fake(sleep=1.5), read_gpu=read_gpu)
    assert outcome.status == "refused"
    assert outcome.message == "met a foreign process on the GPU (at most 2 at a time)"
    assert outcome.monitor.num_foreign_processes_max == 2


def test_the_runs_own_process_is_not_foreign_and_the_figures_are_those_under_load(store: Store) -> None:
    samples = [state(others=1, clock=1700, used=7 << 30, reasons=("power cap",)), state(others=1, clock=1500)]
    read_gpu = Readings(state(), state(clock=200, reasons=("idle",)), *samples)
    outcome = run(store, fake(sleep=1.0), read_gpu=read_gpu)
    assert outcome.status == "completed"
    seen = outcome.monitor
    assert (seen.device_used_before_bytes, seen.device_used_peak_bytes) == (1 << 28, 7 << 30)
    assert (seen.sm_clock_mhz_min, seen.sm_clock_mhz_median) == (1500, 1500)
    assert (seen.throttle_reasons, seen.num_foreign_processes_max) == (["power cap"], 0)
    assert seen.disturbed_share == 0
    assert seen.num_samples >= 3


def test_without_a_gpu_nothing_is_guessed(store: Store) -> None:
    with GpuMonitor(lambda: None) as monitor:
        time.sleep(0.3)
    seen = monitor.summary()
    assert (seen.num_samples, seen.device_used_peak_bytes, seen.num_foreign_processes_max) == (0, None, None)


def test_a_machine_is_told_from_others_by_a_name_that_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = machine_id()
    assert first == machine_id()
    assert len(first) == 16
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert machine_id() != first
