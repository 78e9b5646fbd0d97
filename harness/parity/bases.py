"""The ladder's trained base, and the same base in other architectures: made by processes of their own."""

from __future__ import annotations

from pathlib import Path

from forge.training.system.environment import ROOT
from forge.training.system.errors import ForgeError, MachineError
from harness.measurement.environment import EVALUATOR, environment, interpreter
from harness.measurement.process import run_process

BASE_SECONDS = 900.0


def make_base(name: str) -> Path:
    """The directory of a stand-in, made now if need be. Raises :class:`MachineError`."""
    exit_code, last = _run("repeatable_base", name)
    if exit_code or not Path(last).is_dir():
        raise MachineError(f"the base {name} cannot be had: {last}", remedy=f"`forge base {name}` says why")
    return Path(last)


def make_base_as(base: Path, model_type: str, directory: Path) -> None:
    """Write ``base`` as a ``model_type`` of ``probes.architecture``. Raises :class:`ForgeError`."""
    exit_code, last = _run("architecture", str(base), "--as", model_type, "-o", str(directory))
    if exit_code or not directory.is_dir():
        raise ForgeError(f"the base cannot be written as a {model_type}: {last}")


def _run(probe: str, *arguments: str) -> tuple[int, str]:
    """Exit code and last line of a probe in the evaluator's interpreter."""
    ended = run_process(
        [interpreter(EVALUATOR), "-m", f"harness.parity.probes.{probe}", *arguments],
        environment=environment(EVALUATOR),
        directory=ROOT,
        time_limit_seconds=BASE_SECONDS,
    )
    lines = ended.output.decode("utf-8", "replace").strip().splitlines()
    return ended.exit_code, lines[-1] if lines else "nothing was said"
