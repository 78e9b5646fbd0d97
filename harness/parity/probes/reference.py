"""The reference of a first step: plain transformers in float32, eager attention, one document at a time.

The base's weights are first rounded to the workload's dtype, or quantised to NF4 and dequantised, as every backend does
on loading. So a backend differs from the reference by its arithmetic alone. Nothing is recomputed, nothing is fused, no
autocast; the loss of a token is taken from full logits. Dropout, where the step has any, is by explicit masks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.training.backends.job import TrainingJob
from forge.training.data.conversation import IGNORED
from harness.parity.probes.batch import FROZEN_STEP, FrozenStep, adapter_gradients, draw_adapter


def load_reference(job: TrainingJob) -> Any:
    """The base in float32 with PEFT's adapter in float32, on the GPU if there is one."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from forge.training.backends.trl import load_model, lora_config

    torch.set_float32_matmul_precision("highest")
    cuda = torch.cuda.is_available()
    if job.workload.model.quantization == "nf4":
        model = load_model(job)  # refuses a machine without a GPU
        dequantise(model)
        model.set_attn_implementation("eager")
        model = model.float()
    else:
        model = AutoModelForCausalLM.from_pretrained(
            job.base_dir,
            dtype=torch.float32,
            device_map={"": 0} if cuda else None,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        dtype = getattr(torch, job.workload.model.dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype).float())
    model = get_peft_model(model, lora_config(job))
    model.train()
    model.config.use_cache = False
    return model


def dequantise(model: Any) -> None:
    """Replace every 4-bit layer by a plain float32 one with the weights that its kernels compute with.

    Those are the quantised weights, dequantised in the compute dtype. Needs bitsandbytes.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    for name, module in list(model.named_modules()):
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None:
            continue
        weight = dequantize_4bit(module.weight.data, state).to(module.compute_dtype).float()
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            plain.bias = torch.nn.Parameter(module.bias.data.float(), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    for attribute in ("is_loaded_in_4bit", "is_quantized"):
        if hasattr(model, attribute):
            setattr(model, attribute, False)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def measure_reference(job: TrainingJob, step: FrozenStep) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors (first_step/compare.py has their shapes) and facts of the frozen step."""
    import torch

    model = load_reference(job)
    facts: dict[str, Any] = {"adapter_sha256": draw_adapter(model, job.workload.training.seed)}
    device = next(model.parameters()).device
    masks = None
    if job.workload.lora.dropout:
        from harness.parity.probes.masks import ExplicitMasks

        masks = ExplicitMasks(model, job.workload.training.seed)
    tokens = np.full(step.positions.shape, np.nan)
    losses = np.zeros(len(step.examples))
    tensors: dict[str, np.ndarray] = {}
    total: dict[str, np.ndarray] = {}
    for document, (ids, labels) in enumerate(zip(step.examples.input_ids, step.examples.labels, strict=True)):
        model.zero_grad(set_to_none=True)
        given = torch.tensor(ids, dtype=torch.long, device=device)[None]
        targets = torch.tensor(labels, dtype=torch.long, device=device)[1:]
        if masks is not None:
            masks.begin([ids.tolist()], None, FROZEN_STEP, device)
        logits = model(input_ids=given, use_cache=False).logits[0, :-1]
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
        (nats.sum() / step.num_trained_tokens).backward()
        values = nats.detach().double().cpu().numpy()
        losses[document] = values.sum()
        chosen = step.positions[document]
        tokens[document, chosen >= 0] = values[chosen[chosen >= 0] - 1]
        del logits, nats
        for name, gradient in adapter_gradients(model).items():
            tensors[f"document/{document}/{name}"] = gradient
            total[name] = total[name] + gradient if name in total else gradient.astype(np.float64)
    tensors |= {f"step/{name}": gradient.astype(np.float32) for name, gradient in total.items()}
    facts |= {"step_loss": float(losses.sum() / step.num_trained_tokens), "gradient_dtype": "float32"}
    return {**tensors, "token_losses": tokens, "document_losses": losses}, facts
