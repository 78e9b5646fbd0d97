"""An importance matrix: how much each input of each matrix matters on a text. Only imported in a child process.

What llama.cpp's own tool ``imatrix`` collects: the mean square of every input of every product with a weight, read
while the model evaluates the text. The quantiser weighs its errors by it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from forge.training.llamacpp import answers
from forge.training.llamacpp.native import import_llama_cpp, reason
from forge.training.system.errors import CheckError, DataError

_MUL_MAT = b"MUL_MAT"


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of the pinned commit's ggml.h, up to what is read of it."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class _Collector:
    """Adds up the squares of what goes into each product with a weight of the model."""

    def __init__(self, library: Any) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, int] = {}
        self.failure: str | None = None
        self._op_name = library.ggml_op_name
        self._op_name.restype, self._op_name.argtypes = ctypes.c_char_p, (ctypes.c_int,)
        self._get = library.ggml_backend_tensor_get
        self._get.restype = None
        self._get.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)

    def __call__(self, address: int, asks: bool, _: Any) -> bool:
        """llama.cpp asks for each operation whether it is wanted, and calls again when it is computed."""
        try:
            tensor = _Tensor.from_address(address)
            if self._op_name(tensor.op) != _MUL_MAT:
                return not asks
            name = _Tensor.from_address(tensor.src[0]).name.decode("utf-8", "replace")
            if name.endswith(".weight") and not asks:
                self._add(name, tensor.src[1])
            return name.endswith(".weight") or not asks
        except Exception as error:  # it may not pass through llama.cpp's frames
            self.failure = f"{type(error).__name__}: {error}"
            return False

    def _add(self, name: str, address: int) -> None:
        inputs = _Tensor.from_address(address)
        width, rows = inputs.ne[0], inputs.ne[1] * inputs.ne[2] * inputs.ne[3]
        if inputs.type != 0 or inputs.nb[0] != 4 or inputs.nb[1] != 4 * width:
            raise ValueError(f"the inputs of {name} are no rows of float32")
        values = np.empty((rows, width), dtype=np.float32)
        self._get(address, values.ctypes.data_as(ctypes.c_void_p), 0, values.nbytes)
        squares = np.einsum("ij,ij->j", values, values, dtype=np.float64)
        self.sums[name] = self.sums.get(name, 0.0) + squares
        self.counts[name] = self.counts.get(name, 0) + rows


def collect_importance(
    path: str, target: str, sequences: list[list[int]], progress: Callable[[str], None]
) -> dict[str, Any]:
    """Evaluate the sequences of ids with a file and write each weight's mean squared inputs to ``target`` (.npz).

    Raises :class:`CheckError` where llama.cpp refuses the file or says nothing of its products.
    """
    llama_cpp = import_llama_cpp()
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so"))))
    collector = _Collector(library)
    callback = llama_cpp.ggml_backend_sched_eval_callback(collector)
    model = llama_cpp.llama_model_load_from_file(path.encode(), _on_the_cpu(llama_cpp))
    if not model:
        raise CheckError(f"llama.cpp refuses {path}: {reason()}")
    longest = max(map(len, sequences))
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = -(-longest // answers.GRAIN) * answers.GRAIN
    parameters.n_batch = parameters.n_ubatch = parameters.n_ctx
    parameters.cb_eval = callback
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise CheckError(f"llama.cpp cannot create a context for {path}: {reason()}")
    batch = llama_cpp.llama_batch_init(parameters.n_batch, 0, 1)
    for number, ids in enumerate(sequences, start=1):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        if llama_cpp.llama_decode(context, _whole_batch(llama_cpp, batch, ids)) or collector.failure:
            raise DataError(f"cannot collect an importance matrix with {path}: {collector.failure or reason()}")
        if number % 8 == 0:
            progress(f"importance matrix: {number} of {len(sequences)} sequences")
    if not collector.sums:
        raise CheckError(f"llama.cpp said nothing of the products in {path}: no importance matrix")
    means = {name: (total / collector.counts[name]).astype(np.float32) for name, total in collector.sums.items()}
    np.savez(target, allow_pickle=False, **means)
    return {"num_matrices": len(means), "num_tokens": sum(map(len, sequences))}


def _whole_batch(llama_cpp: Any, batch: Any, ids: list[int]) -> Any:
    """A sequence whose every token is predicted from: else the last layer computes the last token only."""
    batch.n_tokens = len(ids)
    for index, token in enumerate(ids):
        batch.token[index], batch.pos[index] = token, index
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        batch.logits[index] = True
    return batch


def _on_the_cpu(llama_cpp: Any) -> Any:
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    return parameters


def imatrix_entries(llama_cpp: Any, path: str) -> Any:
    """A stored importance matrix as llama.cpp's quantiser takes it: an array that a nameless entry ends.

    The array holds what its entries point to.
    """
    with np.load(path) as stored:
        values = {name: np.ascontiguousarray(stored[name], dtype=np.float32) for name in stored.files}
    entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, data) in zip(entries, values.items(), strict=False):
        entry.name, entry.size = name.encode(), data.size
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    entries.held = values
    return entries
