"""A command whose training has little GPU memory, is watched or repeats itself to the bit.

    python -m harness.reliability.probes.constrained_run [--cap-gib G] [--trace FILE] [--deterministic] train ...

    --cap-gib G        the allocator's share of the GPU's memory, however much is free
    --trace FILE       a line for every call of the trainer's callbacks: its name and the optimizer steps done
    --deterministic    no kernel that is chosen by timing or adds in whatever order its blocks end; one that knows no
                       other way is an error

A process that ``train`` becomes after running out of memory is hindered in the same way.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge.training.backends import BackendModule
    from forge.training.backends.job import StepObserver, TrainingJob

CAP, TRACE, DETERMINISTIC = "--cap-gib", "--trace", "--deterministic"


def main() -> None:
    """Take the options off the command line and run the rest."""
    options = {}
    while len(sys.argv) > 2 and sys.argv[1] in (CAP, TRACE, DETERMINISTIC):
        name = sys.argv.pop(1)
        options[name] = "" if name == DETERMINISTIC else sys.argv.pop(1)
    if DETERMINISTIC in options:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA begins; PyTorch refuses without it
    from forge.training import cli
    from forge.training.train import run

    build = run.build_trainer

    def built(module: BackendModule, job: TrainingJob, observer: StepObserver) -> Any:
        import torch

        if CAP in options:
            share = float(options[CAP]) * 2**30 / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        if DETERMINISTIC in options:
            torch.use_deterministic_algorithms(True)  # warnings alone would leave SDPA's backward as it is
        trainer = build(module, job, observer)
        if TRACE in options:
            trainer.add_callback(_tracer(options[TRACE]))
        return trainer

    run.build_trainer = built  # the seam: see there
    cli.main()


def _tracer(path: str) -> Any:
    """A callback that notes every event as it comes."""
    from transformers import TrainerCallback

    stream = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - lives as long as the process

    def noted(name: str) -> Any:
        def event(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
            stream.write(f"{name} {state.global_step}\n")

        return event

    events = [name for name in vars(TrainerCallback) if name.startswith("on_")]
    return type("Tracer", (TrainerCallback,), {name: noted(name) for name in events})()


if __name__ == "__main__":
    main()
