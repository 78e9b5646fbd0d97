"""Is a model's chat template ChatML, and with which default system message? Found out by rendering it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forge.training.system.files import read_json_object

_USER = {"role": "user", "content": "a"}
_TALK = [
    {"role": "system", "content": "s"},
    _USER,
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def read_chat_template(model_dir: Path) -> str | None:
    """The Jinja chat template of a model directory, None if it has none. Raises :class:`DataError`."""
    beside = model_dir / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (model_dir / name).is_file():
            template = read_json_object(model_dir / name).get("chat_template")
            if isinstance(template, list):  # several, by name
                template = next((item.get("template") for item in template if item.get("name") == "default"), None)
            if isinstance(template, str):
                return template
    return None


def chatml_default_system(template: str) -> str | None:
    """The system message a ChatML template puts where none is given, ``""`` if it puts none.

    None if the template is not ChatML, that is, renders a conversation differently.
    """
    from jinja2 import TemplateError

    try:
        talk, alone = _render(template, _TALK), _render(template, [_USER])
    except (TemplateError, TypeError, ValueError):
        return None
    if talk != "".join(_chatml(message) for message in _TALK) + "<|im_start|>assistant\n":
        return None
    opening = alone.removesuffix(_chatml(_USER) + "<|im_start|>assistant\n")
    if opening == alone:
        return None
    system = opening.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
    fits = opening == (_chatml({"role": "system", "content": system}) if system else "")
    return system if fits and "{{" not in system and "<|" not in system else None


def _chatml(message: dict[str, str]) -> str:
    return f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"


def _render(template: str, messages: list[dict[str, str]]) -> str:
    """As transformers renders it, in a sandbox."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> Any:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True)
