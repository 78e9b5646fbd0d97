"""llama.cpp's native code and GGUF reader. Only ever imported in a child process: both can crash.

The functions return plain JSON values; :mod:`~forge.training.export.gguf` is the parent's side.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections import Counter
from typing import Any

from forge.training.config.quantizations import GGUF_TYPES
from forge.training.llamacpp.install import llama_cpp_tree
from forge.training.system.errors import CheckError, MachineError
from forge.training.system.files import disk_errors

_MAX_BLOCK_COUNT = 512  # 10**6 makes llama.cpp abort; the largest known models have about 130
_PROBE_BYTES = 1 << 20
_WARNING = 3  # ggml.h: 0 none, 1 debug, 2 info, 3 warning, 4 error, 5 continues the line before
_CONTINUED = 5

_log_lines: list[str] = []
_log_callback: Any = None  # llama.cpp holds a bare pointer to it
_last_level = 0


def import_llama_cpp() -> Any:
    """llama_cpp with a log callback of ours: its own has ggml's level numbers wrong and hides errors.

    Raises :class:`MachineError` where it is not installed.
    """
    global _log_callback
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # absent, or its library does not load
        cause = (str(error).split("\n")[-1].strip() or str(error).strip())[:300]
        raise MachineError(f"llama-cpp-python cannot be loaded: {cause}", remedy="run `make setup`") from error
    if _log_callback is None:

        def keep_warnings(level: int, text: bytes, _: Any) -> None:
            global _last_level
            _last_level = _last_level if level == _CONTINUED else level
            if _last_level >= _WARNING:
                decoded = text.decode("utf-8", "replace")
                sys.stderr.write(decoded)
                if decoded.strip(". \n"):
                    _log_lines.append(decoded.strip())

        _log_callback = llama_cpp.llama_log_callback(keep_warnings)
        llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
    return llama_cpp


def reason() -> str:
    """What llama.cpp last complained about, on one line."""
    return " / ".join(_log_lines[-3:]) or "it gives no reason"


def import_gguf() -> Any:
    """The gguf package of the llama.cpp tree; PyPI's is another, older one under the same version."""
    sys.path.insert(0, str(llama_cpp_tree() / "gguf-py"))
    import gguf

    return gguf


def raise_if_full(target: str) -> None:
    """Raise :class:`DiskError` if no more can be written behind what a failed program has written.

    llama.cpp and numpy say that a write fell short, and not why: a full disk, a quota or a limit of the file's size.
    """
    with disk_errors(target), open(target, "ab") as stream:
        stream.write(bytes(_PROBE_BYTES))
        stream.flush()
        os.fsync(stream.fileno())


def status() -> dict[str, Any]:
    """Version of llama-cpp-python, once its library is loaded and initialised, and whether it can use a GPU here."""
    llama_cpp = import_llama_cpp()
    llama_cpp.llama_backend_init()
    return {"version": llama_cpp.__version__, "uses_gpu": bool(llama_cpp.llama_supports_gpu_offload())}


def quantize(source: str, target: str, quantization: str, imatrix: str | None = None) -> dict[str, Any]:
    """Quantise a GGUF file. The target may be half-written after an error: the parent removes it.

    ``imatrix``: what :func:`~forge.training.llamacpp.importance.collect_importance` wrote.
    """
    llama_cpp = import_llama_cpp()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization.upper()}")
    parameters.nthread = len(os.sched_getaffinity(0))
    if imatrix is not None:
        from forge.training.llamacpp.importance import imatrix_entries

        entries = imatrix_entries(llama_cpp, imatrix)
        parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    _log_lines.clear()
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)):
        raise_if_full(target)
        raise CheckError(f"llama.cpp cannot quantise {source} to {quantization}: {reason()}")
    return {}


def verify(path: str, adapter: bool, base: str | None) -> dict[str, Any]:
    """Structure by GGUFReader, then loading with every value checked, then one token evaluated."""
    report, fields = _read_structure(path)
    kind = fields.get("general.type")
    if (kind == "adapter") != adapter:
        raise CheckError(f"{path} holds {kind or 'no general.type'}, not {'an adapter' if adapter else 'a model'}")
    if not adapter:
        _check_model_fields(path, report, fields)
        _load(path, None)
    elif base is not None:
        _load(base, path)
    return report


def _read_structure(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    gguf = import_gguf()
    fields: dict[str, Any] = {}
    try:
        reader = gguf.GGUFReader(path)
        for key, field in reader.fields.items():
            is_array = bool(field.types) and field.types[0] == gguf.GGUFValueType.ARRAY
            fields[key] = len(field.data) if is_array else field.contents()
    except Exception as error:  # IndexError, ValueError, KeyError, OverflowError, ... all mean a bad file
        cause = f"{type(error).__name__}: {error}"
        raise CheckError(f"{path} is not a readable GGUF file: {cause:.500}", remedy="make it again") from error
    if not reader.tensors:
        raise CheckError(f"{path} holds no tensors")
    file_type = fields.get("general.file_type")
    known: dict[Any, str] = {int(member): member.name for member in gguf.LlamaFileType}
    name = known.get(file_type, str(file_type)).removeprefix("MOSTLY_").removeprefix("ALL_").lower()
    fallbacks = GGUF_TYPES[name].fallbacks if name in GGUF_TYPES else frozenset()
    report = {
        "architecture": fields.get("general.architecture"),
        "file_type": name,
        "num_tensors": len(reader.tensors),
        "tensor_types": dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
        "fallbacks": [
            f"{tensor.name} ({tensor.tensor_type.name})"
            for tensor in reader.tensors
            if len(tensor.shape) > 1 and tensor.tensor_type.name in fallbacks
        ],
        "pre_tokenizer": fields.get("tokenizer.ggml.pre"),
        "num_vocabulary_tokens": fields.get("tokenizer.ggml.tokens"),
        "has_chat_template": "tokenizer.chat_template" in fields,
    }
    return report, fields


def _check_model_fields(path: str, report: dict[str, Any], fields: dict[str, Any]) -> None:
    num_blocks = fields.get(f"{report['architecture']}.block_count")
    if not isinstance(num_blocks, int) or not 0 < num_blocks <= _MAX_BLOCK_COUNT:
        raise CheckError(f"{path}: block_count is {num_blocks}; expected 1 to {_MAX_BLOCK_COUNT}")
    needed = ["model", "tokens", "eos_token_id"]
    if fields.get("tokenizer.ggml.model") == "gpt2":  # byte-level BPE; without pre llama.cpp guesses a tokenisation
        needed += ["pre", "merges"]
    missing = [f"tokenizer.ggml.{key}" for key in needed if f"tokenizer.ggml.{key}" not in fields]
    if missing:
        raise CheckError(f"{path} lacks {', '.join(missing)}", remedy="its tokenizer was not converted; convert again")
    num_tokens = fields["tokenizer.ggml.tokens"]
    if not isinstance(num_tokens, int):
        raise CheckError(f"{path}: tokenizer.ggml.tokens is not a list")
    for key in ("eos_token_id", "bos_token_id", "padding_token_id"):
        token_id = fields.get(f"tokenizer.ggml.{key}")
        if token_id is not None and not (isinstance(token_id, int) and 0 <= token_id < num_tokens):
            raise CheckError(f"{path}: {key} {token_id} is outside the vocabulary")


def _load(path: str, adapter: str | None) -> None:
    """Load with check_tensors, which only the low-level interface offers, and evaluate one token."""
    llama_cpp = import_llama_cpp()
    _log_lines.clear()
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.check_tensors = True  # finds NaN and infinity, also those that f16's range made
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise CheckError(f"llama.cpp refuses {path}: {reason()}")
    context_parameters = llama_cpp.llama_context_default_params()
    context_parameters.n_ctx = context_parameters.n_batch = context_parameters.n_ubatch = 256
    context = llama_cpp.llama_init_from_model(model, context_parameters)
    if not context:
        raise CheckError(f"llama.cpp cannot create a context for {path}: {reason()}")
    if adapter is not None:
        loaded = llama_cpp.llama_adapter_lora_init(model, os.fsencode(adapter))
        if not loaded:  # llama-cpp-python tests `is None`, which a NULL pointer is not, and crashes later
            raise CheckError(f"llama.cpp refuses the adapter {adapter} for {path}: {reason()}")
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
        if llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)):
            raise CheckError(f"llama.cpp cannot apply the adapter {adapter} to {path}: {reason()}")
    token = (llama_cpp.llama_token * 1)(0)
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)):
        raise CheckError(f"llama.cpp cannot evaluate {path}: {reason()}")
    num_tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = llama_cpp.llama_get_logits(context)
    if not all(math.isfinite(logits[index]) for index in range(num_tokens)):
        raise CheckError(f"{path}: the logits of token 0 are not finite numbers")
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
