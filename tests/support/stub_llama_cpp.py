"""Stand-ins for llama.cpp's converter and for llama-cpp-python that misbehave as a test wants, in a moment.

The real ones take seconds to import. Everything around them (child process, protocol, limits,
clean-up, verification by the real llama.cpp) is the project's own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.training.llamacpp.install import llama_cpp_tree

# What a converter may do, as Python; GOOD is a well-made file, TARGET the one to be written.
COPIES = "shutil.copyfile(GOOD, TARGET)"
TRUNCATES = "open(TARGET, 'wb').write(open(GOOD, 'rb').read()[:-5000])"
WRITES_NOTHING = "pass"
DIES = "open(TARGET, 'wb').write(b'GGUF' * 999); os.kill(os.getpid(), signal.SIGKILL)"
EXITS = "print('the reason is on this line'); open(TARGET, 'wb').write(b'GGUF'); sys.exit(3)"
RAISES = "open(TARGET, 'wb').write(b'GGUF'); raise ZeroDivisionError('the reason')"
HANGS = "open(TARGET, 'wb').write(b'GGUF' * 999); print('hanging', flush=True); time.sleep(600)"
ASKS_FOR_A_TOKENIZER = (
    "from conversion.base import TextModel; from types import SimpleNamespace as New; "
    "text = open(sys.argv[-1] + '/tokenizer.json').read().replace('N}]?', 'N}]??'); "  # another regular expression
    "TextModel.get_vocab_base_pre(None, New(backend_tokenizer=New(to_str=lambda: text)))"
)
TELLS_ITS_ENVIRONMENT = "print(dict(os.environ)); sys.exit(3)"

_SCRIPT = """
import os, shutil, signal, sys, time
GOOD = {good!r}

def main():
    TARGET = sys.argv[sys.argv.index("--outfile") + 1]
    {action}

if __name__ == "__main__":
    main()
"""


def use_converter(folder: Path, good: Path, action: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama.cpp tree whose converters do ``action``, made in ``folder`` and put in the real one's place."""
    tree = folder / "llama.cpp"
    (tree / "conversion").mkdir(parents=True, exist_ok=True)
    if not (tree / "gguf-py").exists():
        (tree / "gguf-py").symlink_to(llama_cpp_tree() / "gguf-py")
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (tree / name).write_text(_SCRIPT.format(good=str(good), action=action))
    known = 'TEXT_MODEL_MAP: dict[str, str] = {"Qwen2ForCausalLM": "qwen"}\n'
    (tree / "conversion" / "__init__.py").write_text(known)
    unknown = "class TextModel:\n    def get_vocab_base_pre(self, tokenizer):\n        raise NotImplementedError\n"
    (tree / "conversion" / "base.py").write_text(unknown)  # as llama.cpp's does where no hash is known
    monkeypatch.setenv("FORGE_LLAMA_CPP", str(tree))
    return tree


def use_library(folder: Path, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A llama-cpp-python that does ``action`` when a child process imports it."""
    package = folder / "shadow" / "llama_cpp"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(f"import ctypes, sys, time\n{action}\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
