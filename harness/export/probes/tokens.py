"""Does llama.cpp read text as the tokenizer does?

    python -m harness.export.probes.tokens RUN --gguf FILE [--modelfile FILE] [--expect SHA256]

A few hundred awkward strings (:mod:`~forge.training.export.awkward_text`) are read by the base's tokenizer and by
the vocabulary in the GGUF file: once with control tokens as what they name, once as plain text. There are two known
exceptions, which are counted: text that is not in normal form NFC, which the tokenizer composes and llama.cpp does not
(it must be equal once composed), and ordinary text that llama.cpp takes for the end of a turn (``</s>`` in Qwen2's
vocabulary; what is around it must be equal). Then a few conversations are rendered by transformers, by the GGUF file's
chat template and by the Modelfile's, and compared by text and ids. Last come the special tokens. The keys of the JSON
are in harness/export/answers.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, cast

from forge.training.data.conversation import Encoder, load_encoder
from forge.training.data.records import Message
from forge.training.export.awkward_text import CONVERSATIONS, awkward_strings
from forge.training.export.gguf import check_header, memory_limit_bytes
from forge.training.export.modelfile import parse_modelfile
from forge.training.export.reading import compare_strings, describe_specials
from forge.training.llamacpp.parent import Child, time_limit_seconds
from forge.training.system.errors import DataError
from forge.training.train.record import completed_record
from harness.export.answers import Conversation, ModelfileAnswer, SpecialsAnswer, StringsAnswer, TokensAnswer
from harness.export.probes.go_template import render_chat
from harness.export.probes.models_under_test import add_run, expected_run
from harness.measurement.probe_main import probe_main

_MOST_SHOWN = 20  # differences


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

            strings = awkward_strings(encoder.control)
            by_kind, differences = compare_strings(strings, tokenizer_ids, llama_cpp_ids, ordinary_ends)
            shown = differences[:_MOST_SHOWN]
            return {"by_kind": by_kind, "num_differing": len(differences), "differences": shown}

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
        "specials": cast(SpecialsAnswer, describe_specials(tokenizer, opened, encoder.control)),
        "modelfile": None if modelfile is None else _modelfile(encoder, modelfile),
    }


def _rendered(tokenizer: Any, conversation: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))


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
