"""A GGUF model's logits and greedy continuations. Only imported in a child process: llama.cpp can crash.

As :mod:`.chat`, but tokens in and numbers out: what :mod:`harness.export.probes.divergence` compares.
"""

from __future__ import annotations

from typing import Any

from forge.training.llamacpp.native import import_llama_cpp, reason
from forge.training.system.errors import CheckError, DataError

_GRAIN = 256  # llama.cpp rounds a context up to it, llama-cpp-python's array of logits has the rows asked for
_model: Any = None


def open_model(path: str, lora: str | None, context_tokens: int, cache: str) -> dict[str, Any]:
    """Load a model that keeps every token's logits. ``cache``: f16, llama.cpp's own default, or f32.

    Raises :class:`CheckError` with llama.cpp's reason.
    """
    global _model
    llama_cpp = import_llama_cpp()
    kind = {"f16": llama_cpp.GGML_TYPE_F16, "f32": llama_cpp.GGML_TYPE_F32}[cache]
    rounded = -(-context_tokens // _GRAIN) * _GRAIN
    try:
        _model = llama_cpp.Llama(
            path, lora_path=lora, n_ctx=rounded, logits_all=True, verbose=False, type_k=kind, type_v=kind
        )
    except (ValueError, RuntimeError) as error:
        raise CheckError(f"llama.cpp refuses {path}: {reason()}") from error
    if lora is not None and not _model._lora_adapter:  # NULL, which llama-cpp-python takes for success
        raise CheckError(f"llama.cpp refuses the adapter {lora} for {path}: {reason()}")
    return {"vocabulary": _model.n_vocab()}


def write_logits(ids: list[int], rows: list[int], target: str) -> dict[str, Any]:
    """Evaluate a sequence and write the logits after ``rows`` of it: float32, (rows, vocabulary), without a header."""
    _evaluate(ids)
    _model.scores[rows].astype("<f4").tofile(target)
    return {}


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
