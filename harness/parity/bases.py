"""The ladder's trained base in other architectures: made by a process of its own."""

from __future__ import annotations

from pathlib import Path

from forge.training.system.errors import MachineError
from harness.trained_base import run_in_evaluator


def make_base_as(base: Path, model_type: str, directory: Path) -> None:
    """Write ``base`` as a ``model_type`` of ``probes.architecture``. Raises :class:`MachineError`."""
    arguments = (str(base), "--as", model_type, "-o", str(directory))
    exit_code, last_line = run_in_evaluator("harness.parity.probes.architecture", *arguments)
    if exit_code or not directory.is_dir():
        raise MachineError(
            f"the base cannot be written as a {model_type}: {last_line}", remedy="look at the base's files"
        )
