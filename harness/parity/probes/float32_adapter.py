"""``train`` with the adapter kept in float32 whatever the backend: ``python -m harness.parity.probes.float32_adapter``.

TRL casts the adapter of a 4-bit base to bfloat16 and Unsloth keeps float32. The former loses every update below half
a spacing: over 100 steps of a tiny model 2e-3 nats of training loss, several times what any other rounding moves.
Where trajectories are compared, all arms are to round the same thing; where outcomes are, each does as it does.
Takes the arguments of ``python -m forge.training``, before them ``--rounding=NAME`` for what else is computed by other
kernels or in another precision, the same to every digit that counts:

- ``eager``: attention as products and a softmax of their own;
- ``float32``: nothing in bfloat16. The weights are the same numbers, those of 4 bits as dequantised; products, norms,
  attention and residuals round as no bfloat16 stack's do. No layout shows that either;
- ``float32_head``: logits as a float32 product. Stacks differ in it, and no layout shows what it does: in bfloat16 they
  are off by 0.2%, which lifts a loss by half the variance of that, in every layout alike.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge.training.backends import BackendModule
    from forge.training.backends.job import StepObserver, TrainingJob

ROUNDINGS = ("eager", "float32", "float32_head")


def main() -> None:
    """Run a command, its trainer's model changed before there is an optimizer."""
    named = []
    while sys.argv[1:2] and sys.argv[1].startswith("--rounding="):
        named.append(sys.argv.pop(1).partition("=")[2])
    from forge.training import cli
    from forge.training.system.errors import ConfigurationError
    from forge.training.train import run

    build = run.build_trainer

    def built(module: BackendModule, job: TrainingJob, observer: StepObserver) -> Any:
        if unknown := set(named) - set(ROUNDINGS):
            raise ConfigurationError(f"--rounding={unknown.pop()}: unknown", remedy=f"take {' or '.join(ROUNDINGS)}")
        trainer = build(module, job, observer)
        for name, parameter in trainer.model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        causal = trainer.model.get_base_model()
        if "eager" in named:
            causal.set_attn_implementation("eager")
        if "float32" in named:
            _compute_in_float32(trainer, causal)
        if "float32_head" in named:
            causal.lm_head.forward = _float32_product(causal.lm_head.weight)
        return trainer

    run.build_trainer = built  # the seam: see there
    cli.main()


def _compute_in_float32(trainer: Any, causal: Any) -> None:
    """Weights as float32 where they are not packed in 4 bits, no autocast, dequantised products in float32."""
    import torch

    for parameter in causal.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    for module in causal.modules():
        if hasattr(module, "compute_type_is_set"):  # bitsandbytes' 4-bit linear
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    trainer.accelerator.native_amp = False  # asked when training begins


def _float32_product(weight: Any) -> Any:
    import torch

    def forward(hidden: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.float(), weight.float())

    return forward


if __name__ == "__main__":
    main()
