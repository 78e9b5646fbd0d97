"""``train`` with the adapter kept in float32 whatever the stack: ``python -m forge.training.probes.float32_adapter``.

TRL casts the adapter of a 4-bit base to bfloat16 and Unsloth keeps float32. The former loses every update below half
a spacing: over 100 steps of a tiny model 2e-3 nats of training loss, several times what any other rounding moves.
Where trajectories are compared, all arms are to round the same thing; where outcomes are, each does as it does.
Takes the arguments of ``python -m forge.training``.
"""

from __future__ import annotations

from typing import Any


def main() -> None:
    """Run a command, its trainer's adapter cast before there is an optimizer."""
    from forge.training import attempt, cli

    build = attempt.build_trainer

    def built(module: Any, job: Any) -> Any:
        trainer = build(module, job)
        for name, parameter in trainer.model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        return trainer

    attempt.build_trainer = built
    cli.main()


if __name__ == "__main__":
    main()
