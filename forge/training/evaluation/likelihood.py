"""How well a model predicts a document: the sum of -ln p over its trained tokens.

One document at a time, without padding and without a backend's kernels, so that every model is
measured alike. The logits of a long document never exist at once: 32,768 tokens times 152,064
entries are 20 GB in float32.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.training.data.conversation import IGNORED
from forge.training.data.examples import Examples, document_name
from forge.training.evaluation.neutral_model import NeutralModel
from forge.training.system.errors import DataError, MachineError

NUM_LOGIT_ROWS = 1024  # tokens whose logits exist at once
_NUM_PROBE_TOKENS = 64
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # how SentencePiece names a single byte


@dataclass(frozen=True)
class Document:
    """A held-out document: its examples (several where it was divided) and what of it is trained.

    ``num_tokens`` counts the predicted tokens, a trained token that stands first has no predecessor; ``num_bytes`` the
    UTF-8 bytes of the text they stand for.
    """

    name: str
    examples: tuple[int, ...]
    num_tokens: int
    num_bytes: int


def group_documents(examples: Examples, tokenizer: Any, max_documents: int | None = None) -> list[Document]:
    """The documents behind the examples, in order; the parts of a divided document are one."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(examples.document_ids):
        groups.setdefault(document_name(name), []).append(index)
    sizes = token_bytes(tokenizer)
    documents = []
    for name, indices in list(groups.items())[:max_documents]:
        predicted = np.concatenate([examples.labels[i][1:] for i in indices])
        predicted = predicted[predicted != IGNORED]
        documents.append(Document(name, tuple(indices), len(predicted), int(sizes[predicted].sum())))
    return documents


def token_bytes(tokenizer: Any) -> np.ndarray:
    """UTF-8 bytes of text that each id stands for, int64 of shape (ids,).

    In byte-level BPE a token's characters are its bytes. Otherwise the tokenizer's own decoder says it, inside a text:
    SentencePiece writes a blank as three bytes and spells a byte of a rare character ``<0xF0>``.
    """
    decoder = tokenizer.backend_tokenizer.decoder
    is_byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    added = {t.content for t in tokenizer.added_tokens_decoder.values()}
    for token, index in vocabulary.items():
        if token in added or decoder is None:
            sizes[index] = len(token.encode())
        elif is_byte_level:
            sizes[index] = len(token)
        elif _BYTE.fullmatch(token):
            sizes[index] = 1
        else:
            sizes[index] = len(decoder.decode(["a", token]).encode()) - 1
    return sizes


def measure_nats(
    model: NeutralModel,
    examples: Examples,
    documents: Iterable[Document],
    subject: str,
    kind: str = "held-out document",
) -> dict[str, float]:
    """Nats of each document, by name. Raises :class:`DataError` naming one whose loss is not finite."""
    nats: dict[str, float] = {}
    for document in documents:
        if not nats:
            _check_head(model, examples.input_ids[document.examples[0]])
        total = sum(sum_nats(model, examples.input_ids[i], examples.labels[i]) for i in document.examples)
        if not math.isfinite(total):
            raise DataError(
                f"{subject}: the loss on {kind} {document.name!r} is {total}",
                remedy="the weights hold NaN, or overflow on this document; look at the run's steps.jsonl",
            )
        nats[document.name] = total
    return nats


def sum_nats(model: NeutralModel, input_ids: np.ndarray, labels: np.ndarray) -> float:
    """Sum of -ln p over the tokens with a label. ``input_ids`` and ``labels``: int32 of shape (length,)."""
    import torch

    targets = labels[1:]
    kept = np.nonzero(targets != IGNORED)[0]
    with torch.inference_mode():
        hidden = _hidden_states(model, input_ids)[torch.from_numpy(kept).to(model.device)]
        wanted = torch.from_numpy(targets[kept].astype(np.int64)).to(model.device)
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for begin in range(0, len(kept), NUM_LOGIT_ROWS):
            rows = slice(begin, begin + NUM_LOGIT_ROWS)
            logits = _logits(model, hidden[rows])
            total += torch.nn.functional.cross_entropy(logits, wanted[rows], reduction="none").double().sum()
        return float(total)


def _hidden_states(model: NeutralModel, input_ids: np.ndarray) -> Any:
    """The last layer's output, of shape (length, width)."""
    import torch

    ids = torch.from_numpy(input_ids.astype(np.int64))[None].to(model.device)
    return model.causal.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]


def _logits(model: NeutralModel, hidden: Any) -> Any:
    """Float32 logits of shape (rows, vocabulary). On a GPU the sums of 16-bit products stay in float32."""
    import torch

    head = model.causal.get_output_embeddings()
    weight = head.weight
    if hidden.is_cuda and weight.is_cuda and hidden.dtype == weight.dtype != torch.float32 and head.bias is None:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return head(hidden).float()


def _check_head(model: NeutralModel, input_ids: np.ndarray) -> None:
    """Refuse an architecture whose logits are more than its head applied to its last layer (caps, scales)."""
    import torch

    ids = input_ids[:_NUM_PROBE_TOKENS]
    with torch.inference_mode():
        ours = _logits(model, _hidden_states(model, ids))
        batch = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
        theirs = model.causal(input_ids=batch, use_cache=False).logits[0].float()
    if torch.isfinite(theirs).all() and (ours - theirs).norm() > 0.02 * theirs.norm():
        raise MachineError(f"{type(model.causal).__name__} computes its logits in a way that evaluate does not support")
