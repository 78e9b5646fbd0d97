"""A Qwen2 base in another architecture: ``python -m harness.parity.probes.architecture BASE --as llama -o DIR``.

The gate's bases are Qwen2's; what is shown of their first step must be true of other models too. A layer of Llama is
one of Qwen2 without biases on query, key and value; one of Qwen3 has no biases either, and norms on query and key. So
the trained weights carry over as they are, the norms are ones, and the result is a base whose losses mean something.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from forge.training.system.errors import ConfigurationError
from forge.training.system.files import read_json_object, staged_directory, write_json
from harness.measurement.probe_main import probe_main

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_QWEN2S_OWN = ("max_window_layers", "sliding_window", "use_sliding_window", "layer_types")


def write_architecture(base: Path, directory: Path, model_type: str) -> None:
    """Write ``base``, a Qwen2, as a ``model_type`` of :data:`ARCHITECTURES` into ``directory``.

    Raises :class:`ConfigurationError` where the base is no Qwen2 or the architecture is not known.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = read_json_object(base / "config.json")
    if config.get("model_type") != "qwen2" or model_type not in ARCHITECTURES:
        raise ConfigurationError(
            f"{base} is a {config.get('model_type')}, to become a {model_type}",
            remedy=f"name a qwen2 base and one of {', '.join(ARCHITECTURES)}",
        )
    tensors: dict[str, Any] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if not name.endswith("_proj.bias")}  # noqa: SIM118
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if model_type == "qwen3":
        for layer in range(config["num_hidden_layers"]):
            like = tensors[f"model.layers.{layer}.input_layernorm.weight"]
            for norm in ("q_norm", "k_norm"):
                tensors[f"model.layers.{layer}.self_attn.{norm}.weight"] = like.new_ones(head_size)
    kept = {key: value for key, value in config.items() if key not in _QWEN2S_OWN}
    changed = {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "attention_bias": False,
        "head_dim": head_size,
    }
    with staged_directory(directory) as staging:
        write_json(staging / "config.json", {**kept, **changed})
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        for path in base.iterdir():
            is_weights = path.suffix == ".safetensors" or path.name == "model.safetensors.index.json"
            if path.is_file() and not is_weights and path.name != "config.json":
                shutil.copyfile(path, staging / path.name)


def main() -> int:
    """Print where the base was written, as JSON."""
    parser = argparse.ArgumentParser(prog="harness.parity.probes.architecture", description="A base as another model.")
    parser.add_argument("base", type=Path)
    parser.add_argument("--as", choices=tuple(ARCHITECTURES), required=True, dest="model_type")
    parser.add_argument("-o", type=Path, required=True, dest="directory")

    def answer(arguments: argparse.Namespace) -> dict[str, Any]:
        base, directory, model_type = arguments.base, arguments.directory, arguments.model_type
        write_architecture(base, directory, model_type)
        return {"directory": str(directory.absolute()), "model_type": model_type}

    return probe_main(parser, answer)


if __name__ == "__main__":
    sys.exit(main())
