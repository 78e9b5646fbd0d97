"""``key=value`` overrides, and what is wrong with a setting in one line.

Nothing here prints a credential back: a terminal's text ends up in logs.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from forge.training.config.yaml import parse_scalar
from forge.training.system.secrets import credential_rule

MAX_KEY_PARTS = 8
_MAX_ERRORS_SHOWN = 20
_NEAR_ELSEWHERE = 0.75  # likeness, from 0 to 1; beside it difflib's own 0.6 is enough
_CREDENTIAL_KEY = re.compile(r"token|password|passwd|secret|api_?key|credential", re.IGNORECASE)
_ENVIRONMENT_ONLY = "credentials come from the environment only (HF_TOKEN), never from a file or an option"


def apply_overrides(content: dict[str, Any], overrides: Sequence[str], option: str) -> list[str]:
    """Set ``a.b=value`` in nested mappings. ``option``: its name in the errors, which are returned."""
    errors = []
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = key.strip().split(".")
        if not separator or not all(parts):
            errors.append(f"{option} {shown(override)}: expected key=value")
            continue
        if len(parts) > MAX_KEY_PARTS:
            errors.append(f"{option} {shown(override)}: no key has {len(parts)} parts")
            continue
        node = content
        for part in parts[:-1]:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                errors.append(f"{option} {shown(override)}: {shown(part)} is not a section")
                break
            node = child
        else:
            node[parts[-1]] = parse_scalar(text)
    return errors


def unusable_text(content: Any, where: str = "") -> Iterator[str]:
    """What no setting may hold: credentials, NUL characters and halves of surrogate pairs, one line each."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from unusable_text(key, f"a key of {where or 'the file'}")
            yield from unusable_text(value, f"{where}.{key}" if where else key)
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from unusable_text(value, f"{where}[{index}]")
    elif isinstance(content, str):
        rule = credential_rule(content)
        if rule:
            yield f"{shown(where)}: looks like a credential ({rule}): {_ENVIRONMENT_ONLY}"
        elif "\0" in content:
            yield f"{shown(where)}: a NUL character"
        elif any("\ud800" <= character <= "\udfff" for character in content):
            yield f"{shown(where)}: half of a surrogate pair"


def validation_errors(
    model: type[BaseModel], invalid: ValidationError, prefix: str = "", other_names: Mapping[str, str] | None = None
) -> list[str]:
    """One line per error, with the key that was meant where one is misspelt or stands in another section.

    ``other_names``: what else a key may be called, and what to write instead.
    """
    errors = invalid.errors(include_url=False, include_context=False)
    return [prefix + _readable(model, error, other_names or {}) for error in errors]


def key_paths(model: Any, prefix: str = "") -> dict[str, bool]:
    """The dotted path of every key of a config, sections included, and whether it is a section."""
    paths: dict[str, bool] = {}
    for name, field in model.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        paths[prefix + name] = is_section
        if is_section:
            paths |= key_paths(field.annotation, f"{prefix}{name}.")
    return paths


def listed(errors: Sequence[str]) -> str:
    """The errors as lines, the first twenty of them and how many more there are."""
    lines = [f"  - {error}" for error in errors[:_MAX_ERRORS_SHOWN]]
    if len(errors) > _MAX_ERRORS_SHOWN:
        lines.append(f"  and {len(errors) - _MAX_ERRORS_SHOWN:,} more")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value for a message: at most 60 printable characters, and nothing of a credential."""
    try:
        text = value if isinstance(value, str) and value.isprintable() else repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python converts
        return f"a {type(value).__name__}"
    if credential_rule(text):
        return "(what looks like a credential)"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _readable(model: type[BaseModel], error: Any, other_names: Mapping[str, str]) -> str:
    where = ".".join(shown(str(part)) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        meant = meant_key(model, error["loc"], error["input"], other_names)
        if meant:
            return f"{where}: unknown key; did you mean {meant}?"
        is_credential = _CREDENTIAL_KEY.search(str(error["loc"][-1]))
        return f"{where}: unknown key" + (f"; {_ENVIRONMENT_ONLY}" if is_credential else "")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where}: required, and not given"
    value = error["input"]
    quoted = repr(value) if isinstance(value, str) else value  # the text '1' and the number 1 look different
    given = "" if error["type"].startswith("value_error") else f" (given: {shown(quoted)})"
    return f"{where}: {message}{given}" if where else message


def meant_key(
    model: type[BaseModel], location: tuple[Any, ...], value: Any, other_names: Mapping[str, str] | None = None
) -> str | None:
    """The key that an unknown one was meant to be; ``value``: what it was given, a mapping where it is a section.

    One of that very name in another section, one of another tool, or one spelt alike: beside it, then anywhere.
    """
    other_names = other_names or {}
    name = str(location[-1])[:60]
    sections = [path for path, is_section in key_paths(model).items() if is_section == isinstance(value, dict)]
    by_name: dict[str, list[str]] = {}
    for path in sections:
        by_name.setdefault(path.rpartition(".")[2], []).append(path)
    if name in by_name:
        return " or ".join(by_name[name])
    if name in other_names:
        return other_names[name]
    near = difflib.get_close_matches(name, _keys_beside(model, location), 1)
    if near:
        return near[0]
    known = {**{key: " or ".join(paths) for key, paths in by_name.items()}, **other_names}
    near = difflib.get_close_matches(name, known, 1, cutoff=_NEAR_ELSEWHERE)
    return known[near[0]] if near else None


def _keys_beside(model: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = _model_in(field.annotation) if field is not None else None
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def _model_in(annotation: Any) -> Any:
    """The model in ``tuple[Model, ...]`` or ``Model | None``, else the annotation itself."""
    inside = [argument for argument in typing.get_args(annotation) if hasattr(argument, "model_fields")]
    return inside[0] if inside else annotation
