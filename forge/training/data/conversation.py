"""A conversation's ids and labels, rendered by the tokenizer's own chat template.

Control tokens that stand literally in a message (``<|im_end|>`` and the like) are encoded as
ordinary text, so a document cannot end its own turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from forge.training.data.records import Message
from forge.training.system.errors import ConfigurationError, DataError

IGNORED = -100  # torch's ignore_index: a label that carries no loss


def require_chat_template(template: str | None) -> None:
    """Raise :class:`ConfigurationError` for a tokenizer without one."""
    if not template:
        raise ConfigurationError(
            "the base model's tokenizer has no chat template",
            remedy="use an instruction-tuned base, or add chat_template.jinja to its directory",
        )


class Encoder:
    """The tokenizer twice: as it is, and with its added tokens taken out."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        require_chat_template(tokenizer.chat_template)
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
        self._skeletons: dict[tuple[tuple[str, ...], bool], tuple[str, ...]] = {}
        unsafe = [token for token in self.control if self.num_control(self.ids_and_ends(token, plain=True)[0])]
        if unsafe:
            raise ConfigurationError(
                f"the base model's tokenizer cannot write {unsafe[0]} as text: documents could end their own turn",
                remedy="use a base with a byte-level tokenizer, such as Qwen2's",
            )
        try:
            self.skeleton(("user", "assistant"), asks=False)
        except DataError as error:
            raise ConfigurationError(error.message, remedy="use an instruction-tuned base") from error

    def num_control(self, ids: np.ndarray) -> int:
        """How many of ``ids`` are control tokens."""
        return int(np.isin(ids, self.control_ids).sum())

    def ids_and_ends(self, text: str, plain: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and each token's character range [start, end)."""
        encoding = (self.plain if plain else self.full).encode(text, add_special_tokens=False)
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.asarray(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1]

    def render(self, messages: Sequence[Message], *, asks: bool) -> str:
        """A conversation by the chat template; ``asks``: up to where an answer begins."""
        from jinja2 import TemplateError

        rows = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=asks))
        except (TemplateError, TypeError, ValueError, LookupError) as error:  # what a template does is its author's
            problem = str(error).partition("\n")[0]
            raise DataError(f"the base model's chat template refuses the conversation: {problem:.200}") from error

    def skeleton(self, roles: tuple[str, ...], *, asks: bool) -> tuple[str, ...]:
        """The template's own text around each message's content; ``len(roles) + 1`` pieces, kept for the next time."""
        if (roles, asks) not in self._skeletons:
            marks = [f"\ue000{index}\ue001" for index in range(len(roles))]
            rest, pieces = self.render([Message(r, m) for r, m in zip(roles, marks, strict=True)], asks=asks), []
            for mark in marks:
                piece, separator, rest = rest.partition(mark)
                if not separator or mark in rest:
                    raise ConfigurationError(
                        "the chat template drops, repeats or reorders messages; Forge cannot mask it"
                    )
                pieces.append(piece)
            self._skeletons[roles, asks] = (*pieces, rest)
        return self._skeletons[roles, asks]


def _token_bytes(tokenizer: Any) -> np.ndarray:
    """UTF-8 bytes each id stands for; in byte-level BPE a token's characters are its bytes."""
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    added = {t.content for t in tokenizer.added_tokens_decoder.values()}
    for token, index in vocabulary.items():
        sizes[index] = len(token.encode()) if token in added else len(token)
    return sizes


def encode_conversation(
    encoder: Encoder, messages: Sequence[Message], loss_on: str
) -> tuple[np.ndarray, np.ndarray, bool]:
    """One conversation's ids and labels, both int32 of shape (length,), and whether it held control tokens.

    With ``loss_on="answer"`` the assistant's text and the token that ends its turn are trained.
    Raises :class:`ConfigurationError` where the template rewrites the content it is given.
    """
    roles = tuple(m.role for m in messages)
    pieces, contents, rendered = _rendered(encoder, messages, asks=False)
    ids, starts, ends = encoder.ids_and_ends(rendered, plain=False)
    contaminated = _is_contaminated(encoder, pieces, contents, ids)
    if contaminated:
        parts = []
        for index, part in enumerate(_encode_by_parts(encoder, pieces, contents)):
            message, is_content = divmod(index, 2)
            trained = np.full(len(part), bool(is_content) and roles[message] == "assistant")
            ends_answer = index and not is_content and roles[message - 1] == "assistant"
            if ends_answer and len(part) and _ends_turn(encoder, pieces[message]):
                trained[0] = True
            parts.append((part, trained))
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


def encode_question(encoder: Encoder, messages: Sequence[Message]) -> np.ndarray:
    """The ids of a conversation up to where the assistant's next answer begins, int32 of shape (length,).

    Control tokens in the messages are text here as they are in training.
    """
    pieces, contents, rendered = _rendered(encoder, messages, asks=True)
    ids = encoder.ids_and_ends(rendered, plain=False)[0]
    if _is_contaminated(encoder, pieces, contents, ids):
        return np.concatenate(_encode_by_parts(encoder, pieces, contents))
    return ids


def _rendered(encoder: Encoder, messages: Sequence[Message], *, asks: bool) -> tuple[tuple[str, ...], list[str], str]:
    """The template's pieces, the contents as it gives them, and both together."""
    pieces = encoder.skeleton(tuple(m.role for m in messages), asks=asks)
    contents = [m.content for m in messages]
    rendered = encoder.render(messages, asks=asks)
    if _join(pieces, contents) != rendered:
        contents = [c.strip() for c in contents]  # some templates trim
        if _join(pieces, contents) != rendered:
            raise ConfigurationError("the chat template rewrites the messages' text; Forge cannot mask it")
    return pieces, contents, rendered


def _is_contaminated(encoder: Encoder, pieces: Sequence[str], contents: Sequence[str], ids: np.ndarray) -> bool:
    """Whether a content holds a control token: literally, or once the tokenizer has normalised it."""
    if any(token in content for token in encoder.control for content in contents):
        return True
    own = sum(encoder.num_control(encoder.ids_and_ends(piece, plain=False)[0]) for piece in pieces)
    return encoder.num_control(ids) != own


def _encode_by_parts(encoder: Encoder, pieces: Sequence[str], contents: Sequence[str]) -> list[np.ndarray]:
    """The ids of piece, content, piece, ... in turn, the contents' as text."""
    parts = [encoder.ids_and_ends(pieces[0], plain=False)[0]]
    for content, piece in zip(contents, pieces[1:], strict=True):
        parts.append(encoder.ids_and_ends(content, plain=True)[0])
        parts.append(encoder.ids_and_ends(piece, plain=False)[0])
    return parts


def _join(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return "".join(p + c for p, c in zip(pieces, (*contents, ""), strict=True))


def _ends_turn(encoder: Encoder, piece: str) -> int:
    """Length of the control token with which ``piece`` begins, 0 if it begins otherwise."""
    return next((len(token) for token in encoder.control if piece.startswith(token)), 0)
