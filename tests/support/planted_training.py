"""A real training run with a fault planted in it: ``python THIS_FILE FAULT [MODULE] train ...``.

Faults that leave workload, plan and inputs as they are, so that only what comes of the run can show them.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

FAULTS = ("none", "learning-rate", "dropout", "frozen-matrix", "bfloat16-adapter")
FROZEN = "layers.1.mlp.up_proj.lora_B"


def plant(fault: str) -> None:
    """Change the training code of this process."""
    import torch

    from forge.training.backends import sft_config
    from forge.training.backends import trainer as loop

    fields, initialise = sft_config.sft_fields, loop.initialise_adapter

    def faster(job: Any) -> dict[str, Any]:
        found = fields(job)
        return found | {"learning_rate": found["learning_rate"] * float(os.environ.get("FAULT_FACTOR", "1.1"))}

    def frozen(model: Any, seed: int) -> None:
        initialise(model, seed)
        matrices = [parameter for name, parameter in model.named_parameters() if FROZEN in name]
        assert len(matrices) == 1
        matrices[0].register_hook(torch.zeros_like)

    def dropping(model: Any, seed: int) -> None:
        initialise(model, seed)
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(0.1)

    def rounded(model: Any, seed: int) -> None:
        initialise(model, seed)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)

    if fault == "learning-rate":
        sft_config.sft_fields = faster
    elif fault != "none":
        loop.initialise_adapter = {"frozen-matrix": frozen, "dropout": dropping, "bfloat16-adapter": rounded}[fault]


if __name__ == "__main__":
    plant(sys.argv.pop(1))
    module = sys.argv.pop(1) if sys.argv[1].startswith(("forge.", "harness.")) else "forge.training"
    runpy.run_module(module, run_name="__main__", alter_sys=True)
