"""A Qwen2 of half a million parameters and a LoRA adapter for it, made on the spot for the export's tests."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

# Qwen2's split expression, as its tokenizer.json spells it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "The forge turns a repository of documents into a model that answers questions about them.",
    "A lighthouse keeper counts the ships at night; in 1911 there were 48 of them.",
    "def merge(base, adapter):\n    return base + scale * b @ a\n",
    "Wer übt, wird besser. 火と水。 It's what we'll do, isn't it?",
]


def write_tokenizer(directory: Path) -> Any:
    """A byte-level BPE of about 600 tokens with Qwen2's pre-tokenizer and specials; returned and saved."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(directory)
    return fast


@cache
def scratch() -> Path:
    """A directory that lasts as long as the tests' process."""
    directory = Path(tempfile.mkdtemp(prefix="forge-tests-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@cache
def shared_base(*, tied: bool = True, dtype: str = "bfloat16") -> Path:
    """A base in three shards, made once for all tests; nobody may change it."""
    directory = scratch() / f"base-{'tied' if tied else 'untied'}-{dtype}"
    write_base(directory, tied=tied, dtype=dtype, max_shard_size="1MB")
    return directory


@cache
def shared_adapter() -> Path:
    """A plain adapter for the tied bfloat16 base, made once for all tests; nobody may change it."""
    directory = scratch() / "adapter"
    write_adapter(shared_base(), directory)
    return directory


def write_base(
    directory: Path,
    *,
    tied: bool = True,
    dtype: str = "bfloat16",
    max_shard_size: str = "500MB",
    num_steps: int = 60,
    **config_fields: Any,
) -> Any:
    """A Qwen2 with two layers of width 256, trained for a few steps so that its logits mean something."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tokenizer = write_tokenizer(directory)
    fields: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2} | config_fields
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        **fields,
    )
    model = Qwen2ForCausalLM(config)
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in SENTENCES]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(num_steps):
        batch = ids[step % len(ids)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def write_adapter(base_dir: Path, directory: Path, **lora: Any) -> Any:
    """A PEFT adapter with random, not zero, lora_B; the PEFT model (float32) is returned."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    } | lora
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(directory)
    return model


@cache
def merged_dir() -> Path:
    """The shared adapter merged into the shared base, made once for all tests; nobody may change it."""
    from forge.training.adapter.merge import merge_adapter
    from forge.training.models.digests import base_sha256

    directory = scratch() / "merged"
    merge_adapter(shared_base(), shared_adapter(), directory, expected_base_sha256=base_sha256(shared_base()))
    return directory


@cache
def gguf_file(quantization: str) -> Path:
    """The merged tiny model; f16 by the converter, the rest quantised from it. Nobody may change it."""
    from forge.training.export.gguf import convert_to_gguf, quantize

    path = scratch() / f"tiny.{quantization}.gguf"
    if quantization == "f16":
        convert_to_gguf(merged_dir(), path)
    else:
        quantize(gguf_file("f16"), path, quantization)  # type: ignore[arg-type]
    return path
