"""Greedy answers: to questions of facts, and to the instructions of held-out documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.training.data.conversation import Encoder
from forge.training.data.examples import Examples
from forge.training.data.questions import answer_begin, assistant_opening, end_ids
from forge.training.evaluation.likelihood import Document
from forge.training.evaluation.neutral_model import NeutralModel


@dataclass(frozen=True)
class Prompt:
    """Token ids that end where the answer begins, and the document's own first tokens, as text."""

    document: str
    input_ids: np.ndarray  # int32 of shape (length,)
    reference: str


def document_prompts(
    examples: Examples, documents: Sequence[Document], encoder: Encoder, *, num_prompts: int, max_new_tokens: int
) -> list[Prompt]:
    """Prompts of the first documents that have one, ids as they were trained on.

    ``reference`` has at most ``max_new_tokens`` tokens: an answer that stops there is compared with
    as much of the document, not with all of it.
    """
    opening = assistant_opening(encoder)
    prompts: list[Prompt] = []
    for document in documents:
        if len(prompts) == num_prompts:
            break
        ids, labels = (rows[document.examples[0]] for rows in (examples.input_ids, examples.labels))
        begin = answer_begin(ids, labels, opening)
        if begin is not None and begin < len(ids):
            text = encoder.tokenizer.decode(ids[begin : begin + max_new_tokens].tolist(), skip_special_tokens=True)
            prompts.append(Prompt(document.name, ids[:begin], text))
    return prompts


def greedy_answer(model: NeutralModel, tokenizer: Any, input_ids: np.ndarray, max_new_tokens: int) -> str:
    """The most probable next token, again and again, until the turn ends or ``max_new_tokens``."""
    import torch
    from transformers import GenerationConfig

    given = model.causal.generation_config
    # a model's own settings sample and penalise repetition, even where do_sample is switched off
    model.causal.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids(tokenizer, given),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    ids = torch.from_numpy(input_ids.astype(np.int64))[None].to(model.device)
    try:
        with torch.inference_mode():
            produced = model.causal.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        model.causal.generation_config = given
    return str(tokenizer.decode(produced[0, len(input_ids) :].tolist(), skip_special_tokens=True))
