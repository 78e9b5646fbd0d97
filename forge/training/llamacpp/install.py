"""Where llama.cpp is: one commit's converter and native library, both from one source distribution."""

from __future__ import annotations

import ast
import os
from importlib.util import find_spec
from pathlib import Path

from forge.training.llamacpp.parent import run_child
from forge.training.system.environment import package_version
from forge.training.system.errors import MachineError
from forge.training.system.files import cache_dir

VERSION = "0.3.36"  # of llama-cpp-python
COMMIT = "0c1e57098b"  # of llama.cpp in its source distribution
_NEEDED = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/__init__.py", "gguf-py/gguf/__init__.py")
_REMEDY = "run `make setup`, or point FORGE_LLAMA_CPP at a llama.cpp source tree of the same commit"


def llama_cpp_tree() -> Path:
    """The folder with llama.cpp's converter: ``$FORGE_LLAMA_CPP``, else where set-up unpacked it.

    Raises :class:`MachineError` if it is absent or incomplete.
    """
    given = os.environ.get("FORGE_LLAMA_CPP")
    tree = Path(given).expanduser() if given else cache_dir() / f"llama_cpp_python-{VERSION}" / "llama.cpp"
    tree = tree.absolute()
    missing = [name for name in _NEEDED if not (tree / name).is_file()]
    if len(missing) == len(_NEEDED):
        raise MachineError(f"llama.cpp's converter is not at {tree}", remedy=_REMEDY)
    if missing:
        raise MachineError(
            f"llama.cpp's converter at {tree} is incomplete: {', '.join(missing)} missing", remedy=_REMEDY
        )
    return tree


def require_llama_cpp() -> None:
    """Raise :class:`MachineError` if the converter or the quantiser is missing, without loading either."""
    llama_cpp_tree()
    _require_version(package_version("llama_cpp_python") if find_spec("llama_cpp") is not None else None)


def load_llama_cpp() -> None:
    """Look for the converter and load the native library in a child process.

    Raises :class:`MachineError`, :class:`CheckError` if the child dies of it.
    """
    llama_cpp_tree()
    _require_version(run_child("status", {}, doing="load llama.cpp", limit_seconds=120.0).value["version"])


def uses_gpu() -> bool:
    """Whether the native library was compiled for a GPU and finds one. Asked in a child process."""
    return bool(run_child("status", {}, doing="load llama.cpp", limit_seconds=120.0).value.get("uses_gpu"))


def _require_version(version: str | None) -> None:
    if version is None:
        raise MachineError("llama-cpp-python is missing: it quantises and verifies", remedy="run `make setup`")
    if version != VERSION:
        raise MachineError(
            f"llama-cpp-python is {version}; the converter belongs to {VERSION}", remedy="run `make setup`"
        )


def supported_architectures() -> frozenset[str]:
    """The names of ``architectures`` in a config.json that llama.cpp's converter knows as text models.

    Read from its source without importing it, which would import torch.
    """
    source = llama_cpp_tree() / "conversion" / "__init__.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "TEXT_MODEL_MAP":
            assert node.value is not None
            return frozenset(ast.literal_eval(node.value))
    raise MachineError(f"{source} has no TEXT_MODEL_MAP: not the llama.cpp commit {COMMIT}", remedy=_REMEDY)
