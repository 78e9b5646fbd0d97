"""An interpreter for a dry run of the parity ladder on a CPU: ``python THIS_FILE -m MODULE ARGUMENTS``.

Everything is real (processes, inputs, training, evaluation, records) but that "legacy" and "unsloth" are today's TRL,
in the layouts that their plans give them. With ``-p tests.support.cpu_ladder``, and FORGE_GPU_PYTHON and
FORGE_LEGACY_PYTHON naming a program that starts this file, ``pytest -m gpu harness/parity`` is the gate's own command.
"""

from __future__ import annotations

import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def stand_in(name: str) -> Any:
    """A backend's module, made of TRL's but for its default plan."""
    from importlib import import_module

    from forge.training.backends import trl

    own = import_module(f"forge.training.backends.{name}")

    def without_unsloths(plan: Any) -> Any:
        checkpointing = "full" if plan.gradient_checkpointing == "offload" else plan.gradient_checkpointing
        return plan.model_copy(
            update={"gradient_checkpointing": checkpointing, "mlp_tile_tokens": None, "loss_chunk_gib": None}
        )

    return SimpleNamespace(
        DEFAULT_PLAN=own.DEFAULT_PLAN,
        LOSS_COUNTS_FIRST_LABELS=trl.LOSS_COUNTS_FIRST_LABELS,
        refuse=lambda workload, plan: trl.refuse(workload, without_unsloths(plan)),
        prepare=trl.prepare,
        build=lambda job, observer: trl.build(replace(job, plan=without_unsloths(job.plan)), observer),
    )


def main() -> None:
    """Run a module of forge with stand-ins for its backends; anything else as the real interpreter would."""
    if sys.argv[1:2] != ["-m"]:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    sys.path.insert(0, str(ROOT))
    from forge.training import backends

    backends.load_backend = stand_in  # type: ignore[assignment]
    _, _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
