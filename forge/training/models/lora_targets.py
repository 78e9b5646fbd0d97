"""Which modules of a base LoRA may change, so that what is trained can be merged and exported."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from forge.training.models.weights import ModelWeights
from forge.training.system.errors import ConfigurationError

_EMBEDDINGS = ("embed_tokens", "lm_head")


def refuse_targets(targets: Sequence[str], base: ModelWeights) -> None:
    """Raise :class:`ConfigurationError` for ``lora.targets`` that the base lacks or that no export can ship.

    A target names a module by the end of its name, as in PEFT. Only linear layers can be shipped: an embedding's
    change is stored in another form, that of the output layer is not trained by every backend, and a norm has no LoRA.
    """
    shapes = {
        name.removesuffix(".weight"): tensor.shape for name, tensor in base.tensors.items() if name.endswith(".weight")
    }
    linear = {
        module.rpartition(".")[2]
        for module, shape in shapes.items()
        if len(shape) == 2 and module.rpartition(".")[2] not in _EMBEDDINGS
    }
    wrong, near = [], []
    for target in targets:
        named = [module for module in shapes if module == target or module.endswith(f".{target}")]
        # an output layer that shares the embedding's weights has none of its own
        is_embedding = target.rpartition(".")[2] in _EMBEDDINGS
        if not named and not is_embedding:
            wrong.append(f"the base has no module {target}")
            near += difflib.get_close_matches(target, sorted(linear), 1)
        elif is_embedding or any(module.rpartition(".")[2] not in linear for module in named):
            wrong.append(f"{target} is no linear layer inside the model: a GGUF export cannot ship its change")
    if wrong:
        meant = f"did you mean {', '.join(near)}? " if near else ""
        raise ConfigurationError(
            "lora.targets: " + "; ".join(wrong), remedy=f"{meant}its linear layers are {', '.join(sorted(linear))}"
        )
