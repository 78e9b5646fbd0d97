"""Does a GGUF file read text as training did? Its tokens, its special tokens and its chat template, in llama.cpp.

Two differences are known and counted, not faults: text that is not in normal form NFC, which some tokenizers compose
and llama.cpp does not (it must be equal once composed), and ordinary text that llama.cpp takes for the end of a turn
(``</s>`` in Qwen2's vocabulary; what is around it must be equal).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from forge.training.data.conversation import Encoder, UnrepresentableError
from forge.training.data.records import Message
from forge.training.export.awkward_text import CONVERSATIONS, awkward_strings
from forge.training.export.gguf import check_header, memory_limit_bytes
from forge.training.export.proven import Reading
from forge.training.llamacpp.parent import Child, time_limit_seconds
from forge.training.system.errors import CheckError

Tokenize = Callable[[list[str]], list[list[int]]]  # ids of each text


def compare_reading(
    path: Path, encoder: Encoder, documents: Sequence[list[int]], questions: Sequence[list[Message]]
) -> Reading:
    """Compare a file with the encoder that trained. ``documents``: ids of examples; ``questions``: the user's own.

    Raises :class:`CheckError` where llama.cpp refuses the vocabulary or dies of it.
    """
    check_header(path)
    num_bytes = path.stat().st_size
    with Child(memory_limit_bytes=memory_limit_bytes(num_bytes)) as child:

        def ask(task: str, **arguments: Any) -> dict[str, Any]:
            doing, limit = f"use the vocabulary of {path}", time_limit_seconds(num_bytes)
            return child.ask(task, arguments, doing=doing, limit_seconds=limit).value

        try:
            opened = ask("open_vocabulary", path=str(path.absolute()))
            tokens, num_strings, num_known = _compare_tokens(encoder, opened, documents, ask)
        except CheckError as error:
            raise CheckError(f"tokens: {error.message}", remedy=error.remedy) from error
        try:
            template, num_conversations = _compare_template(encoder, opened, questions, ask)
        except CheckError as error:
            raise CheckError(f"template: {error.message}", remedy=error.remedy) from error
    faults = {"tokens": tokens, "specials": special_faults(encoder, opened), "template": template}
    found = {name: lines for name, lines in faults.items() if lines}
    return Reading(num_strings, len(documents), num_conversations, num_known, found)


def _compare_tokens(
    encoder: Encoder, opened: dict[str, Any], documents: Sequence[list[int]], ask: Callable[..., dict[str, Any]]
) -> tuple[list[str], int, int]:
    """Faults, how many strings were compared, and how many known differences there are."""
    ordinary_ends = [text for text in opened["ends"].values() if text not in encoder.control]
    faults: list[str] = []
    num_strings = num_known = 0
    texts = [encoder.full.decode(ids, skip_special_tokens=False) for ids in documents]
    for is_named in (True, False):
        strings = awkward_strings(encoder.control) | ({"your documents": texts} if is_named else {})

        def trained_ids(given: list[str], is_named: bool = is_named) -> list[list[int]]:
            return [encoder.ids_and_ends(text, plain=not is_named)[0].tolist() for text in given]

        def read_ids(given: list[str], is_named: bool = is_named) -> list[list[int]]:
            return list(ask("tokenize", texts=given, special=is_named, add_bos=False)["ids"])

        by_kind, differences = compare_strings(strings, trained_ids, read_ids, ordinary_ends)
        num_strings += sum(counts["num_strings"] for counts in by_kind.values())
        num_known += sum(counts["num_not_nfc"] + counts["num_end_of_turn"] for counts in by_kind.values())
        if differences:
            first = differences[0]
            faults.append(
                f"{len(differences)} of {num_strings} strings are read as other tokens, of {first['kind']!r} for one: "
                f"{first['text']:.60} is {first['found'][:6]}, trained was {first['wanted'][:6]}"
            )
    sequences = [ids for ids, text in zip(documents, texts, strict=True) if not any(e in text for e in ordinary_ends)]
    sequences += [encoder.ids_and_ends(text, plain=True)[0].tolist() for text in ("a b", "\u00e9\U0001f525 \n\tx'll")]
    wanted = [encoder.full.decode(ids, skip_special_tokens=False) for ids in sequences]
    found = ask("detokenize", sequences=sequences)["texts"]
    # a document may have been cut within a character
    wrong = [i for i, pair in enumerate(zip(wanted, found, strict=True)) if _cut(pair[0]) != _cut(pair[1])]
    if wrong:
        faults.append(f"{len(wrong)} of {len(wanted)} sequences decode to other text: {ascii(found[wrong[0]])[:60]}")
    return faults, num_strings, num_known


def _cut(text: str) -> str:
    return text.rstrip("\ufffd")


def _compare_template(
    encoder: Encoder, opened: dict[str, Any], questions: Sequence[list[Message]], ask: Callable[..., dict[str, Any]]
) -> tuple[list[str], int]:
    """Faults of text and ids up to where an answer begins, and how many conversations were compared."""
    if opened["chat_template"] is None:
        return ["the file has no chat template"], 0
    if encoder.is_dated:  # the file's template writes today's date
        encoder = Encoder(encoder.tokenizer)
    talks = [*([Message(t["role"], t["content"]) for t in talk] for talk in CONVERSATIONS.values()), *questions]
    wanted: list[tuple[list[Message], str]] = []
    for talk in talks:
        with suppress(UnrepresentableError):  # a template may refuse system messages
            wanted.append((talk, encoder.render(talk, asks=True)))
    rows = [[{"role": m.role, "content": m.content} for m in talk] for talk, _ in wanted]
    rendered = ask("render", conversations=rows)
    faults = []
    for (_, text), found, ids in zip(wanted, rendered["texts"], rendered["ids"], strict=True):
        if found != text:
            at = next(
                (i for i, (a, b) in enumerate(zip(found, text, strict=False)) if a != b), min(map(len, (found, text)))
            )
            near = slice(max(0, at - 20), at + 20)
            faults.append(f"a conversation is rendered with {found[near]!r}, trained was {text[near]!r}")
        elif ids != encoder.ids_and_ends(text, plain=False)[0].tolist() and unicodedata.is_normalized("NFC", text):
            faults.append(f"a rendered conversation is read as other tokens: {text[:40]!r}")
    if opened["chat_template"] != encoder.tokenizer.chat_template:
        faults.append("the file's template is not the tokenizer's")
    return [f"{line} ({len(faults)} differences)" for line in faults[:1]], len(wanted)


def compare_strings(
    strings: dict[str, list[str]], trained_ids: Tokenize, read_ids: Tokenize, ends: list[str]
) -> tuple[dict[str, dict[str, int]], list[dict[str, Any]]]:
    """By kind of string: how many, how many equal, known differences; and what differs without being one.

    ``ends``: ordinary texts that llama.cpp takes for the end of a turn.
    """
    by_kind: dict[str, dict[str, int]] = {}
    differences: list[dict[str, Any]] = []
    for kind, texts in strings.items():
        composed = [unicodedata.normalize("NFC", text) for text in texts]
        ids = (trained_ids(texts), read_ids(texts), read_ids(composed))
        counts = by_kind[kind] = {"num_strings": len(texts), "num_equal": 0, "num_not_nfc": 0, "num_end_of_turn": 0}
        for text, nfc, wanted, read, read_composed in zip(texts, composed, *ids, strict=True):
            if read == wanted:
                counts["num_equal"] += 1
            elif text != nfc and read_composed == wanted:
                counts["num_not_nfc"] += 1
            elif any(end in text for end in ends) and _equal_between(nfc, ends, trained_ids, read_ids):
                counts["num_end_of_turn"] += 1
            else:
                differences.append({"kind": kind, "text": ascii(text)[:120], "wanted": wanted[:24], "found": read[:24]})
    return by_kind, differences


def _equal_between(text: str, ends: list[str], trained_ids: Tokenize, read_ids: Tokenize) -> bool:
    """Whether both read the pieces of the text between its ends of turn alike."""
    pieces = re.split("|".join(map(re.escape, ends)), text)
    return trained_ids(pieces) == read_ids(pieces)


def describe_specials(tokenizer: Any, opened: dict[str, Any], control: Sequence[str]) -> dict[str, Any]:
    """BOS, EOS and padding as the tokenizer has them, as the file says them and as llama.cpp uses them.

    ``opened``: what :func:`~forge.training.llamacpp.answers.open_vocabulary` answers.
    """
    bos, eos, probe_ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer("a")["input_ids"]
    return {
        "tokenizer": {"bos": bos, "eos": eos, "padding": tokenizer.pad_token_id},
        "written": opened["written"],
        "used": opened["used"],
        "tokenizer_adds_bos": probe_ids[0] == bos,
        "llama_cpp_adds_bos": opened["adds_bos"],
        "tokenizer_adds_eos": probe_ids[-1] == eos,
        "llama_cpp_adds_eos": opened["adds_eos"],
        "ends_of_turn": sorted(opened["ends"].values()),
        "eos_ends_a_turn": str(eos) in opened["ends"],
        "ordinary_text_that_ends_a_turn": sorted(text for text in opened["ends"].values() if text not in control),
    }


def special_faults(encoder: Encoder, opened: dict[str, Any]) -> list[str]:
    """What llama.cpp does otherwise than training: special tokens, their insertion, the end of a turn."""
    specials = describe_specials(encoder.tokenizer, opened, encoder.control)
    used, faults = specials["used"], []
    for name, wanted in specials["tokenizer"].items():
        if wanted not in (None, used[name]):
            faults.append(f"{name.upper()} is token {used[name]}, trained was {wanted}")
    for name in ("bos", "eos"):
        ours, theirs = specials[f"tokenizer_adds_{name}"], specials[f"llama_cpp_adds_{name}"]
        if ours != theirs:
            faults.append(f"{name.upper()} is put around a text by {'llama.cpp' if theirs else 'the tokenizer'} only")
    if (
        specials["tokenizer"]["bos"] is None is specials["written"]["bos"]
        and "bos_token" in encoder.tokenizer.chat_template
    ):
        faults.append("the template writes BOS, the file names none, and llama.cpp takes an ordinary token for it")
    if (end := _end_of_turn(encoder)) is not None and str(end) not in opened["ends"]:
        faults.append(f"llama.cpp does not stop at token {end}, which ends a turn in training")
    return faults


def _end_of_turn(encoder: Encoder) -> int | None:
    """The control token with which the template ends a reply, ``None`` where it ends with text."""
    after = encoder.parts([Message("user", "a"), Message("assistant", "b")], asks=False)[-1]
    ids = encoder.ids_and_ends(after, plain=False)[0]
    control = [int(i) for i in ids if encoder.num_control(ids[ids == i])]
    return control[0] if control else None
