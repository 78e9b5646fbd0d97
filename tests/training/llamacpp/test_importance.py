"""Claim: the importance matrix holds the mean squared inputs of every product with a weight, as PyTorch computes them,
and it changes what is quantised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.training.export.gguf import collect_importance, quantize, verify_gguf
from tests.support.tiny_model import SENTENCES, gguf_file, merged_dir

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def sequences() -> list[list[int]]:
    from forge.training.models.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(merged_dir())
    return [tokenizer(text)["input_ids"] for text in SENTENCES]


def mean_squares() -> dict[str, np.ndarray]:
    """By hooks on the same weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(merged_dir(), dtype=torch.float32).eval()
    seen: dict[str, list[Any]] = {}
    for layer, block in enumerate(model.model.layers):
        for short, name in NAMES.items():
            inputs = seen.setdefault(f"blk.{layer}.{short}.weight", [])
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0].detach().reshape(-1, args[0].shape[-1]))
            )
    with torch.inference_mode():
        for ids in sequences():
            model(input_ids=torch.tensor([ids]))
    return {name: torch.cat(inputs).double().square().mean(0).numpy() for name, inputs in seen.items()}


@pytest.mark.slow
def test_it_is_what_pytorch_computes_and_changes_the_file(tmp_path: Path) -> None:
    collect_importance(gguf_file("f16"), tmp_path / "matrix.npz", sequences())
    with np.load(tmp_path / "matrix.npz") as matrix:
        assert len(matrix.files) == 2 * 7 + 1  # of two layers, and the head, which is the embedding
        for name, wanted in mean_squares().items():
            np.testing.assert_allclose(matrix[name], wanted, rtol=0.02, atol=1e-4 * wanted.max())
    quantize(gguf_file("f16"), tmp_path / "with.gguf", "q4_k_s", imatrix=tmp_path / "matrix.npz")
    quantize(gguf_file("f16"), tmp_path / "without.gguf", "q4_k_s")
    assert verify_gguf(tmp_path / "with.gguf").sha256 != verify_gguf(tmp_path / "without.gguf").sha256
