"""Everything that can be known about a config before hours are spent, all at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from forge.training.backends import Backend
from forge.training.checks.configuration import check_configuration
from forge.training.checks.data import check_data
from forge.training.checks.finding import Finding, exit_code, failure, guarded, print_findings
from forge.training.checks.machine import check_disk, check_gpu, check_llama_cpp, check_memory, check_wsl
from forge.training.checks.model import check_export, check_fit, check_tokenizer, find_base, is_made
from forge.training.checks.packages import check_attention, check_packages
from forge.training.config.workload import Workload
from forge.training.system.environment import describe_gpu
from forge.training.system.errors import ForgeError

__all__ = ["Finding", "check_workload", "exit_code", "print_findings"]


def check_workload(workload: Workload, backend: Backend, directory: Path | None = None) -> list[Finding]:
    """Check a config for a backend on this machine. Nothing is made, fetched or written.

    ``directory``: where the run will be, by default below the current one. torch is not imported.
    """
    return list(_findings(workload, backend, directory or Path.cwd()))


def _findings(workload: Workload, backend: Backend, directory: Path) -> Iterator[Finding]:
    gpu = describe_gpu()
    yield from guarded("configuration", partial(check_configuration, workload, backend))
    yield from guarded("data", partial(check_data, workload))
    try:
        base, found = find_base(workload, gpu is not None)
        yield from found
    except ForgeError as error:
        base = None
        yield failure("model", error)
    if base is not None:
        yield from guarded("model", partial(check_fit, workload, base))
        if is_made(base):
            yield from guarded("tokenizer", partial(check_tokenizer, base))
        yield from guarded("memory", partial(check_memory, workload, base, gpu))
        yield from guarded("disk", partial(check_disk, workload, base, directory))
        yield from guarded("export", partial(check_export, workload, base))
    yield from guarded("packages", partial(check_packages, workload, backend, gpu is not None))
    yield from guarded("GPU", partial(check_gpu, workload, backend, gpu))
    yield from guarded("attention", partial(check_attention, gpu is not None))
    yield from guarded("WSL2", partial(check_wsl, gpu))
    yield from guarded("llama.cpp", check_llama_cpp)
