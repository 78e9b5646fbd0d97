"""What a backend's trainer really runs with: read from its optimizer, its scheduler and its model, not from a file."""

from __future__ import annotations

import hashlib
from typing import Any

from forge.training.system.files import sha256_json
from forge.training.train.record import describe_trainable


def describe_settings(trainer: Any) -> dict[str, Any]:
    """Settings that must be the same in every backend. Call it inside the training loop, before the first update.

    ``learning_rates``: of every step of the run, as the scheduler in place will give them.
    """
    args, model = trainer.args, trainer.model
    trainable = describe_trainable(model)
    return {
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "parameter_groups": _parameter_groups(trainer.optimizer),
        "learning_rates": _learning_rates(trainer),
        "max_grad_norm": args.max_grad_norm,
        "effective_batch": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "num_steps": trainer.state.max_steps,
        "seed": args.seed,
        "label_smoothing": args.label_smoothing_factor,
        "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        "dropouts": _dropouts(model),
        "lora_scalings": _lora_scalings(model),
        "trainable_names_sha256": trainable.names_sha256,
        "num_trainable_parameters": trainable.num_parameters,
    }


def _parameter_groups(optimizer: Any) -> list[dict[str, Any]]:
    groups = []
    for group in optimizer.param_groups:
        count = sum(parameter.numel() for parameter in group["params"])
        if count:
            betas = [float(beta) for beta in group["betas"]]
            groups.append(
                {
                    "num_elements": count,
                    "learning_rate": float(group.get("initial_lr", group["lr"])),
                    "betas": betas,
                    "eps": float(group["eps"]),
                    "weight_decay": float(group["weight_decay"]),
                }
            )
    return sorted(groups, key=str)


def _learning_rates(trainer: Any) -> dict[str, Any]:
    """Of every step; the digest is over 12 digits, so that the last bit of a cosine makes no difference."""
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)  # accelerate's wrapper, or not
    steps = range(trainer.state.max_steps)
    rates = [float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step)) for step in steps]
    return {
        "num_steps": len(rates),
        "highest": float(f"{max(rates):.12g}"),
        "last": float(f"{rates[-1]:.12g}"),
        "sha256": sha256_json([f"{rate:.12g}" for rate in rates]),
    }


def _dropouts(model: Any) -> list[float]:
    """The shares that are dropped anywhere in the model while it trains; none is the empty list."""
    from torch import nn

    shares = {float(module.p) for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0}
    shares |= {float(getattr(module, "attention_dropout", 0.0) or 0.0) for module in model.modules()}
    return sorted(share for share in shares if share > 0)


def _lora_scalings(model: Any) -> list[float]:
    found = [s for module in model.modules() if hasattr(module, "lora_A") for s in module.scaling.values()]
    return sorted({float(scaling) for scaling in found})


def loaded_weights(model: Any, dtype: str) -> dict[str, str]:
    """A digest (16 hex digits) of every frozen tensor as it lies in memory, by its name in the base.

    Quantised ones by their packed codes, others as ``dtype``: a stack may hold a norm in float32 and the same
    numbers still. A head that shares the embedding's numbers is not listed.
    """
    import torch

    digests = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace("._orig_mod", "")
        values = parameter.detach().as_subclass(torch.Tensor)  # bitsandbytes' own moves its state along with a copy
        if values.is_floating_point():
            values = values.to(getattr(torch, dtype))
        flat = values.cpu().contiguous().view(torch.uint8).reshape(-1).numpy()
        digests[plain] = hashlib.sha256(flat).hexdigest()[:16]
    if digests.get("lm_head.weight") == digests.get("model.embed_tokens.weight"):
        digests.pop("lm_head.weight", None)
    return digests


def weights_sha256(digests: dict[str, str]) -> str:
    """One digest of all of them."""
    return sha256_json(sorted(digests.items()))
