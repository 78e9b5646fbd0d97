"""The trained base that the parity ladder and the export suite share: made once, the same on every machine of a kind.

    python -m harness.trained_base small

On a GPU the backward pass of attention adds up in any order: a base that is trained twice is two bases, and runs on
them cannot be compared. With PyTorch's deterministic algorithms the same GPU model and the same packages give the same
weights to the bit, so a gate may continue on another machine. The command prints the base's directory. A base that is
there already is taken as it is, however it was made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from forge.training.system.environment import ROOT
from forge.training.system.errors import MachineError
from forge.training.system.files import read_json_object, write_json
from harness.measurement.environment import EVALUATOR, environment, interpreter
from harness.measurement.process import run_process
from harness.measurement.results import Store

BASE = "small"
_LIMIT_SECONDS = 900.0


def shared_folder(store: Store) -> Path:
    """Where the suites keep what they share: beside the store and not in it, because a store may be committed."""
    return store.beside("parity")


def trained_base(name: str, store: Store, *, measures: bool, announce: Callable[[str], None]) -> Path | None:
    """The base's directory, made now if need be (`small`: some minutes on a GPU).

    ``name``: a name that `forge base` knows, or a directory. By its directory and not its name a base is in the key of
    every run by content. ``None``: it is not made, and ``measures`` says that nothing may be made. Raises
    :class:`MachineError` where it cannot be made.
    """
    if Path(name).is_dir():
        return Path(name).absolute()
    note = shared_folder(store) / "base.json"
    made = read_json_object(note) if note.is_file() else {}
    if made.get("name") == name and Path(str(made.get("directory"))).is_dir():
        return Path(str(made["directory"]))
    if not measures:
        return None
    announce(f"the base {name}")
    exit_code, last_line = run_in_evaluator("harness.trained_base", name)
    if exit_code or not Path(last_line).is_dir():
        raise MachineError(f"the base {name} is not available: {last_line}", remedy=f"`forge base {name}` says why")
    write_json(note, {"name": name, "directory": last_line})
    return Path(last_line)


def run_in_evaluator(module: str, *arguments: str) -> tuple[int, str]:
    """Exit code and last line of ``python -m MODULE ARGUMENTS`` in the evaluator's interpreter."""
    ended = run_process(
        [interpreter(EVALUATOR), "-m", module, *arguments],
        environment=environment(EVALUATOR),
        directory=ROOT,
        time_limit_seconds=_LIMIT_SECONDS,
    )
    lines = ended.output.decode("utf-8", "replace").strip().splitlines()
    return ended.exit_code, lines[-1] if lines else "it printed nothing"


def main() -> None:
    """Make or find the base named by the only argument."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read at cuBLAS's first call
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    # Only matrix products and a softmax are left. The memory-efficient kernels have no deterministic backward pass, and
    # the flash kernels' is not used while PyTorch only warns (ATen, attention_backward.cu).
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    from forge.training import cli

    sys.argv[1:1] = ["base"]
    cli.main()


if __name__ == "__main__":
    main()
