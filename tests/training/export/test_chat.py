"""Claims about `forge chat`: the right file, asked as it was trained and shipped, and a conversation that forgives."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from forge.training.export import chat as chatting
from forge.training.export.chat import GREEDY, Settings, answer, chat, open_conversation, settings_of
from forge.training.export.export import export_run
from forge.training.export.shipped import Shipped, find_shipped
from forge.training.llamacpp.parent import Child
from forge.training.system.errors import ConfigurationError, DataError
from tests.support.tiny_model import gguf_file, scratch
from tests.support.tiny_run import made_up_run

LONG = "ship " * 3000
ROOT = Path(__file__).resolve().parents[3]


@cache
def exported() -> Path:
    """A run with its export; nobody may change it."""
    run = made_up_run(scratch() / "chat-run", data={"documents": "embedded", "system_prompt": "Be the keeper."})
    export_run(run, quantizations=["f16", "q8_0"])
    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported(), tmp_path / "run"))


# Which file, and how it was shipped


@pytest.mark.parametrize(
    ("given", "file"),
    [
        (".", "lighthouse.q8_0.gguf"),
        ("export", "lighthouse.q8_0.gguf"),
        ("export/lighthouse.f16.gguf", "lighthouse.f16.gguf"),
    ],
)
def test_a_run_its_export_and_a_file_are_opened_with_what_was_shipped(given: str, file: str) -> None:
    shipped = find_shipped(exported() / given)
    assert shipped.path == exported() / "export" / file
    assert (shipped.system, shipped.source) == ("Be the keeper.", "Modelfile")
    assert shipped.parameters["temperature"] == 0.2
    assert shipped.parameters["stop"] == ["<|im_end|>", "<|endoftext|>"]
    assert shipped.trained_tokens == 2048


def test_without_a_modelfile_the_record_says_it_and_a_file_by_itself_says_nothing(run_dir: Path) -> None:
    (run_dir / "export" / "Modelfile").unlink()
    shipped = find_shipped(run_dir)
    assert (shipped.path.name, shipped.system, shipped.source) == (
        "lighthouse.q8_0.gguf",
        "Be the keeper.",
        "export.json",
    )
    assert shipped.parameters == {"temperature": 0.2, "num_ctx": 512}
    foreign = run_dir / "export" / "other.gguf"
    shutil.copyfile(gguf_file("q8_0"), foreign)
    assert find_shipped(foreign) == Shipped(foreign)


def test_what_the_owner_edited_in_the_modelfile_counts(run_dir: Path) -> None:
    path = run_dir / "export" / "Modelfile"
    path.write_text(path.read_text().replace("Be the keeper.", "Be the captain.").replace("0.2", "0.9"))
    shipped = find_shipped(run_dir)
    assert (shipped.system, shipped.parameters["temperature"]) == ("Be the captain.", 0.9)


def not_exported(run: Path) -> Path:
    shutil.rmtree(run / "export")
    return run


def records(run: Path) -> Path:
    (run / "corpus.jsonl").write_text("{}\n")
    return run / "corpus.jsonl"


WRONG: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "adapter": (lambda run: run / "adapter", "is an adapter", "forge export"),
    "records": (records, "is not a GGUF file", "a run, its export folder or a .gguf file"),
    "not exported": (not_exported, "is not exported yet", "forge export"),
    "nothing": (lambda run: run / "absent.gguf", "there is no .*absent.gguf", "a run, its export folder"),
    "folder without": (lambda run: run.parent, "holds no GGUF file", "a run, its export folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_anything_else_is_refused_with_what_to_give(run_dir: Path, name: str) -> None:
    make, complaint, remedy = WRONG[name]
    with pytest.raises(DataError, match=complaint) as error:
        find_shipped(make(run_dir))
    assert remedy in str(error.value.remedy)


def test_settings_are_the_shipped_ones_unless_something_else_is_asked() -> None:
    stop = ["<|im_end|>"]
    shipped = Shipped(
        Path("x.gguf"), "S", {"temperature": 0.7, "top_k": 3, "num_ctx": 4096, "num_predict": 9, "stop": stop}, 8192
    )
    settings = settings_of(shipped)
    assert (settings.system, settings.max_tokens, settings.default_context_tokens) == ("S", 9, 8192)
    assert settings.sampling.items() >= {"temperature": 0.7, "top_k": 3, "stop": stop}.items()
    asked = settings_of(shipped, system="T", temperature=0.0, max_tokens=5, context_tokens=100)
    assert (asked.system, asked.sampling["temperature"], asked.max_tokens, asked.context_tokens) == ("T", 0.0, 5, 100)
    assert settings_of(Shipped(Path("x.gguf"))).sampling == GREEDY
    assert settings_of(Shipped(Path("x.gguf"), trained_tokens=256)).default_context_tokens == 2048


# Talking


def asked_with(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the child process is asked from now on; it still is."""
    asked: list[dict[str, Any]] = []
    own = Child.ask

    def ask(self: Child, task: str, arguments: dict[str, Any], **options: Any) -> Any:
        asked.append({"task": task, **arguments})
        return own(self, task, arguments, **options)

    monkeypatch.setattr(Child, "ask", ask)
    return asked


def talk(
    lines: Iterable[str], settings: Settings, *more: Path, question: str | None = None
) -> tuple[list[str], list[str]]:
    """What is written and what is said in a conversation with the tiny model and perhaps others."""
    waiting, written, said = iter(lines), list[str](), list[str]()

    def read_line() -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    models = [(path, settings, None) for path in (gguf_file("f16"), *more)]
    chat(models, question=question, read_line=read_line, write=written.append, say=said.append)
    return written, said


SHORT = Settings(max_tokens=12, gpu_layers=0)


def test_one_question_streams_and_is_asked_as_the_model_was_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_with(monkeypatch)
    settings = settings_of(find_shipped(exported()), max_tokens=12, gpu_layers=0)
    written, said = talk([], settings, question="Who counts the ships?")
    reply = asked[-1]
    assert reply["messages"][0] == {"role": "system", "content": "Be the keeper."}
    assert reply["sampling"]["temperature"] == 0.2
    assert len(written) > 4
    assert len(said) in (1, 2)  # the banner, and that the answer was cut
    for word in ("on the CPU", "context 512", "temperature 0.2", "Be the keeper."):
        assert word in said[0]


def test_answers_are_greedy_and_too_long_a_prompt_names_the_option() -> None:
    first = answer(gguf_file("f16"), "Who counts the ships?", system="Be brief.", max_tokens=12)
    assert first
    assert answer(gguf_file("f16"), "Who counts the ships?", system="Be brief.", max_tokens=12) == first
    with pytest.raises(DataError, match=r"has \d,\d+ tokens, more than the context window of 512") as error:
        answer(gguf_file("f16"), LONG)
    assert "--context" in str(error.value.remedy)
    with (
        open_conversation(gguf_file("f16"), Settings(context_tokens=256, gpu_layers=0)) as opened,
        pytest.raises(DataError, match="window of 256") as error,
    ):
        opened.say("ship " * 300)
    assert "--context N holds more, at most 512" in str(error.value.remedy)


def test_a_context_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--context 513 is more than the 512 positions"):
        talk([], Settings(context_tokens=513, gpu_layers=0), question="hello")


def test_a_context_that_memory_does_not_hold_is_shorter_and_the_banner_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_bytes = 2 * 2 * 2 * (64 + 64)  # float16, layers, key-value heads, widths of key and value
    free = 2 * cache_bytes * 300 + gguf_file("f16").stat().st_size
    monkeypatch.setattr(chatting, "available_ram_bytes", lambda: free)
    said = talk([], SHORT, question="hello")[1]
    assert "context 256 of 512 (memory)" in said[0]


def test_a_conversation_streams_its_answers_survives_too_long_a_line_and_ends_with_its_input() -> None:
    question = "Who counts the ships?"
    written, said = talk([question, LONG, "/new", "", question], SHORT)
    wanted = answer(gguf_file("f16"), question, max_tokens=12)
    text = "".join(written)
    assert len(written) > 4
    assert text.startswith(wanted + "\n")
    assert text.endswith(wanted + "\n\n")  # after /new the same question gets the same answer
    assert sum("context window" in line for line in said) == 1


def test_commands_take_back_ask_again_set_and_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_with(monkeypatch)
    saved = tmp_path / "talk.jsonl"
    commands = ["/undo", "One?", "/undo", "Two?", "/retry", "/system Be brief.", " /Three?", f"/save {saved}"]
    _, said = talk([*commands, f"/save {saved}", "/quit", "never asked"], SHORT)
    conversations = [row["messages"] for row in asked if row["task"] == "reply"]
    users = [[m["content"] for m in messages if m["role"] == "user"] for messages in conversations]
    assert users == [["One?"], ["Two?"], ["Two?"], ["/Three?"]]
    assert conversations[-1][0] == {"role": "system", "content": "Be brief."}
    kept = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in kept] == ["system", "user", "assistant"]
    for line in (
        "nothing was asked yet",
        "taken back: One?",
        "Be brief.",
        f"{saved} exists already: name another file",
    ):
        assert line in said


def test_sampling_is_set_within_a_conversation_and_a_wrong_setting_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = asked_with(monkeypatch)
    commands = ["/set", "/set temperature 0.5", "/set top_k 3", "/set max_tokens 2", "One?"]
    wrong = [
        "/set top_k many",
        "/set temprature 1",
        "/set temperature nan",
        "/set max_tokens 0",
        "/set seed -1",
        "/set x",
    ]
    _, said = talk([*commands, *wrong, "Two?", "/set temperature 0", "Three?"], SHORT)
    first, second, third = [row for row in asked if row["task"] == "reply"]
    assert (first["max_tokens"], first["sampling"]["temperature"], first["sampling"]["top_k"]) == (2, 0.5, 3)
    assert first["sampling"]["top_p"] == 0.9  # greedy needs none
    assert (second["sampling"], second["max_tokens"]) == (first["sampling"], 2)
    assert third["sampling"]["temperature"] == 0
    for line in (
        "greedy, max_tokens 12",
        "/set top_k needs a whole number, such as /set top_k 40",
        "temperature cannot be nan",
        "max_tokens cannot be 0",
        "seed cannot be -1",
        "greedy, max_tokens 2",
    ):
        assert line in said
    assert sum(line.startswith("no setting ") for line in said) == 2


def test_ctrl_c_stops_the_answer_and_not_the_conversation() -> None:
    settings = Settings(max_tokens=400, gpu_layers=0)
    whole, _ = talk(["Who counts the ships?"], settings)
    presses, written, said = [1], list[str](), list[str]()
    waiting = iter(["Who counts the ships?", None, "And then?", "/quit"])

    def write(text: str) -> None:
        written.append(text)
        if presses:  # while the first answer comes
            presses.pop()
            os.kill(os.getpid(), signal.SIGINT)

    def read_line() -> str:
        line = next(waiting)
        if line is None:  # and once at the prompt
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return str(line)

    before = signal.getsignal(signal.SIGINT)
    chat([(gguf_file("f16"), settings, None)], read_line=read_line, write=write, say=said.append)
    assert said.count("(stopped)") == 1
    assert "/quit or Ctrl-D leaves" in said
    stopped = "".join(written).partition("\n\n")[0]
    assert len(stopped) < len("".join(whole)) / 2
    assert signal.getsignal(signal.SIGINT) is before


def test_help_lists_every_command_and_an_unknown_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_with(monkeypatch)
    _, said = talk(["/help", "/nonsense now", "/exit"], SHORT)
    for name in chatting.COMMANDS:
        assert any(line.strip().startswith(name) for line in said)
    assert any("no command /nonsense" in line for line in said)
    assert [row["task"] for row in asked] == ["open_chat"]


def test_two_models_are_asked_the_same_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_with(monkeypatch)
    written, said = talk(["Who counts?", "And then?"], SHORT, gguf_file("q8_0"))
    replies = [row for row in asked if row["task"] == "reply"]
    assert [r["messages"][-1]["content"] for r in replies] == ["Who counts?"] * 2 + ["And then?"] * 2
    text = "".join(written)
    assert text.count("tiny.f16.gguf: ") == text.count("tiny.q8_0.gguf: ") == 2
    assert sum("on the CPU" in line for line in said) == 2


def test_the_gpu_is_used_where_llama_cpp_has_one_and_its_address_space_is_not_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[int | None] = []
    own = Child.__init__

    def init(self: Child, *, memory_limit_bytes: int | None = None) -> None:
        limits.append(memory_limit_bytes)
        own(self, memory_limit_bytes=memory_limit_bytes)

    monkeypatch.setattr(Child, "__init__", init)
    asked = asked_with(monkeypatch)
    monkeypatch.setattr(chatting, "describe_gpu", lambda: {"memory_free_bytes": 1 << 33})
    monkeypatch.setattr(chatting, "uses_gpu", lambda: True)
    said = talk([], Settings(max_tokens=2), question="hello")[1]
    assert (asked[0]["gpu_layers"], limits) == (-1, [None])
    assert "on the CPU" in said[0]  # this library was compiled for none, and the banner believes the library
    talk([], Settings(max_tokens=2, gpu_layers=0), question="hello")
    assert asked[2]["gpu_layers"] == 0
    assert limits[1] is not None


@pytest.mark.slow
def test_the_command_writes_the_answer_to_stdout_and_everything_else_to_stderr(run_dir: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "forge.training", "chat", "run", "Who counts?", "--max-tokens", "5"]
    command += ["--temperature", "0"]
    done = subprocess.run(
        command, cwd=run_dir.parent, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "lighthouse.q8_0.gguf" not in done.stdout
    assert "lighthouse.q8_0.gguf" in done.stderr
    assert "greedy, repeat_penalty 1.1" in done.stderr


@pytest.mark.slow
def test_one_answer_as_json_names_model_and_settings(run_dir: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "forge.training", "chat", str(run_dir), "--json"]
    asked = [*command, "Who counts?", "--max-tokens", "5"]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=120, check=False)
    (answer,) = json.loads(done.stdout)["answers"]
    assert (answer["model"], answer["is_cut"], answer["max_tokens"]) == ("lighthouse.q8_0.gguf", True, 5)
    assert answer["answer"].strip()
    assert answer["sampling"]["temperature"] == 0.2
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (refused.returncode, json.loads(refused.stdout)["exit_code"]) == (2, 2)


@pytest.mark.slow
def test_the_up_arrow_brings_the_line_before_back(run_dir: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    command = [sys.executable, "-m", "forge.training", "chat", str(run_dir)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    text = ""
    for typed in (b"/help\r", b"\x1b[A\r", b"/exit\r"):
        prompts = text.count("> ")
        while text.count("> ") == prompts:
            text += os.read(ours, 65536).decode()
        os.write(ours, typed)
    assert process.wait(timeout=60) == 0
    os.close(ours)
    assert text.count("this list") == 2, text
