"""The parity ladder's command line with real training on a CPU: a pytest plugin, and an interpreter for its arms.

Plugin (``-p tests.support.cpu_ladder``): a ladder small enough for a CPU that seems to be a GPU. Settings are in
LADDER_OVERRIDES (JSON list of ``key=value``) and LADDER_FIELDS (JSON object: other fields of
:class:`harness.parity.session.Ladder`). Interpreter (``python THIS_FILE -m MODULE ARGUMENTS``; FORGE_GPU_PYTHON and
FORGE_LEGACY_PYTHON name a program that starts it so): everything is real (processes, inputs, training, evaluation,
records) but that "legacy" and "unsloth" are today's TRL, in the layouts that their plans give them.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

OVERRIDES = [
    *("model.quantization=none", "data.max_length=256", "data.sample=160", "training.max_steps=100"),
    *("evaluation.num_answers=2", "evaluation.max_new_tokens=24"),
]


def shrink_ladder() -> None:
    """Make every ladder of this process a small one on a GPU that is not there."""
    from harness.parity import session
    from tests.support import fake_gpu  # noqa: F401 - NVML's answer

    fields: dict[str, Any] = {"base": "tiny", "num_positions": 4, "num_side_by_side": 2}
    fields |= {"overrides": tuple(json.loads(os.environ.get("LADDER_OVERRIDES", json.dumps(OVERRIDES))))}
    for name, value in json.loads(os.environ.get("LADDER_FIELDS", "{}")).items():
        fields[name] = (
            tuple(map(tuple, value)) if name == "layouts" else tuple(value) if isinstance(value, list) else value
        )
    session.Ladder = partial(session.Ladder, **fields)  # type: ignore[misc]


def stand_in(name: str) -> Any:
    """A backend's module, made of TRL's but for its default plan."""
    from forge.training.backends import trl

    own = import_module(f"forge.training.backends.{name}")

    def without_unsloths(plan: Any) -> Any:
        checkpointing = "full" if plan.gradient_checkpointing == "offload" else plan.gradient_checkpointing
        changes = {"gradient_checkpointing": checkpointing, "mlp_tile_tokens": None, "loss_chunk_gib": None}
        return plan.model_copy(update=changes)

    return SimpleNamespace(
        DEFAULT_PLAN=own.DEFAULT_PLAN,
        LOSS_COUNTS_FIRST_LABELS=trl.LOSS_COUNTS_FIRST_LABELS,
        refuse=lambda workload, plan: trl.refuse(workload, without_unsloths(plan)),
        prepare=trl.prepare,
        build=lambda job, observer: trl.build(replace(job, plan=without_unsloths(job.plan)), observer),
    )


def interpret() -> None:
    """Run a module of forge with stand-ins for its backends; anything else as the real interpreter would."""
    if sys.argv[1:2] != ["-m"]:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from forge.training import backends

    backends.load_backend = stand_in  # type: ignore[assignment]
    _, _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    interpret()
else:
    shrink_ladder()
