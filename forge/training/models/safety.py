"""What a model directory from elsewhere could make a library do: run its code, read files outside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forge.training.system.errors import DataError
from forge.training.system.files import read_json_object

_CODE_KEYS = ("auto_map", "_attn_implementation_internal")
_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


def refuse_unsafe_files(directory: Path) -> None:
    """Raise :class:`DataError` for a model directory that asks for code of its own, or names files outside itself.

    Keys are looked for at any depth: CVE-2026-5241 had them in a nested configuration.
    """
    for path in (directory / name for name in _FILES):
        if not path.is_file():
            continue
        for key, value in _entries(read_json_object(path)):
            if key in _CODE_KEYS:
                raise DataError(f"{path} asks for code of its own ({key})", remedy="Forge runs none")
            if key.endswith("_file") and isinstance(value, str) and (Path(value).name != value or value == ".."):
                raise DataError(
                    f"{path}: {key} leaves the model's folder ({value:.200})",
                    remedy="copy the file into the model's folder and name it there",
                )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield from found.items()
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
