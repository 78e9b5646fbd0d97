"""Is a model's chat template ChatML, and with which default system message? Found out by rendering it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from forge.training.data.conversation import Encoder
from forge.training.data.records import Message
from forge.training.system.errors import DataError

_OPENING = "<|im_start|>assistant\n"
_USER = Message("user", "a")
_TALK = (Message("system", "s"), _USER, Message("assistant", "b"), Message("user", "c"))
_PADDED = tuple(Message(message.role, f"\n {message.content} \n\n") for message in _TALK)
_THOUGHT = (_USER, Message("assistant", "<think>\nt\n</think>\n\nb"), Message("user", "c"))


@dataclass(frozen=True)
class ChatML:
    """ChatML as a model's own template renders it.

    ``default_system``: what it puts where no system message is given, ``""`` for nothing; ``reply_opening``: what it
    puts behind the assistant's opening when it asks; ``remarks``: what it does that a Modelfile cannot.
    """

    default_system: str
    reply_opening: str = ""
    remarks: tuple[str, ...] = ()


def recognise_chatml(encoder: Encoder) -> ChatML | None:
    """What kind of ChatML a tokenizer's template is; None if it renders conversations differently."""
    try:
        talk, alone = encoder.render(_TALK, asks=True), encoder.render([_USER], asks=True)
    except DataError:
        return None
    reply_opening = talk.removeprefix(_chatml(_TALK))
    ending = _chatml([_USER]) + reply_opening
    if not talk.startswith(_chatml(_TALK)) or not alone.endswith(ending):
        return None
    opening = alone.removesuffix(ending)
    system = opening.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
    if opening != (f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""):
        return None
    if "<|" in system or any("{{" in text for text in (system, reply_opening)):  # Go's template would read it
        return None
    return ChatML(system, reply_opening, tuple(_remarks(encoder, opening, reply_opening)))


def _remarks(encoder: Encoder, opening: str, reply_opening: str) -> Iterator[str]:
    if _renders_otherwise(encoder, _PADDED, reply_opening):
        yield "the chat template trims blanks and empty lines around messages: a Modelfile cannot"
    if _renders_otherwise(encoder, _THOUGHT, reply_opening, opening):
        yield "the chat template leaves the thoughts before </think> out of earlier replies: a Modelfile cannot"
    if encoder.is_dated:
        yield (
            f"the chat template writes the date: the Modelfile has that of the training, {encoder.template_date}, "
            "and the GGUF file's own template today's"
        )


def _renders_otherwise(encoder: Encoder, talk: Sequence[Message], reply_opening: str, opening: str = "") -> bool:
    try:
        return encoder.render(talk, asks=True) != opening + _chatml(talk) + reply_opening
    except DataError:
        return True


def _chatml(messages: Sequence[Message]) -> str:
    """Up to where a reply begins."""
    return "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages) + _OPENING
