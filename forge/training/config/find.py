"""Which file a config is."""

from __future__ import annotations

import contextlib
import difflib
import shlex
from pathlib import Path

from forge.training.config.overrides import shown
from forge.training.system.errors import ConfigurationError

WORKLOADS = Path(__file__).resolve().parents[2] / "workloads"


def find_config(source: str | Path) -> Path:
    """A config's file: one that is named, as it was typed, or one of :data:`WORKLOADS` by its name.

    Raises :class:`ConfigurationError` for what is no config, with what it is instead: a run, a folder, plans.
    """
    path = Path(source)
    with contextlib.suppress(OSError, ValueError):  # a name too long, or with a NUL in it
        if path.is_file():
            _refuse_other_files(path)
            return path
        if str(source) and path.is_dir():
            _refuse_folder(path)
    known = sorted(p.stem for p in WORKLOADS.glob("*.yaml") if "." not in p.stem)
    if str(source) in known:
        return WORKLOADS / f"{source}.yaml"
    near = difflib.get_close_matches(str(source)[:60], known, 1)
    raise ConfigurationError(
        f"no config {shown(repr(str(source)))}: neither a file nor one of {', '.join(known)}",
        remedy=f"did you mean {near[0]}?"
        if near
        else "name a YAML file or one of those; `forge init FOLDER` writes one",
    )


def _refuse_other_files(path: Path) -> None:
    if path.name.endswith(".plans.yaml"):
        config = path.with_name(path.name.removesuffix(".plans.yaml") + ".yaml")
        raise ConfigurationError(f"{path} holds plans, not a config", remedy=f"name the config beside it: {config}")
    if path.name == "run.json":
        _refuse_folder(path.parent)


def _refuse_folder(path: Path) -> None:
    quoted = shlex.quote(str(path))
    if (path / "run.json").is_file() or (path / "workload.yaml").is_file():
        raise ConfigurationError(
            f"{path} is a run, not a config",
            remedy=f"forge status {quoted}, forge evaluate {quoted} or forge export {quoted};"
            f" the config it was trained with: {path / 'workload.yaml'}",
        )
    raise ConfigurationError(
        f"{str(path)!r} is a folder, not a config",
        remedy=f"name a YAML file; `forge init {quoted}` writes one for the documents in it",
    )
