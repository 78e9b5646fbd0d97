"""What a loaded GGUF file answers: replies, logits, ids of text. Only imported in a child process: it can crash.

A child process opens one file, for one of these. What :mod:`harness.export.probes` compares comes from here.
"""

from __future__ import annotations

import re
import signal
import unicodedata
from collections.abc import Callable
from typing import Any

from forge.training.llamacpp.native import import_llama_cpp, reason
from forge.training.system.errors import CheckError, ConfigurationError, DataError

_NFC_PRE_TOKENIZERS = {"qwen2"}  # trained on NFC text, which llama.cpp does not make
GRAIN = 256  # llama.cpp rounds a context up to it, llama-cpp-python's array of logits has the rows asked for
_TOO_LONG = re.compile(r"Requested tokens \((\d+)\) exceed context window of (\d+)")  # llama-cpp-python's words
_model: Any = None


def _open(path: str, lora: str | None = None, **options: Any) -> None:
    """Load the file, with an adapter applied if one is given. Raises :class:`CheckError` with llama.cpp's reason."""
    from jinja2 import TemplateError

    global _model
    llama_cpp = import_llama_cpp()
    try:
        _model = llama_cpp.Llama(path, lora_path=lora, verbose=False, **options)
    except TemplateError as error:
        raise CheckError(f"the chat template of {path} is not readable: {error}") from error
    except (ValueError, RuntimeError) as error:
        raise CheckError(f"llama.cpp refuses {path}: {reason()}") from error
    if lora is not None and not _model._lora_adapter:  # NULL, which llama-cpp-python takes for success
        raise CheckError(f"llama.cpp refuses the adapter {lora} for {path}: {reason()}")


def _require_chat_template(path: str) -> str:
    template = _model.metadata.get("tokenizer.chat_template")
    if template is None:  # llama-cpp-python would use Llama 2's in silence
        raise CheckError(f"{path} has no chat template", remedy="export it from a tokenizer that has one")
    return str(template)


def open_chat(
    path: str, lora: str | None, context_tokens: int, is_insisted: bool, free_bytes: int | None, gpu_layers: int
) -> dict[str, Any]:
    """Load a model for :func:`reply`; what it holds: ``context_tokens``, the model's ``positions``, ``on_gpu``.

    The context is ``context_tokens``, unless ``is_insisted`` at most the model's positions and what half of
    ``free_bytes`` holds of keys and values. Raises :class:`CheckError`, also for a file without a chat template, and
    :class:`ConfigurationError` for a context that the model does not have.
    """
    _open(path, vocab_only=True)
    positions, token_bytes = _number("context_length"), _cache_bytes()
    _model.close()
    if positions and is_insisted and context_tokens > positions:
        raise ConfigurationError(
            f"--context {context_tokens:,} is more than the {positions:,} positions that this model has",
            remedy=f"at most --context {positions}",
        )
    if not is_insisted:
        context_tokens = min(context_tokens, positions or context_tokens)
        if free_bytes is not None and token_bytes:
            context_tokens = max(GRAIN, min(context_tokens, free_bytes // 2 // token_bytes // GRAIN * GRAIN))
    _open(path, lora, n_ctx=context_tokens, n_gpu_layers=gpu_layers)
    _require_chat_template(path)
    return {
        "name": _model.metadata.get("general.name", ""),
        "context_tokens": context_tokens,
        "positions": positions,
        "on_gpu": bool(gpu_layers and import_llama_cpp().llama_supports_gpu_offload()),
    }


def _number(key: str) -> int | None:
    """One of the loaded file's own sizes, ``None`` where it has none or one per layer."""
    value = _model.metadata.get(f"{_model.metadata.get('general.architecture')}.{key}", "")
    return int(value) if value.isdigit() else None


def _cache_bytes() -> int | None:
    """Bytes of keys and values per token of context, in float16; ``None`` where the file does not say."""
    layers, heads, width = (_number(key) for key in ("block_count", "attention.head_count", "embedding_length"))
    if not layers or not heads or not width:
        return None
    of_keys = _number("attention.key_length") or width // heads
    of_values = _number("attention.value_length") or width // heads
    return 2 * layers * (_number("attention.head_count_kv") or heads) * (of_keys + of_values)


def reply(
    messages: list[dict[str, str]], max_tokens: int, sampling: dict[str, Any], progress: Callable[[str], None]
) -> dict[str, Any]:
    """The answer to a conversation, by the model's own template; pieces go to ``progress`` as they come.

    ``sampling``: arguments of llama-cpp-python's ``create_chat_completion``. ``is_cut``: it ended at ``max_tokens`` or
    at the end of the context; ``is_stopped``: SIGINT stopped it. Raises :class:`DataError` for a conversation longer
    than the context.
    """
    from jinja2 import TemplateError

    stops: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: stops.append(number))

    if _model.metadata.get("tokenizer.ggml.pre") in _NFC_PRE_TOKENIZERS:
        messages = [{**message, "content": unicodedata.normalize("NFC", message["content"])} for message in messages]
    finish = None
    try:
        pieces = []
        for chunk in _model.create_chat_completion(messages, max_tokens=max_tokens, stream=True, **sampling):
            choice = chunk["choices"][0]
            finish = choice["finish_reason"] or finish
            text = choice["delta"].get("content") or ""
            if text:
                pieces.append(text)
                progress(text)
            if stops:
                break
    except TemplateError as error:
        raise CheckError(f"the file's chat template cannot write this conversation: {error}") from error
    except ValueError as error:
        raise _too_long(error) from error
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return {"text": "".join(pieces), "is_cut": finish == "length", "is_stopped": bool(stops) and finish is None}


def _too_long(error: ValueError) -> DataError:
    counts = _TOO_LONG.search(str(error))
    if counts is None:
        return DataError(f"the model cannot answer: {error}")
    needed, window, positions = int(counts[1]), int(counts[2]), _number("context_length")
    shorter = "ask a shorter question, or begin a new conversation"
    if positions and window >= positions:
        remedy = f"that is all this model has, and --context cannot give more: {shorter}"
    else:
        most = f", at most {positions:,} with this model" if positions else ""
        remedy = f"forge chat --context N holds more{most}; or {shorter}"
    return DataError(
        f"the conversation has {needed:,} tokens, more than the context window of {window:,}", remedy=remedy
    )


def open_logits(path: str, lora: str | None, context_tokens: int, cache: str) -> dict[str, Any]:
    """Load a model that keeps every token's logits. ``cache``: f16, llama.cpp's own default, or f32.

    Raises :class:`CheckError`.
    """
    llama_cpp = import_llama_cpp()
    kind = {"f16": llama_cpp.GGML_TYPE_F16, "f32": llama_cpp.GGML_TYPE_F32}[cache]
    _open(path, lora, n_ctx=-(-context_tokens // GRAIN) * GRAIN, logits_all=True, type_k=kind, type_v=kind)
    return {"vocabulary": _model.n_vocab()}


def write_logits(ids: list[int], rows: list[int], target: str) -> dict[str, Any]:
    """Evaluate a sequence and write the logits after ``rows`` of it: float32, (rows, vocabulary), without a header."""
    logits(ids, rows).tofile(target)
    return {}


def logits(ids: list[int], rows: list[int]) -> Any:
    """Evaluate a sequence; the logits after ``rows`` of it, float32 of shape (rows, vocabulary)."""
    _evaluate(ids)
    return _model.scores[rows].astype("<f4")


def close() -> None:
    """Give the loaded file back."""
    _model.close()


def continue_greedily(ids: list[int], num_tokens: int, end_ids: list[int]) -> dict[str, Any]:
    """The most probable next token, again and again, until one of ``end_ids`` (left out) or ``num_tokens``."""
    produced: list[int] = []
    _evaluate(ids)
    while len(produced) < num_tokens:
        token = int(_model.scores[_model.n_tokens - 1].argmax())
        if token in end_ids:
            break
        produced.append(token)
        if len(produced) < num_tokens:
            _model.eval([token])
    return {"ids": produced}


def _evaluate(ids: list[int]) -> None:
    _model.reset()
    try:
        _model.eval(ids)
    except RuntimeError as error:
        raise DataError(f"llama.cpp cannot evaluate {len(ids)} tokens: {error}; {reason()}") from error


def open_vocabulary(path: str) -> dict[str, Any]:
    """Load a vocabulary without weights and describe its special tokens. Raises :class:`CheckError`.

    ``ends``: text of every token that llama.cpp takes for the end of a text or turn, by its id.
    """
    llama_cpp = import_llama_cpp()
    _open(path, vocab_only=True)
    vocabulary = llama_cpp.llama_model_get_vocab(_model.model)

    def number(name: str) -> int | None:
        value = _model.metadata.get(f"tokenizer.ggml.{name}")
        return None if value is None else int(value)

    ends = [i for i in range(_model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
    return {
        "size": _model.n_vocab(),
        "pre_tokenizer": _model.metadata.get("tokenizer.ggml.pre"),
        "chat_template": _model.metadata.get("tokenizer.chat_template"),
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


def tokenize(texts: list[str], special: bool, add_bos: bool = True) -> dict[str, Any]:
    """Ids of each text as a prompt would get them, with BOS where the file asks for it; ``special``: control
    tokens written out are taken for what they name. Without ``add_bos`` the text alone."""
    return {"ids": [_model.tokenize(text.encode(), add_bos=add_bos, special=special) for text in texts]}


def detokenize(sequences: list[list[int]]) -> dict[str, Any]:
    """The text of each sequence of ids, control tokens written out."""
    texts = [_model.detokenize(ids, special=True) if ids else b"" for ids in sequences]
    return {"texts": [text.decode("utf-8", "replace") for text in texts]}


def render(conversations: list[list[dict[str, str]]]) -> dict[str, Any]:
    """Each conversation by the file's own template as llama-cpp-python renders it, up to the answer, and its ids."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = _require_chat_template("the file")

    def piece(token: int) -> str:
        return str(_model._model.token_get_text(token)) if token >= 0 else ""

    formatter = Jinja2ChatFormatter(
        template=template, eos_token=piece(_model.token_eos()), bos_token=piece(_model.token_bos())
    )
    prompts = [formatter(messages=messages) for messages in conversations]  # type: ignore[arg-type]
    ids = [_model.tokenize(p.prompt.encode(), add_bos=not p.added_special, special=True) for p in prompts]
    return {"texts": [p.prompt for p in prompts], "ids": ids}
