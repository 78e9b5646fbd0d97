"""Does llama.cpp read text as the tokenizer does?

    python -m harness.export.probes.tokens RUN --gguf FILE [--modelfile FILE] [--expect SHA256]

A few hundred awkward strings (:mod:`~harness.export.probes.tokenizer_strings`) are read by the base's tokenizer and by
the vocabulary in the GGUF file: once with control tokens as what they name, once as plain text. There are two known
exceptions, which are counted: text that is not in normal form NFC, which the tokenizer composes and llama.cpp does not
(it must be equal once composed), and ordinary text that llama.cpp takes for the end of a turn (``</s>`` in Qwen2's
vocabulary; what is around it must be equal). Then a few conversations are rendered by transformers, by the GGUF file's
chat template and by the Modelfile's, and compared by text and ids. Last come the special tokens. The keys of the JSON
are in harness/export/answers.py.
"""

from __future__ import annotations

import argparse
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge.training.data.conversation import Encoder, load_encoder
from forge.training.data.records import Message
from forge.training.export.gguf import check_header, memory_limit_bytes
from forge.training.export.modelfile import parse_modelfile
from forge.training.llamacpp.parent import Child, time_limit_seconds
from forge.training.system.errors import DataError
from forge.training.train.record import completed_record
from harness.export.answers import Conversation, ModelfileAnswer, SpecialsAnswer, StringsAnswer, TokensAnswer
from harness.export.probes.go_template import render_chat
from harness.export.probes.models_under_test import add_run, expected_run
from harness.export.probes.tokenizer_strings import CONVERSATIONS, awkward_strings
from harness.measurement.probe_main import probe_main

_MOST_SHOWN = 20  # differences
_Tokenize = Callable[[list[str]], list[list[int]]]  # ids of each text


def compare_tokens(run_dir: Path, gguf: Path, modelfile: Path | None = None) -> TokensAnswer:
    """The comparison described above. Raises :class:`CheckError` where llama.cpp dies."""
    run = completed_record(run_dir)
    encoder = load_encoder(run.base_path, run.inputs.template_date)
    tokenizer = encoder.tokenizer
    check_header(gguf)
    num_bytes = gguf.stat().st_size
    limit = time_limit_seconds(num_bytes)
    with Child(memory_limit_bytes=memory_limit_bytes(num_bytes)) as child:

        def ask(task: str, **arguments: Any) -> dict[str, Any]:
            return child.ask(task, arguments, doing=f"use the vocabulary of {gguf}", limit_seconds=limit).value

        def compared(is_named: bool) -> StringsAnswer:
            def tokenizer_ids(texts: list[str]) -> list[list[int]]:
                if is_named:
                    return [list(tokenizer(text)["input_ids"]) for text in texts]
                return [encoder.ids_and_ends(text, plain=True)[0].tolist() for text in texts]

            def llama_cpp_ids(texts: list[str]) -> list[list[int]]:
                return list(ask("tokenize", texts=texts, special=is_named)["ids"])

            return _compare_strings(awkward_strings(encoder.control), tokenizer_ids, llama_cpp_ids, ordinary_ends)

        opened = ask("open_vocabulary", path=str(gguf.absolute()))
        ordinary_ends = [text for text in opened["ends"].values() if text not in encoder.control]
        strings = {"control tokens named": compared(True), "plain text": compared(False)}
        rendered = ask("render", conversations=list(CONVERSATIONS.values()))
    conversations: list[Conversation] = []
    for (name, talk), text, ids in zip(CONVERSATIONS.items(), rendered["texts"], rendered["ids"], strict=True):
        wanted = _rendered(tokenizer, talk)
        wanted_ids = list(tokenizer(wanted, add_special_tokens=False)["input_ids"])
        conversations.append({"name": name, "text_is_equal": text == wanted, "ids_are_equal": ids == wanted_ids})
    return {
        "run": {"adapter_sha256": run.adapter_sha256, "tokenizer_sha256": run.inputs.tokenizer_sha256},
        "file": {"name": gguf.name, "pre_tokenizer": opened["pre_tokenizer"]},
        "strings": strings,
        "template_is_equal": opened["chat_template"] == tokenizer.chat_template,
        "conversations": conversations,
        "specials": _specials(tokenizer, opened, ordinary_ends),
        "modelfile": None if modelfile is None else _modelfile(encoder, modelfile),
    }


def _rendered(tokenizer: Any, conversation: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))


def _compare_strings(
    strings: dict[str, list[str]], tokenizer_ids: _Tokenize, llama_cpp_ids: _Tokenize, ends: list[str]
) -> StringsAnswer:
    """By kind of string: how many, how many equal; and what differs without being a known exception."""
    by_kind: dict[str, dict[str, int]] = {}
    differences: list[dict[str, Any]] = []
    for kind, texts in strings.items():
        composed = [unicodedata.normalize("NFC", text) for text in texts]
        ids = (tokenizer_ids(texts), llama_cpp_ids(texts), llama_cpp_ids(composed))
        counts = by_kind[kind] = {"num_strings": len(texts), "num_equal": 0, "num_not_nfc": 0, "num_end_of_turn": 0}
        for text, nfc, wanted, read, read_composed in zip(texts, composed, *ids, strict=True):
            if read == wanted:
                counts["num_equal"] += 1
            elif text != nfc and read_composed == wanted:
                counts["num_not_nfc"] += 1
            elif any(end in text for end in ends) and _equal_between(nfc, ends, tokenizer_ids, llama_cpp_ids):
                counts["num_end_of_turn"] += 1
            else:
                difference = {"kind": kind, "text": ascii(text)[:120], "wanted": wanted[:24], "found": read[:24]}
                differences.append(difference)
    return {"by_kind": by_kind, "num_differing": len(differences), "differences": differences[:_MOST_SHOWN]}


def _equal_between(text: str, ends: list[str], tokenizer_ids: _Tokenize, llama_cpp_ids: _Tokenize) -> bool:
    """Whether both read the pieces of the text between its ends of turn alike."""
    pieces = re.split("|".join(map(re.escape, ends)), text)
    return tokenizer_ids(pieces) == llama_cpp_ids(pieces)


def _specials(tokenizer: Any, opened: dict[str, Any], ordinary_ends: list[str]) -> SpecialsAnswer:
    """BOS, EOS and padding as the tokenizer has them, as the file says them and as llama.cpp uses them."""
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
        "ordinary_text_that_ends_a_turn": sorted(ordinary_ends),
    }


def _modelfile(encoder: Encoder, modelfile: Path) -> ModelfileAnswer:
    """The Modelfile by a parser of Ollama's grammar, and its template by Go's rules. Raises :class:`CheckError`."""
    try:
        commands = parse_modelfile(modelfile.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {modelfile}: {error.strerror}") from error
    values: dict[str, list[str]] = {}
    for command in commands:
        values.setdefault(command.name, []).append(command.value)
    model, stops = values["model"][0], values.get("stop", [])
    template, system = values.get("template", [""])[0], values.get("system", [""])[0]
    conversations: list[Conversation] = []
    for name, talk in CONVERSATIONS.items() if template else ():
        if system and talk[0]["role"] != "system":  # as Ollama puts a Modelfile's SYSTEM in front
            talk = [{"role": "system", "content": system}, *talk]
        messages = [Message(turn["role"], turn["content"]) for turn in talk]
        is_equal = render_chat(template, talk) == encoder.render(messages, asks=True)
        conversations.append({"name": name, "text_is_equal": is_equal})
    return {
        "model": model,
        "model_exists": (modelfile.parent / model).is_file(),
        "has_template": bool(template),
        "stops": stops,
        "stops_at_eos": encoder.tokenizer.eos_token in stops,
        "conversations": conversations,
    }


def main() -> int:
    """Print the answer as JSON."""
    parser = argparse.ArgumentParser(prog="harness.export.probes.tokens", description=__doc__.splitlines()[0])
    add_run(parser)
    parser.add_argument("--gguf", type=Path, required=True, metavar="FILE")
    parser.add_argument("--modelfile", type=Path, metavar="FILE", help="default: the one beside the GGUF file")

    def answer(options: argparse.Namespace) -> TokensAnswer:
        beside = options.gguf.parent / "Modelfile"
        modelfile = options.modelfile or (beside if beside.is_file() else None)
        return compare_tokens(expected_run(options), options.gguf, modelfile)

    return probe_main(parser, answer)


if __name__ == "__main__":
    sys.exit(main())
