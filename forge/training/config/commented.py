"""A config as YAML for people: every key with what it means, in the model's own words."""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from forge.training.config.overrides import meant_key
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload
from forge.training.config.yaml import dump_entry
from forge.training.system.errors import ConfigurationError

WIDTH = 120
_INDENT = "  "


def commented_yaml(
    content: Mapping[str, Any],
    model: Any = Workload,
    *,
    notes: Mapping[str, Sequence[str]] | None = None,
    leave_out: Collection[str] = (),
    prefix: str = "",
) -> str:
    """``content``, a dumped ``model``, as YAML in the model's order, each key with its comment.

    ``notes``: further lines above a key, by its dotted path. ``leave_out``: paths of keys that are not written.
    """
    lines: list[str] = []
    depth = prefix.count(".")
    for name, field in model.model_fields.items():
        path = prefix + name
        if path in leave_out or name not in content:
            continue
        above = [f"# {line}" if line else "#" for line in (notes or {}).get(path, ())]
        if _is_section(field.annotation):
            own = [*above, f"{name}:  # {_first_line(field.annotation)}"]
            inside = commented_yaml(
                content[name], field.annotation, notes=notes, leave_out=leave_out, prefix=f"{path}."
            )
            lines += [_INDENT * depth + line for line in own] + [inside.rstrip("\n")]
        else:
            own = _entry(name, content[name], _comment(field), above, WIDTH - len(_INDENT) * depth)
            lines += [_INDENT * depth + line for line in own]
    return "\n".join(lines) + "\n"


def describe_key(key: str) -> str:
    """A section of the config, one of its keys, or ``plan``, with defaults and comments.

    Raises :class:`ConfigurationError` for an unknown key, with the nearest one.
    """
    parts = tuple(key.split("."))
    model, inside = (Plan, parts[1:]) if parts[0] == "plan" else (Workload, parts)
    here: Any = model
    field: Any = None
    for part in inside:
        field = here.model_fields.get(part) if _is_section(here) else None
        if field is None:
            meant = meant_key(Workload, parts, None) or meant_key(Workload, parts, {})
            is_new = meant is not None and meant != parts[-1]
            raise ConfigurationError(
                f"no key {key:.100}",
                remedy=f"did you mean {meant}?" if is_new else f"the sections: {', '.join(_sections())}, plan",
            )
        here = field.annotation
    if not _is_section(here):
        return "\n".join(_entry(inside[-1], _default(field), _comment(field), [], WIDTH)) + "\n"
    return f"# {key}: {_first_line(here)}\n{commented_yaml(_defaults(here), here)}"


def template() -> str:
    """A whole config of every key at its default, for a folder of documents."""
    content = _defaults(Workload)
    content |= {"name": "mine", "description": ""}
    content["data"]["documents"] = "path/to/documents"
    head = (
        "# A config for `forge run`. Every key stands here at its default; leave out what you do not change.\n"
        "# `forge init FOLDER` writes one for your documents and this machine.\n"
    )
    return head + commented_yaml(content, leave_out=("gate",))


def _entry(name: str, value: Any, comment: str, above: list[str], width: int) -> list[str]:
    entry = f"{name}:" if value is PydanticUndefined else dump_entry(name, value)
    comment = f"required: {comment}" if value is PydanticUndefined else comment
    first, *others = entry.splitlines()
    if not comment:
        return [*above, first, *others]
    if not others and len(first) + len(comment) + 4 <= width:
        return [*above, f"{first}  # {comment}"]
    return [*above, f"# {comment}", first, *others]


def _comment(field: Any) -> str:
    text = field.description or ""
    values = _literals(field.annotation)
    if values and not all(str(value) in text for value in values):
        text += f" ({', '.join(map(str, values))})"
    return text


def _literals(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def _defaults(model: Any) -> dict[str, Any]:
    return {
        name: _defaults(field.annotation) if _is_section(field.annotation) else _default(field)
        for name, field in model.model_fields.items()
    }


def _default(field: Any) -> Any:
    value = field.get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _sections() -> list[str]:
    return [name for name, field in Workload.model_fields.items() if _is_section(field.annotation)]


def _first_line(model: Any) -> str:
    return str(model.__doc__ or "").strip().partition("\n")[0].replace("``", "")
