"""A conversation's ids and labels, rendered by the tokenizer's own chat template.

What is trained is what is asked: the text before a reply is the text with which the model will be asked for it, and
whatever the template puts between the two is trained with the reply (:func:`encode_conversation`).

Control tokens that stand literally in a message (``<|im_end|>`` and the like) are encoded as
ordinary text, so a document cannot end its own turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from forge.training.data.records import Message
from forge.training.models.tokenizers import load_tokenizer
from forge.training.system.errors import ConfigurationError, DataError

IGNORED = -100  # torch's ignore_index: a label that carries no loss
_REMEDY = "use an instruction-tuned base, or correct its template: chat_template.jinja in its directory comes first"


class UnrepresentableError(DataError):
    """A conversation that the chat template refuses, rewrites, or would ask for in another way than it trains it."""


def load_encoder(base_dir: Path | str, template_date: str | None = None) -> Encoder:
    """The encoder of a base: what `check` builds is what trains. Raises like :class:`Encoder` and `load_tokenizer`."""
    return Encoder(load_tokenizer(base_dir), template_date)


class Encoder:
    """The tokenizer twice: as it is, and with its added tokens taken out.

    ``template_date`` (ISO 8601, by default today) is what a chat template gets that asks for the date; ``is_dated``:
    whether it does. ``remarks``: what is unusual about the template, a line each. Raises
    :class:`ConfigurationError` for a template or a tokenizer that documents cannot be trained with.
    """

    def __init__(self, tokenizer: Any, template_date: str | None = None) -> None:
        from tokenizers import Tokenizer

        if not tokenizer.chat_template:
            raise ConfigurationError(
                "the base model's tokenizer has no chat template",
                remedy="use an instruction-tuned base, or add chat_template.jinja to its directory",
            )
        self.tokenizer = tokenizer
        self.template_date = template_date or date.today().isoformat()
        self.is_dated = False
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
        self._skeletons: dict[tuple[tuple[str, ...], bool], tuple[str, ...]] = {}
        unsafe = [token for token in self.control if self.num_control(self.ids_and_ends(token, plain=True)[0])]
        if unsafe:
            raise ConfigurationError(
                f"the base model's tokenizer cannot write {unsafe[0]} as text: documents could end their own turn",
                remedy="use a base with a byte-level tokenizer, such as Qwen2's",
            )
        try:
            self.remarks = tuple(_remarks(self))
        except DataError as error:
            raise ConfigurationError(error.message, remedy=_REMEDY) from error

    def num_control(self, ids: np.ndarray) -> int:
        """How many of ``ids`` are control tokens."""
        return int(np.isin(ids, self.control_ids).sum())

    def ids_and_ends(self, text: str, plain: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and each token's character range [start, end)."""
        encoding = (self.plain if plain else self.full).encode(text, add_special_tokens=False)
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.asarray(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1]

    def render(self, messages: Sequence[Message], *, asks: bool) -> str:
        """A conversation by the chat template; ``asks``: up to where an answer begins.

        Raises :class:`UnrepresentableError` where the template refuses it.
        """
        from jinja2 import TemplateError

        rows = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                rows, tokenize=False, add_generation_prompt=asks, strftime_now=self._strftime_now
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:  # what a template does is its author's
            problem = str(error).partition("\n")[0]
            raise UnrepresentableError(
                f"the base model's chat template refuses the conversation: {problem:.200}"
            ) from error
        return str(text)

    def _strftime_now(self, form: str) -> str:
        """What templates call for the date; transformers' own would write another tomorrow."""
        self.is_dated = True
        return date.fromisoformat(self.template_date).strftime(form)

    def parts(self, messages: Sequence[Message], *, asks: bool) -> list[str]:
        """The rendered conversation in turn: the template's text, a content as it renders it, ..., the template's text.

        Contents may be trimmed. Raises :class:`UnrepresentableError` where the template changes more of them.
        """
        pieces = self._skeleton(tuple(m.role for m in messages), asks=asks)
        rendered = self.render(messages, asks=asks)
        parts, position = [pieces[0]], len(pieces[0])
        for message, piece in zip(messages, pieces[1:], strict=True):
            kept = (text for text in _trimmed(message.content) if rendered.startswith(text + piece, position))
            content = next(kept, message.content)
            parts += [content, piece]
            position += len(content) + len(piece)
        text = "".join(parts)
        if text != rendered:
            expected, found = _around_difference(text, rendered)
            raise UnrepresentableError(
                f"the chat template rewrites the messages' text: expected {expected!r}, rendered {found!r}"
            )
        return parts

    def _skeleton(self, roles: tuple[str, ...], *, asks: bool) -> tuple[str, ...]:
        """The template's own text around each message's content; ``len(roles) + 1`` pieces, kept for the next time."""
        if (roles, asks) not in self._skeletons:
            marks = [f"\ue000{index}\ue001" for index in range(len(roles))]
            rest, pieces = self.render([Message(r, m) for r, m in zip(roles, marks, strict=True)], asks=asks), []
            for mark in marks:
                piece, separator, rest = rest.partition(mark)
                if not separator or mark in rest:
                    raise UnrepresentableError(
                        "the chat template drops, repeats or reorders messages; Forge cannot mask it"
                    )
                pieces.append(piece)
            self._skeletons[roles, asks] = (*pieces, rest)
        return self._skeletons[roles, asks]


def _remarks(encoder: Encoder) -> Iterator[str]:
    """Train and ask one example each way. Raises :class:`DataError` if the template cannot be trained with."""
    question, answer = Message("user", "What is it?"), Message("assistant", "It is a forge.")
    before = "".join(encoder.parts([question, answer], asks=False)[:3])
    asked = encoder.render([question], asks=True)
    _trainable(encoder, [question, answer])
    with suppress(UnrepresentableError):  # a template may refuse system messages
        encoder.render([Message("system", "Be brief."), question], asks=True)
    if before != asked:
        if before.startswith(asked):
            yield f"the chat template begins a reply with {before.removeprefix(asked)!r}: trained as part of it"
        else:
            added = asked.removeprefix(before)
            yield f"the chat template ends a question with {added!r}, and so does every question that is trained"
    if encoder.is_dated:
        yield f"the chat template writes the date: {encoder.template_date} in this run, also when it resumes"


def encode_conversation(
    encoder: Encoder, messages: Sequence[Message], loss_on: str
) -> tuple[np.ndarray, np.ndarray, bool]:
    """One conversation's ids and labels, both int32 of shape (length,), and whether it held control tokens.

    With ``loss_on="answer"`` everything is trained from where the model is asked for a reply to the token that ends
    its turn: the assistant's text as the template renders it, and what the template puts before it.
    Raises :class:`UnrepresentableError` where the template rewrites the content it is given, or asks
    otherwise than it renders.
    """
    parts, spans = _trainable(encoder, messages)
    ids, starts, ends, contaminated = _encode(encoder, parts)
    trained = np.full(len(ids), loss_on == "all")
    for begin, end in spans:
        # a token that straddles the border carries some of the answer: it is trained
        trained |= (ends > begin) & (starts < end)
    return ids, np.where(trained, ids, IGNORED).astype(np.int32), contaminated


def encode_question(encoder: Encoder, messages: Sequence[Message]) -> np.ndarray:
    """The ids of a conversation up to where the assistant's next answer begins, int32 of shape (length,).

    Control tokens in the messages are text here as they are in training.
    """
    return _encode(encoder, encoder.parts(messages, asks=True))[0]


def _trainable(encoder: Encoder, messages: Sequence[Message]) -> tuple[list[str], list[tuple[int, int]]]:
    """The parts of a conversation to train on, and the character range [begin, end) of each reply in their text.

    A reply begins where the template, asked for it, stops. Where that is not in the rendered conversation, the last
    reply is put behind the question as it is asked; an earlier one cannot be.
    """
    parts = encoder.parts(messages, asks=False)
    spans = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before, asked = "".join(parts[: 2 * index + 1]), encoder.render(messages[:index], asks=True)
        if not before.startswith(asked):
            if index + 1 < len(messages) or not asked.startswith(before) or _is_open(asked[len(before) :]):
                raise UnrepresentableError(_mismatch(before, asked))
            parts = [*encoder.parts(messages[:index], asks=True), *parts[-2:]]
            before = asked
        content, piece = parts[2 * index + 1 : 2 * index + 3]
        spans.append((len(asked), len(before) + len(content) + _ends_turn(encoder, piece)))
    return parts, spans


def _is_open(added: str) -> bool:
    """Whether a question ends inside the model's thoughts: a reply put there would be one."""
    return added.count("<think>") > added.count("</think>")


def _mismatch(before: str, asked: str) -> str:
    trained, wanted = _around_difference(before, asked)
    return f"the chat template asks for a reply with {wanted!r}, and renders it behind {trained!r}"


def _around_difference(first: str, second: str, width: int = 40) -> tuple[str, str]:
    """Both texts from shortly before they differ."""
    pairs = enumerate(zip(first, second, strict=False))
    equal = next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
    begin = max(0, equal - width // 2)
    return first[begin : begin + width], second[begin : begin + width]


def _trimmed(content: str) -> Iterator[str]:
    """The content, then what is left of it as templates trim it, longest first."""
    yield content
    lefts = {content, content.lstrip("\n"), content.lstrip()}
    texts = {text for left in lefts for text in (left, left.rstrip("\n"), left.rstrip())}
    yield from sorted(texts - {content}, key=len, reverse=True)


def _encode(encoder: Encoder, parts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Ids of the parts' text, each token's character range [start, end), and whether a content holds control tokens.

    If one does (literally, or once the tokenizer has normalised it), the contents are encoded by themselves, as text.
    """
    pieces, contents = parts[::2], parts[1::2]
    ids, starts, ends = encoder.ids_and_ends("".join(parts), plain=False)
    contaminated = any(token in content for token in encoder.control for content in contents)
    if not contaminated:
        own = sum(encoder.num_control(encoder.ids_and_ends(piece, plain=False)[0]) for piece in pieces)
        contaminated = encoder.num_control(ids) != own
    if not contaminated:
        return ids, starts, ends, False
    position, rows = 0, []
    for index, part in enumerate(parts):
        ids, starts, ends = encoder.ids_and_ends(part, plain=bool(index % 2))
        rows.append((ids, starts + position, ends + position))
        position += len(part)
    ids, starts, ends = (np.concatenate(column) for column in zip(*rows, strict=True))
    return ids, starts, ends, True


def _ends_turn(encoder: Encoder, piece: str) -> int:
    """Length of the control token with which ``piece`` begins, and of blanks before it; 0 if it begins otherwise."""
    blanks = len(piece) - len(piece.lstrip(" "))
    return next((blanks + len(token) for token in encoder.control if piece.startswith(token, blanks)), 0)
