"""Claims about bits per byte: the bytes are those of the text, whatever the tokenizer calls its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.training.config.workload import DataSection
from forge.training.data.conversation import Encoder
from forge.training.data.examples import encode_records
from forge.training.data.records import Message, Record
from forge.training.evaluation.likelihood import group_documents, token_bytes
from tests.support.tiny_model import SENTENCES, write_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEXTS = ["Wer übt, wird besser: 火と水 🔥.", "def f(x):\n    return  x\n", "a  b\tc é́ ﬁ"]


def sentencepiece_tokenizer(directory: Path) -> Any:
    """As Llama 2's: a blank is U+2581, rare characters are spelled byte by byte, and three tokens are special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES[:3], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [row for row in content["added_tokens"] if row["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )
    fast.save_pretrained(directory)
    return fast


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_the_texts(kind: str, text: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(tmp_path) if kind == "sentencepiece" else write_tokenizer(tmp_path)
    ids = tokenizer.encode(text, add_special_tokens=False)
    blank = kind == "sentencepiece"  # it begins each text with one
    decoded = tokenizer.backend_tokenizer.decoder.decode(tokenizer.convert_ids_to_tokens(ids))
    assert token_bytes(tokenizer)[ids].sum() == len(decoded.encode()) + blank
    if blank:
        assert decoded == text


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_a_documents_bytes_are_those_of_its_predicted_text(loss_on: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(tmp_path)
    data = DataSection.model_validate({"train": "x", "max_length": 512, "loss_on": loss_on})
    rows = [
        Record(line=line, messages=(Message("user", "Say it."), Message("assistant", text)), document=True)
        for line, text in enumerate(TEXTS, 1)
    ]
    examples = encode_records(rows, Encoder(tokenizer), data)
    for text, document, labels in zip(TEXTS, group_documents(examples, tokenizer), examples.labels, strict=True):
        predicted = labels[1:][labels[1:] != -100]
        assert document.num_tokens == len(predicted)
        begins = tokenizer.decode(labels[:1].tolist()) if loss_on == "all" else ""
        whole = f"<user>Say it.</s><assistant>{text}</s>" if loss_on == "all" else f"{text}</s>"
        # SentencePiece writes a blank at the beginning and after every special token, which no text holds
        blanks = int(np.isin(tokenizer.convert_ids_to_tokens(predicted.tolist()), ["▁"]).sum())
        assert 0 <= document.num_bytes - len(whole.removeprefix(begins).encode()) <= 1 + blanks
