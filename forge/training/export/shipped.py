"""What `forge chat` talks to: the GGUF file behind a path, and the settings with which it was trained and shipped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge.training.export.folder import RECORD, listed_files
from forge.training.export.modelfile import PARAMETERS, parse_modelfile
from forge.training.system.errors import CheckError, DataError
from forge.training.system.files import is_there, read_json_object
from forge.training.train.record import completed_record

_GIVE = "give a run, its export folder or a .gguf file"


@dataclass(frozen=True)
class Shipped:
    """A GGUF file as it was shipped. ``parameters``: the Modelfile's, by Ollama's names; ``stop`` is a list of texts.

    ``trained_tokens``: length of the longest example that it was trained on, ``None`` where nothing says it.
    ``source``: the file that says system prompt and parameters, ``None`` if there is none.
    """

    path: Path
    system: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    trained_tokens: int | None = None
    source: str | None = None


def find_shipped(given: Path) -> Shipped:
    """The model behind a run directory, an export folder or a GGUF file. Raises :class:`DataError` saying what to give.

    The settings are those of the Modelfile beside it, which Ollama would use and its owner may have edited, else those
    of ``export.json``; both only where they are of this file.
    """
    path = _find_file(given)
    record = _record_of(path)
    trained = record.get("max_length")
    trained_tokens = trained if type(trained) is int else None
    modelfile = path.parent / "Modelfile"
    if modelfile.is_file():
        commands = parse_modelfile(_text(modelfile))
        names = {command.value.removeprefix("./") for command in commands if command.name == "model"}
        if record or path.name in names:
            system = [command.value for command in commands if command.name == "system"]
            parameters: dict[str, Any] = {}
            for command in commands:
                if command.name == "stop":
                    parameters.setdefault("stop", []).append(command.value)
                elif command.name in PARAMETERS:
                    parameters[command.name] = _value(command.name, command.value)
            return Shipped(path, system[-1] if system else None, parameters, trained_tokens, "Modelfile")
    if record:
        system_prompt = record.get("system_prompt")
        system_prompt = system_prompt if isinstance(system_prompt, str) else None
        return Shipped(path, system_prompt or None, _known(record.get("parameters")), trained_tokens, RECORD)
    return Shipped(path)


def _find_file(given: Path) -> Path:
    if not is_there(given):
        raise DataError(f"there is no {given}", remedy=_GIVE)
    if not given.is_dir():
        if given.suffix in (".safetensors", ".json", ".jsonl", ".yaml", ".yml"):
            raise DataError(f"{given} is not a GGUF file", remedy=_GIVE)
        return given
    if (given / "run.json").is_file():
        folder = given / "export"
        if not folder.is_dir():
            completed_record(given)
            raise DataError(f"{given} is not exported yet", remedy=f"forge export {given}")
        return _file_in(folder)
    if (given / "adapter_config.json").is_file():
        run = given.parent
        remedy = f"forge export {run}, then forge chat {run}" if (run / "run.json").is_file() else _GIVE
        raise DataError(f"{given} is an adapter, and llama.cpp needs the merged model as GGUF", remedy=remedy)
    return _file_in(given)


def _file_in(folder: Path) -> Path:
    """The file of a folder that its Modelfile serves, else its smallest model."""
    if (folder / "Modelfile").is_file():
        served = [c.value for c in parse_modelfile(_text(folder / "Modelfile")) if c.name == "model"]
        if served and (folder / served[-1]).is_file():
            return folder / served[-1].removeprefix("./")
    files = [path for path in folder.glob("*.gguf") if path.is_file() and not path.stem.endswith("-lora")]
    if not files:
        raise DataError(f"{folder} holds no GGUF file", remedy=_GIVE)
    return min(files, key=lambda path: (path.stat().st_size, path.name))


def _record_of(path: Path) -> dict[str, Any]:
    """``export.json`` beside a file if it lists the file, else nothing."""
    try:
        record = read_json_object(path.parent / RECORD)
    except DataError:
        return {}
    return record if path.name in listed_files(record) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise CheckError(f"{path} is not UTF-8 text: {error}") from error


def _value(name: str, text: str) -> int | float | bool | str:
    kind = PARAMETERS[name]
    return text.lower() in ("1", "t", "true") if kind is bool else kind(text)


def _known(parameters: Any) -> dict[str, Any]:
    """Those of a record's parameters that Ollama knows, with values of their kind; ``stop`` is a text or a list."""
    kinds: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str, list)}
    given = parameters if isinstance(parameters, dict) else {}
    return {name: v for name, v in given.items() if name in PARAMETERS and type(v) in kinds[PARAMETERS[name]]}
