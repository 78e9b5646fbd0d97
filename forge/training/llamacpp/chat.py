"""A loaded GGUF model that replies. Only imported in a child process: it can crash."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

from forge.training.llamacpp.native import import_llama_cpp, reason
from forge.training.system.errors import CheckError, DataError

_NFC_PRE_TOKENIZERS = {"qwen2"}  # trained on NFC text, which llama.cpp does not make
_model: Any = None


def open_model(path: str, lora: str | None, context_tokens: int) -> dict[str, Any]:
    """Load a model, with an adapter applied if one is given. Raises :class:`CheckError` with llama.cpp's reason."""
    from jinja2 import TemplateError

    global _model
    llama_cpp = import_llama_cpp()
    try:
        _model = llama_cpp.Llama(path, lora_path=lora, n_ctx=context_tokens, verbose=False)
    except TemplateError as error:
        raise CheckError(f"the chat template of {path} is not readable: {error}") from error
    except (ValueError, RuntimeError) as error:
        raise CheckError(f"llama.cpp refuses {path}: {reason()}") from error
    if lora is not None and not _model._lora_adapter:  # NULL, which llama-cpp-python takes for success
        raise CheckError(f"llama.cpp refuses the adapter {lora} for {path}: {reason()}")
    if "tokenizer.chat_template" not in _model.metadata:  # llama-cpp-python would silently use Llama 2's
        raise CheckError(f"{path} has no chat template", remedy="export it from a tokenizer that has one")
    return {"name": _model.metadata.get("general.name", "")}


def reply(messages: list[dict[str, str]], max_tokens: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """The greedy answer to a conversation, by the model's own template; pieces go to ``progress`` as they come."""
    from jinja2 import TemplateError

    if _model.metadata.get("tokenizer.ggml.pre") in _NFC_PRE_TOKENIZERS:
        messages = [{**message, "content": unicodedata.normalize("NFC", message["content"])} for message in messages]
    try:
        pieces = []
        for chunk in _model.create_chat_completion(
            messages, temperature=0.0, repeat_penalty=1.0, max_tokens=max_tokens, stream=True
        ):
            text = chunk["choices"][0]["delta"].get("content") or ""
            if text:
                pieces.append(text)
                progress(text)
    except TemplateError as error:
        raise CheckError(f"the file's chat template cannot write this conversation: {error}") from error
    except ValueError as error:
        remedy = "shorten the prompt, or allow a longer context"
        raise DataError(f"the model cannot answer: {error}", remedy=remedy) from error
    return {"text": "".join(pieces)}
