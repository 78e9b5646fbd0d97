"""Asking a GGUF file through llama.cpp, in a child process that may crash: one question, or a conversation."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from forge.training.export.answer_text import AnswerText
from forge.training.export.gguf import check_header, memory_limit_bytes
from forge.training.export.shipped import Shipped
from forge.training.llamacpp.install import uses_gpu
from forge.training.llamacpp.parent import Child, Progress, time_limit_seconds
from forge.training.system.environment import available_ram_bytes, describe_gpu
from forge.training.system.errors import CheckError, ForgeError
from forge.training.system.files import write_text
from forge.training.system.signals import Stopped

Width = Callable[[], int | None]

LEAST_CONTEXT_TOKENS = 2048  # a conversation needs room, however short the examples were
GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}
_MAX_ANSWER_TOKENS = 512
_SECONDS_PER_TOKEN = 5.0  # a 7B model in 16 bits on two cores makes about one token per second
_SECONDS_PER_PROMPT_TOKEN = 0.5
_SETTABLE: dict[str, type[int] | type[float]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p"), float),
    **dict.fromkeys(("repeat_penalty", "presence_penalty", "frequency_penalty"), float),
    **dict.fromkeys(("top_k", "seed", "max_tokens"), int),
}
_SIGNED = {"presence_penalty", "frequency_penalty"}
_EXAMPLES = {float: "0.7", int: "40"}
_SAMPLING = set(_SETTABLE) - {"max_tokens"}
# Ollama's own where a Modelfile gives some and not these (docs/modelfile)
_OLLAMA = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.1}

COMMANDS = {
    "/help": "this list",
    "/system [TEXT]": "show it, or set another and begin anew",
    "/set [NAME VALUE]": "how it is asked, such as temperature 0.7",
    "/retry": "take the last answer back and ask again",
    "/undo": "take the last question and answer back",
    "/reset": "forget the conversation (also /new)",
    "/save FILE": "as a line of JSON that data.train reads",
    "/quit": "leave (also /exit, Ctrl-D)",
    "Ctrl-C": "stop the answer",
}


@dataclass(frozen=True)
class Settings:
    """How a model is asked. ``sampling``: arguments of llama-cpp-python. ``context_tokens``: ``None``: what fits best.

    ``gpu_layers``: so many layers on the GPU, ``None``: all of them where llama.cpp can.
    """

    system: str | None = None
    sampling: dict[str, Any] = field(default_factory=lambda: dict(GREEDY))
    max_tokens: int = _MAX_ANSWER_TOKENS
    context_tokens: int | None = None
    default_context_tokens: int = LEAST_CONTEXT_TOKENS
    gpu_layers: int | None = None


def settings_of(
    shipped: Shipped,
    *,
    system: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    context_tokens: int | None = None,
    gpu_layers: int | None = None,
) -> Settings:
    """The settings with which a model was trained and shipped, each replaced by what is given.

    Greedy where no sampling parameter is shipped; parameters that a Modelfile leaves out are Ollama's own.
    """
    given = {name: value for name, value in shipped.parameters.items() if name in _SAMPLING}
    sampling = dict(GREEDY)
    if given or temperature:
        sampling = {**_OLLAMA, **given}
    if temperature is not None:
        sampling["temperature"] = temperature
    if stop := shipped.parameters.get("stop"):
        sampling["stop"] = [stop] if isinstance(stop, str) else list(stop)
    predicted, context = shipped.parameters.get("num_predict", 0), shipped.parameters.get("num_ctx", 0)
    return Settings(
        system=shipped.system if system is None else system or None,
        sampling=sampling,
        max_tokens=max_tokens or (predicted if predicted > 0 else _MAX_ANSWER_TOKENS),
        context_tokens=context_tokens,
        default_context_tokens=max(shipped.trained_tokens or 0, context, LEAST_CONTEXT_TOKENS),
        gpu_layers=gpu_layers,
    )


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
    :class:`DataError` if the prompt does not fit into the context.
    """
    with open_conversation(gguf_path, Settings(system=system, max_tokens=max_tokens, gpu_layers=0), lora) as opened:
        return opened.say(prompt)


class Conversation:
    """A child process with the model loaded, and what was said so far."""

    def __init__(self, child: Child, path: Path, settings: Settings, loaded: dict[str, Any]) -> None:
        self._child, self.path, self.settings, self.loaded = child, path, settings, loaded
        self.system = settings.system
        self.is_cut = self.is_stopped = False  # whether the last answer ended at its limit, or was stopped
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        self.messages: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []

    def undo(self) -> str | None:
        """Take the last question and its answer back; the question, ``None`` if there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return None
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        return question

    def say(self, text: str, on_text: Progress | None = None) -> str:
        """Say something and return the reply; pieces go to ``on_text`` as they come.

        Raises :class:`DataError` if it does not fit; the conversation is then as it was before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        seconds = time_limit_seconds(self.path.stat().st_size) + _SECONDS_PER_TOKEN * self.settings.max_tokens
        value = self._child.ask(
            "reply",
            {"messages": messages, "max_tokens": self.settings.max_tokens, "sampling": self.settings.sampling},
            doing=f"get an answer from {self.path}",
            limit_seconds=seconds + _SECONDS_PER_PROMPT_TOKEN * int(self.loaded["context_tokens"]),
            progress=on_text,
        ).value
        self.messages = [*messages, {"role": "assistant", "content": str(value["text"])}]
        self.is_cut, self.is_stopped = bool(value["is_cut"]), bool(value["is_stopped"])
        return str(value["text"])

    def stop_answer(self) -> None:
        """End the answer that is being made; :meth:`say` returns what there is of it."""
        self._child.interrupt()

    def set(self, name: str, value: float) -> None:
        """Set a sampling parameter or ``max_tokens`` for the answers that follow."""
        if name == "max_tokens":
            self.settings = replace(self.settings, max_tokens=int(value))
            return
        sampling = self.settings.sampling
        if name == "temperature" and value and not sampling["temperature"]:  # what greedy leaves out
            sampling = {**_OLLAMA, **sampling}
        self.settings = replace(self.settings, sampling={**sampling, name: value})

    def describe_settings(self) -> str:
        """How it is asked, in one line: greedy, or by which parameters."""
        numbers = {name: value for name, value in self.settings.sampling.items() if name in _SAMPLING}
        is_greedy = not numbers["temperature"]  # then nothing but the penalties has an effect
        if is_greedy:
            numbers = {n: value for n, value in numbers.items() if "penalty" in n and value != GREEDY.get(n, 0)}
        return ", ".join(["greedy"] * is_greedy + [f"{name} {value:g}" for name, value in numbers.items()])

    def describe(self) -> str:
        """One line: the file, where it computes, its context, how it is asked."""
        settings, context = self.settings, int(self.loaded["context_tokens"])
        place = "on the GPU" if self.loaded["on_gpu"] else "on the CPU"
        wanted = min(settings.default_context_tokens, self.loaded["positions"] or math.inf)
        less = f" of {wanted:,} (memory)" if settings.context_tokens is None and context < wanted else ""
        how = self.describe_settings()
        size = f"{self.path.stat().st_size / 1e9:.2f} GB"
        return f"{self.path.name} ({size}) {place}, context {context:,}{less}, {how}; {_system_line(self.system)}"


def _system_line(system: str | None) -> str:
    text = " ".join(system.split()) if system else ""
    return f"system prompt: {text[:60]}{'...' if len(text) > 60 else ''}" if text else "no system prompt of its own"


@contextmanager
def open_conversation(gguf_path: Path, settings: Settings, lora: Path | None = None) -> Iterator[Conversation]:
    """Load a GGUF file in a child process for the time of the block. Raises as :func:`answer`."""
    check_header(gguf_path)
    if lora is not None:
        check_header(lora)
    num_bytes = gguf_path.stat().st_size
    gpu = describe_gpu() if settings.gpu_layers != 0 else None
    on_gpu = gpu is not None and uses_gpu()
    free_bytes = (gpu or {}).get("memory_free_bytes") if on_gpu else available_ram_bytes()
    # CUDA reserves far more address space than it uses
    with Child(memory_limit_bytes=None if on_gpu else memory_limit_bytes(num_bytes)) as child:
        try:
            loaded = child.ask(
                "open_chat",
                {
                    "path": str(gguf_path.absolute()),
                    "lora": str(lora.absolute()) if lora else None,
                    "context_tokens": settings.context_tokens or settings.default_context_tokens,
                    "is_insisted": settings.context_tokens is not None,
                    "free_bytes": max(0, free_bytes - num_bytes) if free_bytes is not None else None,
                    "gpu_layers": (-1 if settings.gpu_layers is None else settings.gpu_layers) if on_gpu else 0,
                },
                doing=f"load {gguf_path}",
                limit_seconds=time_limit_seconds(num_bytes),
            ).value
        except CheckError as error:
            remedy = "--gpu-layers 0 keeps it on the CPU" if on_gpu else error.remedy
            raise CheckError(error.message, remedy=remedy) from error
        yield Conversation(child, gguf_path, settings, loaded)


def chat(
    models: Sequence[tuple[Path, Settings, Path | None]],
    *,
    question: str | None = None,
    read_line: Callable[[], str],
    write: Callable[[str], None],
    say: Callable[[str], None],
    width: Width = lambda: None,
) -> list[dict[str, Any]]:
    """Ask one question, or talk until end of input, with one model or several side by side.

    Returns what each model was asked with and answered to the one question; nothing after a conversation, in which
    Ctrl-C stops an answer, and elsewhere drops the line that is being typed.

    ``models``: file, settings, adapter as GGUF. ``write``: answers as they come; ``say``: everything else, by lines.
    ``width``: columns that answers are broken to.
    Raises as :func:`answer`; in a conversation a question that is too long costs only itself.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(open_conversation(*model)) for model in models]
        for conversation in opened:
            say(conversation.describe())
        if question is not None:
            _ask(opened, question, write, say, width)
            return [_answered(conversation) for conversation in opened]
        say("/help lists the commands")
        while True:
            try:
                with _ctrl_c(signal.default_int_handler):
                    line = read_line().rstrip()
            except EOFError:
                write("\n")
                return []
            except Stopped:
                raise
            except KeyboardInterrupt:
                write("\n")
                say("/quit or Ctrl-D leaves")
                continue
            try:
                if line.startswith("/"):
                    if not _obey(line, opened, write, say, width):
                        return []
                elif line.strip():
                    _ask(opened, line.strip(), write, say, width, is_stoppable=True)
            except ForgeError as error:
                if isinstance(error, CheckError):  # the child may be gone
                    raise
                say(str(error))


@contextmanager
def _ctrl_c(handle: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Have ``handle`` called for SIGINT inside the block; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _answered(conversation: Conversation) -> dict[str, Any]:
    settings = conversation.settings
    return {
        "model": conversation.path.name,
        "answer": conversation.messages[-1]["content"],
        "is_cut": conversation.is_cut,
        "system": conversation.system,
        "sampling": settings.sampling,
        "max_tokens": settings.max_tokens,
        "context_tokens": conversation.loaded["context_tokens"],
    }


def _ask(
    opened: Sequence[Conversation],
    question: str,
    write: Callable[[str], None],
    say: Progress,
    width: Width,
    *,
    is_stoppable: bool = False,
) -> None:
    for conversation in opened:
        name = f"{conversation.path.name}: " if len(opened) > 1 else ""
        if name:
            write(name)
        shown = AnswerText(write, width(), len(name))
        with _ctrl_c(lambda *_, asked=conversation: asked.stop_answer()) if is_stoppable else nullcontext():
            conversation.say(question, shown.add)
        shown.end()
        if conversation.is_stopped:
            say("(stopped)")
        if conversation.is_cut:
            limit, context = conversation.settings.max_tokens, conversation.loaded["context_tokens"]
            say(f"(cut: --max-tokens {limit} or the context of {context:,} tokens is used up)")


def _obey(line: str, opened: Sequence[Conversation], write: Callable[[str], None], say: Progress, width: Width) -> bool:
    """Carry out a command; whether the conversation goes on."""
    command, _, rest = line.partition(" ")
    rest, first = rest.strip(), opened[0]
    if command in ("/exit", "/quit"):
        return False
    if command == "/help":
        for name, meaning in COMMANDS.items():
            say(f"  {name:<18}{meaning}")
    elif command in ("/reset", "/new"):
        for conversation in opened:
            conversation.reset()
        say("a new conversation")
    elif command == "/system":
        for conversation in opened if rest else ():
            conversation.system = rest
            conversation.reset()
        say(first.system or "no system prompt of its own: the template's")
    elif command == "/set":
        _set(rest, opened, say)
    elif command in ("/undo", "/retry"):
        questions = [conversation.undo() for conversation in opened]
        if questions[0] is None:
            say("nothing was asked yet")
        elif command == "/retry":
            if not first.settings.sampling["temperature"]:
                say("greedy: the same answer comes again; /set temperature 0.7 varies it")
            _ask(opened, questions[0], write, say, width, is_stoppable=True)
        else:
            say(f"taken back: {questions[0]}")
    elif command == "/save":
        _save(rest, first, say)
    else:
        say(f"no command {command}: /help lists them; a question that begins with / takes a blank before it")
    return True


def _set(rest: str, opened: Sequence[Conversation], say: Progress) -> None:
    name, _, text = rest.partition(" ")
    if name:
        kind = _SETTABLE.get(name)
        if kind is None:
            say(f"no setting {name}: {', '.join(_SETTABLE)}")
            return
        try:
            value = kind(text)
        except ValueError:
            say(f"/set {name} needs a {'whole ' if kind is int else ''}number, such as /set {name} {_EXAMPLES[kind]}")
            return
        if not math.isfinite(value) or (value < 0 and name not in _SIGNED) or (name == "max_tokens" and not value):
            say(f"{name} cannot be {text.strip()}")
            return
        for conversation in opened:
            conversation.set(name, value)
    say(f"{opened[0].describe_settings()}, max_tokens {opened[0].settings.max_tokens}")


def _save(name: str, conversation: Conversation, say: Progress) -> None:
    if not name:
        say("/save needs a file's name")
        return
    if not any(message["role"] == "assistant" for message in conversation.messages):
        say("nothing was asked yet")
        return
    path = Path(name).expanduser()
    if path.exists() or path.is_symlink():
        say(f"{path} exists already: name another file")
        return
    write_text(path, json.dumps({"messages": conversation.messages}, ensure_ascii=False) + "\n")
    say(f"written: {path}")
