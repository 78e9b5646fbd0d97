"""Checkpoints that are complete or not there.

``transformers`` writes a checkpoint's files one after another and resumes from the highest
number, complete or not; a missing optimizer file is skipped in silence. Here a checkpoint counts
only once a seal, written last, names every file with its size and SHA-256.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from forge.training.errors import DataError
from forge.training.files import sha256_file, write_json

SEAL = "forge-seal.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_REQUIRED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def seal(checkpoint: Path, identity: dict[str, str]) -> None:
    """Seal a checkpoint directory that was completely written. ``identity``: what a resume must match."""
    for unneeded in ("training_args.bin", "README.md"):  # a pickle, and a card that nobody reads
        (checkpoint / unneeded).unlink(missing_ok=True)
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    write_json(checkpoint / SEAL, {"identity": identity, "files": files})


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, ``None`` if it can."""
    try:
        content = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        files = content["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "it was never sealed (the save did not finish)"
    missing = [name for name in _REQUIRED if name not in files]
    if missing:
        return f"{', '.join(missing)} missing"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"] or sha256_file(path) != expected["sha256"]:
            return f"{name} is damaged"
    return None


def _newest_first(directory: Path) -> list[Path]:
    numbered = ((int(m.group(1)), path) for path in directory.glob("checkpoint-*") if (m := _NAME.match(path.name)))
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_valid(directory: Path, identity: dict[str, str]) -> tuple[Path | None, list[str]]:
    """The valid checkpoint of the most steps, and a line for each newer one passed over.

    Raises :class:`DataError` if that checkpoint belongs to other work: what differs, old -> new.
    """
    found = _newest_first(directory)
    passed_over = []
    for path in found:
        reason = problem(path)
        if reason is not None:
            passed_over.append(f"{path.name} is not used: {reason}")
            continue
        old = json.loads((path / SEAL).read_text(encoding="utf-8"))["identity"]
        changed = [f"  {k}: {old.get(k)} -> {identity.get(k)}" for k in identity if old.get(k) != identity[k]]
        if changed:
            raise DataError(
                f"{path} belongs to other work:\n" + "\n".join(changed),
                remedy="resume with the settings it was started with, or train into another directory",
            )
        return path, passed_over
    return None, passed_over


def rotate(directory: Path, keep: int = 2) -> None:
    """Delete all but the ``keep`` newest valid checkpoints; unsealed ones below the newest go too."""
    found = _newest_first(directory)
    kept = 0
    for path in found:
        if kept >= keep:
            shutil.rmtree(path, ignore_errors=True)
        elif (path / SEAL).is_file():
            kept += 1
