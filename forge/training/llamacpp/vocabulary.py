"""What llama.cpp makes of text with a GGUF file's vocabulary. Only imported in a child process: it can crash.

Nothing is computed and no weights are loaded; :mod:`harness.export.probes.tokens` compares it with the tokenizer.
"""

from __future__ import annotations

from typing import Any

from forge.training.llamacpp.native import import_llama_cpp, reason
from forge.training.system.errors import CheckError

_model: Any = None


def open_vocabulary(path: str) -> dict[str, Any]:
    """Load a vocabulary and tell its special tokens. Raises :class:`CheckError` with llama.cpp's reason.

    ``ends``: text of every token that llama.cpp takes for the end of a text or turn, by its id.
    """
    global _model
    llama_cpp = import_llama_cpp()
    try:
        _model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    except (ValueError, RuntimeError) as error:
        raise CheckError(f"llama.cpp refuses the vocabulary of {path}: {reason()}") from error
    vocabulary = llama_cpp.llama_model_get_vocab(_model.model)
    metadata = _model.metadata

    def number(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}")
        return None if value is None else int(value)

    ends = [i for i in range(_model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
    return {
        "size": _model.n_vocab(),
        "pre_tokenizer": metadata.get("tokenizer.ggml.pre"),
        "chat_template": metadata.get("tokenizer.chat_template"),
        "written": {name: number(f"{name}_token_id") for name in ("bos", "eos", "padding")},
        "used": {
            "bos": int(llama_cpp.llama_vocab_bos(vocabulary)),
            "eos": int(llama_cpp.llama_vocab_eos(vocabulary)),
            "padding": int(llama_cpp.llama_vocab_pad(vocabulary)),
        },
        "adds_bos": bool(llama_cpp.llama_vocab_get_add_bos(vocabulary)),
        "adds_eos": bool(llama_cpp.llama_vocab_get_add_eos(vocabulary)),
        "ends": {str(i): _model.detokenize([i], special=True).decode("utf-8", "replace") for i in ends},
    }


def tokenize(texts: list[str], special: bool) -> dict[str, Any]:
    """Ids of each text as a prompt would get them, with BOS where the file asks for it; ``special``: control
    tokens written out are taken for what they name."""
    return {"ids": [_model.tokenize(text.encode(), add_bos=True, special=special) for text in texts]}


def render(conversations: list[list[dict[str, str]]]) -> dict[str, Any]:
    """Each conversation by the file's own template as llama-cpp-python renders it, up to the answer, and its ids."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = _model.metadata.get("tokenizer.chat_template")
    if template is None:
        raise CheckError("the file has no chat template", remedy="export it from a tokenizer that has one")

    def piece(token: int) -> str:
        return str(_model._model.token_get_text(token)) if token >= 0 else ""

    formatter = Jinja2ChatFormatter(
        template=template, eos_token=piece(_model.token_eos()), bos_token=piece(_model.token_bos())
    )
    rendered = [formatter(messages=messages) for messages in conversations]  # type: ignore[arg-type]
    ids = [_model.tokenize(text.prompt.encode(), add_bos=not text.added_special, special=True) for text in rendered]
    return {"texts": [text.prompt for text in rendered], "ids": ids}
