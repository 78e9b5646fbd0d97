"""A conversation's ids and labels, rendered by the tokenizer's own chat template.

Control tokens that stand literally in a message (``<|im_end|>`` and the like) are encoded as
ordinary text, so a document cannot end its own turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from forge.training.data.records import Message
from forge.training.errors import ConfigurationError, DataError

IGNORED = -100  # torch's ignore_index: a label that carries no loss


class Encoder:
    """The tokenizer twice: as it is, and with its added tokens taken out."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        if not tokenizer.chat_template:
            raise ConfigurationError(
                "the base model's tokenizer has no chat template",
                remedy="use an instruction-tuned base, or add chat_template.jinja to its directory",
            )
        self.tokenizer = tokenizer
        text = tokenizer.backend_tokenizer.to_str()
        self.full = Tokenizer.from_str(text)
        spec = json.loads(text)
        self.control = sorted((t["content"] for t in spec["added_tokens"]), key=len, reverse=True)
        self.control_ids = np.asarray([t["id"] for t in spec["added_tokens"]], dtype=np.int32)
        spec["added_tokens"], spec["post_processor"] = [], None
        self.plain = Tokenizer.from_str(json.dumps(spec))
        for each in (self.full, self.plain):
            each.no_truncation()
            each.no_padding()
        self.num_bytes = _token_bytes(tokenizer)
        unsafe = [token for token in self.control if self.num_control(self.ids_and_ends(token, plain=True)[0])]
        if unsafe:
            raise ConfigurationError(
                f"the base model's tokenizer cannot write {unsafe[0]} as text: documents could end their own turn",
                remedy="use a base with a byte-level tokenizer, such as Qwen2's",
            )
        try:
            _skeleton(tokenizer.chat_template, ("user", "assistant"), _Render(tokenizer))
        except DataError as error:
            raise ConfigurationError(error.message, remedy="use an instruction-tuned base") from error

    def has_control(self, text: str) -> bool:
        return any(token in text for token in self.control)

    def num_control(self, ids: np.ndarray) -> int:
        """How many of ``ids`` are control tokens."""
        return int(np.isin(ids, self.control_ids).sum())

    def ids_and_ends(self, text: str, plain: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and each token's character range [start, end)."""
        encoding = (self.plain if plain else self.full).encode(text, add_special_tokens=False)
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.asarray(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1]


def _token_bytes(tokenizer: Any) -> np.ndarray:
    """UTF-8 bytes each id stands for; in byte-level BPE a token's characters are its bytes."""
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    added = {t.content for t in tokenizer.added_tokens_decoder.values()}
    for token, index in vocabulary.items():
        sizes[index] = len(token.encode()) if token in added else len(token)
    return sizes


@lru_cache(maxsize=64)
def _skeleton(template: str, roles: tuple[str, ...], render: Any) -> tuple[str, ...]:
    """The template's own text around each message's content; ``len(roles) + 1`` pieces."""
    marks = [f"\ue000{index}\ue001" for index in range(len(roles))]
    rest, pieces = render([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]), []
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise ConfigurationError("the chat template drops, repeats or reorders messages; Forge cannot mask it")
        pieces.append(piece)
    return (*pieces, rest)


def encode_conversation(
    encoder: Encoder, messages: Sequence[Message], loss_on: str
) -> tuple[np.ndarray, np.ndarray, bool]:
    """One conversation's ids and labels, both int32 of shape (length,), and whether it held control tokens.

    With ``loss_on="answer"`` the assistant's text and the token that ends its turn are trained.
    Raises :class:`ConfigurationError` where the template rewrites the content it is given.
    """
    tokenizer = encoder.tokenizer

    render = _Render(tokenizer)
    roles = tuple(m.role for m in messages)
    pieces = _skeleton(tokenizer.chat_template, roles, render)
    contents = [m.content for m in messages]
    rendered = render([{"role": m.role, "content": m.content} for m in messages])
    if _join(pieces, contents) != rendered:
        contents = [c.strip() for c in contents]  # some templates trim
        if _join(pieces, contents) != rendered:
            raise ConfigurationError("the chat template rewrites the messages' text; Forge cannot mask it")
    ids, starts, ends = encoder.ids_and_ends(rendered, plain=False)
    # by content, and by result: a tokenizer that normalises first finds control tokens that are not there literally
    contaminated = any(encoder.has_control(c) for c in contents) or (
        encoder.num_control(ids) != sum(encoder.num_control(encoder.ids_and_ends(p, plain=False)[0]) for p in pieces)
    )
    if contaminated:
        parts = []
        for index, piece in enumerate(pieces):
            ids, _, _ = encoder.ids_and_ends(piece, plain=False)
            trained = np.zeros(len(ids), dtype=bool)
            if index and roles[index - 1] == "assistant" and len(ids) and _ends_turn(encoder, piece):
                trained[0] = True
            parts.append((ids, trained))
            if index < len(contents):
                ids, _, _ = encoder.ids_and_ends(contents[index], plain=True)
                parts.append((ids, np.full(len(ids), roles[index] == "assistant")))
        ids = np.concatenate([p[0] for p in parts])
        trained = np.concatenate([p[1] for p in parts])
    else:
        trained = np.zeros(len(ids), dtype=bool)
        position = 0
        for index, content in enumerate(contents):
            position += len(pieces[index])
            if roles[index] == "assistant":
                stop = position + len(content) + _ends_turn(encoder, pieces[index + 1])
                # a token that straddles the border carries some of the answer: it is trained
                trained |= (ends > position) & (starts < stop)
            position += len(content)
    if loss_on == "all":
        trained[:] = True
    return ids, np.where(trained, ids, IGNORED).astype(np.int32), contaminated


class _Render:
    """A hashable renderer, so that skeletons can be cached for each tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, conversation: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(conversation, tokenize=False))
        except (TemplateError, TypeError, ValueError, LookupError) as error:  # what a template does is its author's
            problem = str(error).partition("\n")[0]
            raise DataError(f"the base model's chat template refuses the conversation: {problem:.200}") from error

    def __hash__(self) -> int:
        return id(self.tokenizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Render) and other.tokenizer is self.tokenizer


def _join(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return "".join(p + c for p, c in zip(pieces, (*contents, ""), strict=True))


def _ends_turn(encoder: Encoder, piece: str) -> int:
    """Length of the control token with which ``piece`` begins, 0 if it begins otherwise."""
    return next((len(token) for token in encoder.control if piece.startswith(token)), 0)
