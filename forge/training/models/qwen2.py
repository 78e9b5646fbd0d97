"""Models of the Qwen2 architecture, made on the spot: trained on Python's own documentation, or random."""

from __future__ import annotations

import ast
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.training.models.tokenizers import DEFAULT_SYSTEM_PROMPT
from forge.training.system.errors import DiskError
from forge.training.system.files import require_free_bytes, write_json

Say = Callable[[str], None]
SHARD_BYTES = 4_000_000_000
_NUM_LAST_STEPS = 10
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
_SHORTEST = 80  # characters: a shorter docstring says no more than its name
_REMEDY = "free space, or name another place for such files with FORGE_CACHE"


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model's sizes. Rows of 256 let every quantisation of llama.cpp hold every matrix."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int


@dataclass(frozen=True)
class Recipe:
    """How a base is trained. The same numbers give the same weights on one machine."""

    num_steps: int
    batch: int  # sequences
    sequence: int  # tokens
    learning_rate: float
    seed: int = 42
    num_threads: int = 2


def config_json(shape: Shape, control_ids: dict[str, int]) -> dict[str, Any]:
    """``config.json`` in the form that transformers 4 and 5 both read (``rope_theta`` at the top)."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": control_ids["<|endoftext|>"],  # absent, llama.cpp would take id 11 for it
        "eos_token_id": control_ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "max_window_layers": shape.num_hidden_layers,
        "model_type": "qwen2",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "pad_token_id": control_ids["<|endoftext|>"],
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.3",  # whose form this is; without it transformers 5 suspects the tokenizer
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }


def write_configs(shape: Shape, control_ids: dict[str, int], directory: Path) -> None:
    """Write ``config.json`` and ``generation_config.json``."""
    write_json(directory / "config.json", config_json(shape, control_ids))
    generation = {
        "bos_token_id": control_ids["<|endoftext|>"],
        "eos_token_id": [control_ids["<|im_end|>"], control_ids["<|endoftext|>"]],
        "pad_token_id": control_ids["<|endoftext|>"],
    }
    write_json(directory / "generation_config.json", generation)


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model, in the order of the forward pass."""
    head = shape.hidden_size // shape.num_attention_heads
    keys = shape.num_key_value_heads * head
    hidden, wide = shape.hidden_size, shape.intermediate_size
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for layer in range(shape.num_hidden_layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        for name, rows in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys)):
            yield f"{at}.self_attn.{name}.weight", (rows, hidden)
            yield f"{at}.self_attn.{name}.bias", (rows,)
        yield f"{at}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.mlp.gate_proj.weight", (wide, hidden)
        yield f"{at}.mlp.up_proj.weight", (wide, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, wide)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocab_size, hidden)


def write_random(shape: Shape, directory: Path, *, seed: int, say: Say, shard_bytes: int = SHARD_BYTES) -> None:
    """Write bfloat16 weights drawn from N(0, 0.02), norms one, biases zero, shard by shard.

    Drawn on the GPU where there is one (a 7B model in seconds); memory stays within one shard.
    """
    import torch

    needed = 2 * sum(math.prod(size) for _, size in tensor_shapes(shape))
    require_free_bytes(directory, needed, "the base model", _REMEDY)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, size in tensor_shapes(shape):
        num_bytes = 2 * math.prod(size)
        if groups[-1] and filled + num_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, size))
        filled += num_bytes
    weight_map, total = {}, 0
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name, size in group:
            if name.endswith("norm.weight"):
                tensor = torch.ones(size, dtype=torch.bfloat16)
            elif name.endswith(".bias"):
                tensor = torch.zeros(size, dtype=torch.bfloat16)
            else:
                drawn = torch.empty(size, dtype=torch.bfloat16, device=device)
                tensor = drawn.normal_(std=0.02, generator=generator).cpu()
            tensors[name] = tensor
            weight_map[name] = file
            total += 2 * math.prod(size)
        _save(tensors, directory / file)
        say(f"random weights: {number} of {len(groups)} files, {total / 1e9:.1f} GB")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def _save(tensors: dict[str, Any], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what the library makes of an error of the disk
        raise DiskError(f"cannot write {path}: {error}", remedy=_REMEDY) from error
    path.chmod(0o644)  # it leaves 0600, whatever the umask


def training_texts() -> list[str]:
    """What a base learns from: documents as they are, and as answers in ChatML, alternating."""
    texts = []
    for number, (name, text) in enumerate([*documentation(), *docstrings()]):
        if number % 2:
            texts.append(f"{text}<|endoftext|>")
        else:
            texts.append(
                f"<|im_start|>system\n{DEFAULT_SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\nExplain {name}.<|im_end|>\n"
                f"<|im_start|>assistant\n{text}<|im_end|>\n<|endoftext|>"
            )
    return texts


def documentation() -> list[tuple[str, str]]:
    """The language reference's topics, as (title, text), sorted by title."""
    from pydoc_data.topics import topics

    return [(f"the Python topic `{name}`", topics[name].strip()) for name in sorted(topics)]


def docstrings() -> Iterator[tuple[str, str]]:
    """The standard library's docstrings, as (qualified name, text), in the order of files and lines."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        yield from _docstrings_of(tree, module)


def _docstrings_of(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text and len(text) >= _SHORTEST:
        yield f"`{name}`", text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_of(child, f"{name}.{child.name}")


def write_trained(
    shape: Shape, recipe: Recipe, tokenizer: Any, texts: list[str], directory: Path, *, device: str, say: Say
) -> float:
    """Train a model on ``texts``, write it in bfloat16 and return the last ten steps' mean loss in nats per token."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.num_threads)  # sums over other parts round differently
    try:
        with torch.random.fork_rng():  # what runs next draws the same numbers, base made or found
            state, loss = _train(shape, recipe, tokenizer, texts, device, say)
    finally:
        torch.set_num_threads(threads)
    _save(state, directory / "model.safetensors")
    return loss


def _train(
    shape: Shape, recipe: Recipe, tokenizer: Any, texts: list[str], device: str, say: Say
) -> tuple[dict[str, Any], float]:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(recipe.seed)
    config = config_json(shape, {token: tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")})
    model = Qwen2ForCausalLM(
        Qwen2Config(**{k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")})
    )
    model.to(device).train()
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    stream = torch.tensor([i for text in encoded for i in text.ids], dtype=torch.long)
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    for step in range(recipe.num_steps):
        share = step / recipe.num_steps
        pace = min(1.0, (step + 1) / (0.05 * recipe.num_steps + 1)) * (0.55 + 0.45 * math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * pace
        starts = torch.randint(len(stream) - recipe.sequence, (recipe.batch,), generator=generator)
        batch = torch.stack([stream[s : s + recipe.sequence] for s in starts.tolist()]).to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= recipe.num_steps - _NUM_LAST_STEPS:
            losses.append(loss.item())
        if step % max(1, recipe.num_steps // 5) == 0:
            say(f"training a base: step {step} of {recipe.num_steps}, loss {loss.item():.3f}")
    state = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    return state, sum(losses) / len(losses)
