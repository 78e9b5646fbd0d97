"""Trajectories kept in a file: a baseline's runs that differ in rounding alone, and runs with a planted fault."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forge.training.system.files import read_json_object
from harness.parity.trajectory.bands import Band, draw_band, resolution


@dataclass(frozen=True)
class Recorded:
    """Losses (nats per trained token) and logarithms of gradient norms by name of the run, each of shape (steps,).

    The first of ``sound`` has the layout of the runs in ``faulty``.
    """

    sound: dict[str, tuple[np.ndarray, np.ndarray]]
    faulty: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def num_runs(self) -> int:
        """Of the baseline."""
        return len(self.sound)

    def bands(self, alpha: float, *, without: int | None = None) -> list[Band]:
        """The band of each quantity."""
        runs = [run for index, run in enumerate(self.sound.values()) if index != without]
        losses, norms = (np.array([run[quantity] for run in runs]) for quantity in (0, 1))
        spacing = np.array([resolution(np.exp(run)) / np.exp(run) for run in norms])
        return [
            draw_band(losses, np.array([resolution(run) for run in losses]), alpha),
            draw_band(norms, spacing, alpha),
        ]

    def bands_without(self, left_out: int, alpha: float) -> tuple[list[Band], list[np.ndarray]]:
        """The bands of all runs but one, and that one."""
        return self.bands(alpha, without=left_out), list(list(self.sound.values())[left_out])

    def effects(self) -> dict[str, list[np.ndarray]]:
        """By fault and quantity, what it changes: its run less the sound run of the same layout."""
        like = next(iter(self.sound.values()))
        return {name: [run[0] - like[0], run[1] - like[1]] for name, run in self.faulty.items()}


def read_recorded(path: Path) -> Recorded:
    """From ``{"sound": {NAME: {"loss": [...], "grad_norm": [...]}}, "faulty": ...}``."""
    content = read_json_object(path)

    def runs(part: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {
            name: (np.array(run["loss"]), np.log(np.array(run["grad_norm"]))) for name, run in content[part].items()
        }

    return Recorded(runs("sound"), runs("faulty"))
