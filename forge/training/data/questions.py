"""What is asked of a model: a question through the chat template, or an example up to where its answer begins."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import numpy as np

from forge.training.data.conversation import IGNORED, Encoder, encode_question
from forge.training.data.records import Message


def question_ids(encoder: Encoder, question: str, system_prompt: str | None) -> np.ndarray:
    """A question through the chat template, as int32 of shape (length,), up to where the answer begins.

    Control tokens that stand in the question are text, as they are in training.
    """
    talk = [Message("system", system_prompt)] if system_prompt is not None else []
    return encode_question(encoder, [*talk, Message("user", question)])


def holds_answer(text: str, answer: str) -> bool:
    """Whether a reply holds an answer's words, one after another and whole; case, width and blanks do not count."""
    words, wanted = (" ".join(unicodedata.normalize("NFKC", each).casefold().split()) for each in (text, answer))
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", words) is not None


def assistant_opening(encoder: Encoder) -> list[int]:
    """The ids with which the chat template opens the assistant's turn."""
    talk = [Message("user", "a")]
    opened = encoder.render(talk, asks=True).removeprefix(encoder.render(talk, asks=False))
    return list(encoder.ids_and_ends(opened, plain=False)[0].tolist())


def answer_begin(ids: np.ndarray, labels: np.ndarray, opening: list[int]) -> int | None:
    """Where the first answer begins; where prompts are trained too, after the assistant's first opening."""
    trained = labels != IGNORED
    if not trained[0]:
        return int(np.argmax(trained))
    width = len(opening)
    for begin in range(len(ids) - width):
        if width and ids[begin] == opening[0] and ids[begin : begin + width].tolist() == opening:
            return begin + width
    return None


def asked_text(encoder: Encoder, prompt_ids: np.ndarray, system_prompt: str | None) -> str:
    """What the user asks in a prompt's ids, without the template's own text where it can be told apart."""
    mark = "\u2e3b"
    talk = [Message("system", system_prompt)] if system_prompt is not None else []
    before, _, after = encoder.render([*talk, Message("user", mark)], asks=True).partition(mark)
    whole = str(encoder.tokenizer.decode(prompt_ids.tolist()))
    if whole.startswith(before) and whole.endswith(after):
        return whole.removeprefix(before).removesuffix(after).strip()
    return str(encoder.tokenizer.decode(prompt_ids.tolist(), skip_special_tokens=True)).strip()


def end_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """Every token that ends a turn: the tokenizer's, and those the model's own settings name."""
    named = getattr(generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return sorted(int(end) for end in ends if end is not None)
