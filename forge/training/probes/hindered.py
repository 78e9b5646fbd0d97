"""A command whose training has little GPU memory or is watched.

    python -m forge.training.probes.hindered [--cap-gib G] [--trace FILE] train ...

    --cap-gib G     the allocator's share of the GPU's memory, however much is free
    --trace FILE    a line for every call of the trainer's callbacks: its name and the optimizer steps done

A process that ``train`` becomes after running out of memory is hindered in the same way.
"""

from __future__ import annotations

import sys
from typing import Any

CAP, TRACE = "--cap-gib", "--trace"


def main() -> None:
    """Take the options off the command line and run the rest."""
    options = {}
    while len(sys.argv) > 2 and sys.argv[1] in (CAP, TRACE):
        name = sys.argv.pop(1)
        options[name] = sys.argv.pop(1)
    from forge.training import attempt, cli

    build = attempt.build_trainer

    def built(module: Any, job: Any) -> Any:
        import torch

        if CAP in options:
            share = float(options[CAP]) * 2**30 / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        trainer = build(module, job)
        if TRACE in options:
            trainer.add_callback(_tracer(options[TRACE]))
        return trainer

    attempt.build_trainer = built
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
