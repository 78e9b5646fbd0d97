"""YAML with the surprises taken out, in bounded time and memory.

Plain scalars mean what YAML 1.2's core schema says: ``1e-4`` is a number (PyYAML follows 1.1, where it
is text), ``no`` and ``on`` are text, ``1:30`` is no number of base 60 and a date is text. Refused:
duplicate keys, keys that are not text, aliases (a few lines of them are gigabytes), tags such as
``!!python/object``, deep nesting, and files too large to be a config.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from forge.training.system.errors import ConfigurationError

MAX_BYTES = 64 << 10  # PyYAML reads about 100 kB a second
MAX_DEPTH = 20
_NUMBER_CHARACTERS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.events.AliasEvent):
            raise _refusal("aliases are not allowed", event)
        if getattr(event, "tag", None) is not None:
            raise _refusal("tags are not allowed", event)
        if self.depth > MAX_DEPTH:
            raise _refusal(f"nested more than {MAX_DEPTH} deep", event)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _refusal(problem: str, event: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, event.start_mark)


# https://yaml.org/spec/1.2.2/#1032-tag-resolution; no config needs a number of more than 40 digits.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]{1,40}", _NUMBER_CHARACTERS),
    ("float", r"[-+]?(?:\.[0-9]{1,40}|[0-9]{1,40}(?:\.[0-9]{0,40})?)(?:[eE][-+]?[0-9]{1,4})?", _NUMBER_CHARACTERS),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", _NUMBER_CHARACTERS),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})\Z"), _first)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r:.60} is not text", key_node.start_mark)
        if key in result:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r:.60} appears twice", key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # 1.1's constructor takes 0777 for octal


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class _Dumper(yaml.SafeDumper):
    """Quotes text that is something else to a reader of YAML 1.1 (``no``, ``1:30``) or of 1.2 (``1e-4``)."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *_Loader.yaml_implicit_resolvers.get(first, ())]
    for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | _Loader.yaml_implicit_resolvers.keys()
}


def dump_yaml(content: dict[str, Any]) -> str:
    """Plain values as YAML that :func:`load_yaml` reads back as they were, in their order."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def dump_entry(key: str, value: Any) -> str:
    """``key: value`` as :func:`dump_yaml` has it, lists and mappings of plain values on one line."""
    is_plain = not any(isinstance(item, dict) for item in value) if isinstance(value, list) else isinstance(value, dict)
    style = None if is_plain else False
    dumped = yaml.dump(
        {key: value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=style, width=10**6
    )
    return str(dumped)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one mapping from a YAML file of at most 64 KiB. Raises :class:`ConfigurationError`."""
    try:
        with open(path, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigurationError(f"{path} is larger than {MAX_BYTES:,} bytes; a config is a few kilobytes")
    try:
        content = yaml.load(raw.decode("utf-8-sig"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigurationError(f"{where}: not usable YAML: {problem}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path}: expected a mapping of keys to values, found {type(content).__name__}")
    return content


def parse_scalar(text: str) -> Any:
    """The value of a ``--set key=value``: YAML's reading of it, the text itself where there is none."""
    if len(text) > MAX_BYTES:
        return text
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
