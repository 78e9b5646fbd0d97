"""Smoke answers from a GGUF file, through llama-cpp-python in a child process that may crash."""

from __future__ import annotations

from collections.abc import Callable
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
    context_tokens: int = CONTEXT_TOKENS,
) -> str:
    """The model's greedy answer to one prompt, with the file's own chat template.

    Raises :class:`CheckError` if llama.cpp refuses or dies of the model or the adapter,
    :class:`DataError` if the prompt does not fit into ``context_tokens``.
    """
    with _Conversation(gguf_path, system, max_tokens, lora, context_tokens) as conversation:
        return conversation.say(prompt)


def converse(
    gguf_path: Path,
    *,
    system: str | None = None,
    max_tokens: int = 512,
    lora: Path | None = None,
    context_tokens: int = CONTEXT_TOKENS,
    read_line: Callable[[str], str] = input,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> None:
    """Talk until end of input or Ctrl-C; ``/new`` forgets the conversation. Raises like :func:`answer`."""
    with _Conversation(gguf_path, system, max_tokens, lora, context_tokens) as conversation:
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


class _Conversation:
    """A child process with the model loaded, and what was said so far."""

    def __init__(
        self, gguf_path: Path, system: str | None, max_tokens: int, lora: Path | None, context_tokens: int
    ) -> None:
        check_header(gguf_path)
        self._num_bytes = gguf_path.stat().st_size
        if lora is not None:
            check_header(lora)
        self._path, self._lora = gguf_path, lora
        self._context_tokens, self._max_tokens = context_tokens, max_tokens
        self._opening = [{"role": "system", "content": system}] if system else []
        self._child = Child(memory_limit_bytes=memory_limit_bytes(self._num_bytes))
        self.forget()

    def __enter__(self) -> _Conversation:
        self._child.__enter__()
        try:
            self._child.ask(
                "open_chat",
                {
                    "path": str(self._path.absolute()),
                    "lora": str(self._lora.absolute()) if self._lora else None,
                    "context_tokens": self._context_tokens,
                },
                doing=f"load {self._path}",
                limit_seconds=time_limit_seconds(self._num_bytes),
            )
        except BaseException:
            self._child.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._child.__exit__()

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
            limit_seconds=time_limit_seconds(self._num_bytes) + _SECONDS_PER_TOKEN * self._max_tokens,
            progress=on_text,
        ).value
        self._messages = [*messages, {"role": "assistant", "content": str(value["text"])}]
        return str(value["text"])
