"""Installed packages against the pins, the security floors and what the backend needs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from forge.training.backends import Backend, load_backend
from forge.training.checks.finding import Finding, failure, ok, warning
from forge.training.config.workload import Workload
from forge.training.system.environment import ROOT, package_version
from forge.training.system.errors import MachineError

# What training is made of; the rest of a requirements file only supports it.
_STACK = (
    *("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes"),
    *("unsloth", "unsloth_zoo", "xformers", "torchao", "tokenizers", "safetensors"),
)
_NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "tokenizers")
SECURITY_FLOORS = {
    "torch": ("2.6", "CVE-2025-32434: code from a pickle despite weights_only"),
    "transformers": ("5.3", "CVE-2026-4372: code from a config.json despite trust_remote_code=False"),
    "jinja2": ("3.1.6", "CVE-2025-27516: code from a chat template despite the sandbox"),
    "sentencepiece": ("0.2.1", "CVE-2026-1260: memory overwritten by a tokenizer.model"),
}
_CHILD_SECONDS = 120


def check_packages(workload: Workload, backend: Backend, has_gpu: bool) -> Iterator[Finding]:
    """Missing packages and floors are errors, other versions than the pinned warnings."""
    module = load_backend(backend)
    installed = {name: package_version(name) for name in (*_STACK, *module.PACKAGES)}
    needed = {*_NEEDED, *module.PACKAGES}
    if workload.model.quantization == "nf4" or workload.optimizer.is_8bit:
        needed.add("bitsandbytes")
    file = module.PINNED_BY or f"requirements-{'gpu' if has_gpu or module.NEEDS_GPU else 'cpu'}.txt"
    missing = [name for name, version in installed.items() if name in needed and version is None]
    for source, names in _by_file(missing, file).items():
        remedy = f"install {source}" if source else f"install {', '.join(names)}"
        if not has_gpu and (module.NEEDS_GPU or source == "requirements-gpu.txt"):
            remedy += " on a machine with a CUDA GPU"
        yield failure("packages", MachineError(f"not installed: {', '.join(names)}", remedy=remedy))
    pins = _read_pins(file)
    differing = [
        f"{name} {version} (pinned {pins[name]})"
        for name, version in installed.items()
        if name in pins and version is not None and version.partition("+")[0] != pins[name]
    ]
    if differing and module.PINNED_BY is not None:
        yield failure(
            "packages",
            MachineError(
                f"this interpreter is not the {backend} stack: " + ", ".join(differing),
                remedy=f"install {file} into an environment of its own and train with its python",
            ),
        )
    elif differing:
        yield warning("packages", ", ".join(differing), f"results can differ; {file} is the tested set")
    elif pins and not missing:
        yield ok("packages", f"as pinned in {file}")
    yield from _check_floors(backend, is_pinned=module.PINNED_BY is not None)


def _by_file(missing: list[str], file: str) -> dict[str, list[str]]:
    """The missing packages by the requirements file that holds them: ``file`` where it does, "" where none is here."""
    files = (file, "requirements-cpu.txt", "requirements-gpu.txt", "requirements-legacy.txt")
    by_file: dict[str, list[str]] = {}
    for name in missing:
        by_file.setdefault(next((each for each in files if name in _read_pins(each)), ""), []).append(name)
    return by_file


def _read_pins(file: str) -> dict[str, str]:
    """``name==version`` lines; empty where Forge is installed without its checkout."""
    path = ROOT / file
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    matches = (re.match(r"([A-Za-z0-9_.-]+)==([^\s;#]+)", line) for line in lines)
    return {match[1]: match[2] for match in matches if match}


def _check_floors(backend: Backend, *, is_pinned: bool) -> Iterator[Finding]:
    for name, (floor, why) in SECURITY_FLOORS.items():
        installed = package_version(name)
        if installed is None or _numbers(installed) >= _numbers(floor):
            continue
        message = f"{name} {installed} is below {floor} ({why})"
        if is_pinned:
            yield warning("security", message, f"train only models that you trust with {backend}")
        else:
            yield failure("security", MachineError(message, remedy=f"install {name} {floor} or newer"))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def check_attention(has_gpu: bool) -> Iterator[Finding]:
    """Which attention a GPU run uses. xformers is tried in a child process: its import can crash."""
    if not has_gpu:
        return
    if package_version("xformers") is not None and _xformers_loads():
        yield ok("attention", "xformers' compiled part loads: unsloth can use it; trl uses PyTorch's own")
        return
    installed = package_version("xformers")
    why = f"xformers {installed}'s compiled part does not load here" if installed else "xformers is not installed"
    flash = "flash-attn is installed" if find_spec("flash_attn") else "flash-attn is not installed"
    yield ok("attention", f"{why}, {flash}: PyTorch's scaled-dot-product attention is used instead")


def _xformers_loads() -> bool:
    code = "import sys, xformers._cpp_lib as lib; sys.exit(lib._cpp_library_load_exception is not None)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=_CHILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
