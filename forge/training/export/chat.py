"""Smoke answers from a GGUF file, through llama-cpp-python in a child process that may crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from forge.training.export.gguf import check_header, memory_limit_bytes
from forge.training.llamacpp.parent import Child, Progress, time_limit_seconds
from forge.training.system.errors import DataError

CONTEXT_TOKENS = 2048
_SECONDS_PER_TOKEN = 5.0  # a 7B model in 16 bits on two cores makes about one token per second


def answer(
    gguf_path: Path,
    prompt: str,
    *,
    system: str | None = None,
    max_tokens: int = 128,
    lora: Path | None = None,
) -> str:
    """The model's greedy answer to one prompt, with the file's own chat template.

    Raises :class:`CheckError` if llama.cpp refuses or dies of the model or the adapter,
    :class:`DataError` if the prompt does not fit into :data:`CONTEXT_TOKENS`.
    """
    with _conversation(gguf_path, system, max_tokens, lora) as conversation:
        return conversation.say(prompt)


def converse(
    gguf_path: Path,
    *,
    system: str | None = None,
    max_tokens: int = 512,
    lora: Path | None = None,
    read_line: Callable[[str], str] = input,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> None:
    """Talk until end of input or Ctrl-C; ``/new`` forgets the conversation. Raises like :func:`answer`."""
    with _conversation(gguf_path, system, max_tokens, lora) as conversation:
        while True:
            try:
                line = read_line("> ").strip()
                if line == "/new":
                    conversation.forget()
                elif line:
                    conversation.say(line, write)
                    write("\n")
            except DataError as error:  # too long: the conversation as it was stays
                write(f"{error}\n")
            except (EOFError, KeyboardInterrupt):
                write("\n")
                return


@contextmanager
def _conversation(gguf_path: Path, system: str | None, max_tokens: int, lora: Path | None) -> Iterator[_Conversation]:
    check_header(gguf_path)
    if lora is not None:
        check_header(lora)
    num_bytes = gguf_path.stat().st_size
    with Child(memory_limit_bytes=memory_limit_bytes(num_bytes)) as child:
        child.ask(
            "open_chat",
            {
                "path": str(gguf_path.absolute()),
                "lora": str(lora.absolute()) if lora else None,
                "context_tokens": CONTEXT_TOKENS,
            },
            doing=f"load {gguf_path}",
            limit_seconds=time_limit_seconds(num_bytes),
        )
        yield _Conversation(child, gguf_path, system, max_tokens)


class _Conversation:
    """A child process with the model loaded, and what was said so far."""

    def __init__(self, child: Child, gguf_path: Path, system: str | None, max_tokens: int) -> None:
        self._child, self._path, self._max_tokens = child, gguf_path, max_tokens
        self._opening = [{"role": "system", "content": system}] if system else []
        self.forget()

    def forget(self) -> None:
        """Begin a new conversation."""
        self._messages = list(self._opening)

    def say(self, text: str, on_text: Progress | None = None) -> str:
        """Say something and return the reply; pieces go to ``on_text`` as they come."""
        messages = [*self._messages, {"role": "user", "content": text}]
        value = self._child.ask(
            "reply",
            {"messages": messages, "max_tokens": self._max_tokens},
            doing=f"get an answer from {self._path}",
            limit_seconds=time_limit_seconds(self._path.stat().st_size) + _SECONDS_PER_TOKEN * self._max_tokens,
            progress=on_text,
        ).value
        self._messages = [*messages, {"role": "assistant", "content": str(value["text"])}]
        return str(value["text"])
