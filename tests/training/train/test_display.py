"""What a person sees of a run: lines that stay, at any width, with what was measured and nothing else."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from forge.training.system.command import say, say_next, wrapped
from forge.training.train import display as module
from forge.training.train.display import TrainingDisplay, duration, show_status, summary_rows
from forge.training.train.record import RunRecord
from forge.training.train.step_log import loss_window
from tests.support.records import make_record
from tests.support.terminal import on_terminal

PATH = "/srv/documents of mine/a-very-long-name-of-a-folder/and-another-one/runs/lighthouse-trl"
TEXT = (
    "gradient checkpointing recomputes activations in the backward pass; data.validation_share is "
    f"not used with data.train: see {PATH.replace(' ', '-')} and the others"
)


def console(width: int, *, terminal: bool = True) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    made = Console(file=stream, width=width, force_terminal=terminal, color_system=None, soft_wrap=True)
    return made, stream


@pytest.mark.parametrize("width", [60, 100])
def test_a_line_breaks_between_words_and_never_inside_one(width: int) -> None:
    shown, stream = console(width)
    say(shown, TEXT, "warning  data  ")
    lines = stream.getvalue().rstrip("\n").split("\n")
    assert lines[0].startswith("warning  data  ")
    assert all(line.startswith(" " * 15) for line in lines[1:])
    words = " ".join(line[15:] for line in lines).split(" ")
    assert words == TEXT.split(" ")
    assert all(len(line) <= width or " " not in line[15:] for line in lines)


def test_elsewhere_than_on_a_terminal_a_line_stays_one_line() -> None:
    shown, stream = console(60, terminal=False)
    say(shown, f"[bold]{TEXT}", "note: ")
    assert stream.getvalue() == f"note: [bold]{TEXT}\n"


def test_wrapping_keeps_the_indentation_of_a_list() -> None:
    text = "two errors\n  the first is one of several words\n  b"
    assert wrapped(text, 24) == "two errors\n  the first is one of\n  several words\n  b"


@pytest.mark.parametrize("width", [60, 100, 400])
@pytest.mark.parametrize("terminal", [True, False])
def test_the_next_command_can_be_pasted(width: int, terminal: bool) -> None:
    shown, stream = console(width, terminal=terminal)
    command = ["forge", "train", f"{PATH}/workload.yaml", "--backend", "trl", "--set", "data.system_prompt=It's $HOME"]
    say_next(shown, command)
    text = stream.getvalue()
    assert text.startswith("next: forge train ")
    assert shlex.split(text.removeprefix("next: ").replace("\\\n", " ")) == command
    assert text.count("\n") == 1 or (terminal and width < 400)
    say_next(shown, None)
    assert stream.getvalue() == text


# --------------------------------------------------------------------------------------------------------------------
# While it trains


def test_a_line_that_quotes_a_document_is_said_as_it_is() -> None:
    shown, stream = console(200)
    TrainingDisplay(shown).announce("left out: '[/INST] [bold]' :smile: [x](y)")
    assert stream.getvalue() == "left out: '[/INST] [bold]' :smile: [x](y)\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the display's clock shows."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def training(clock: list[float], num_steps: int, seconds_per_step: float, *, width: int = 100) -> str:
    shown, stream = console(width, terminal=False)
    display = TrainingDisplay(shown)
    display._num_steps = num_steps
    display._task = display._progress.add_task("training", total=num_steps)
    for step in range(1, num_steps + 1):
        clock[0] += seconds_per_step
        display.show_step(step, {"tokens": 100, "seconds": seconds_per_step, "loss": 4.0 / step})
    return stream.getvalue()


def test_a_line_stays_at_the_first_step_about_every_ten_seconds_and_at_the_last(clock: list[float]) -> None:
    lines = training(clock, 95, 1.0).splitlines()
    steps = [int(re.findall(r"step +(\d+)/95", line)[0]) for line in lines]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 95]
    assert "loss 4.0000  100 tokens/s  eta 1 min 34 s" in lines[0]
    assert "eta 1 min 24 s" in lines[1]
    assert "eta" not in lines[-1]
    assert all(re.search(r"(memory|GPU) \d+\.\d GiB", line) for line in lines)


def test_a_run_of_hours_leaves_some_hundred_lines(clock: list[float]) -> None:
    assert 300 < training(clock, 720, 30.0).count("\n") < 800


def test_a_held_out_loss_and_a_sample_are_said_when_they_are_there(clock: list[float]) -> None:
    shown, stream = console(60)
    display = TrainingDisplay(shown)
    display._num_steps = 60
    display.show_evaluation(20, 3.5, (20, 3.5))
    display.show_evaluation(40, 3.75, (20, 3.5))
    display.show_sample(40, "How many ships?", "There\nwere \x1b[31m48 " + "ships " * 90)
    text = stream.getvalue()
    assert "step 20/60  held-out loss 3.5000  best so far" in text
    assert "step 40/60  held-out loss 3.7500  best 3.5000 at step 20" in text
    assert "asked:    How many ships?" in text
    assert "answered: There were \\x1b[31m48 ships" in text  # no command to the terminal
    assert max(map(len, text.split("\n"))) <= 60


def test_the_bar_says_that_held_out_documents_are_being_measured() -> None:
    shown, stream = console(80)
    with TrainingDisplay(shown) as display:
        display._task = display._progress.add_task("training", total=9)
        display._progress.start()
        display.show_evaluating(1234)
    assert "evaluating 1,234" in stream.getvalue()


PROGRAM = """
import sys
from rich.console import Console
from forge.training.system.command import make_plain
from forge.training.train.display import TrainingDisplay
if sys.argv[1] == "plain":
    make_plain()
with TrainingDisplay(Console(stderr=True, highlight=False, soft_wrap=True)) as display:
    display._num_steps = 3
    display._task = display._progress.add_task("training", total=3)
    display._progress.start()
    for step in (1, 2, 3):
        display.show_step(step, {"tokens": 9, "seconds": 0.1, "loss": 1.5})
"""


def test_plain_has_no_bar_no_colour_and_no_carriage_return_where_a_terminal_would_have_them() -> None:
    code, with_bar = on_terminal(["-c", PROGRAM, "bar"], columns=60)
    assert code == 0
    assert "\x1b[" in with_bar
    code, plain = on_terminal(["-c", PROGRAM, "plain"], columns=60)
    assert code == 0, plain
    assert "step 1/3  loss 1.5000" in plain
    assert "step 3/3  loss 1.5000" in plain
    assert "\x1b" not in plain
    assert "\r" not in plain


# --------------------------------------------------------------------------------------------------------------------
# Afterwards


def rows(**changes: Any) -> dict[str, str]:
    return dict(summary_rows(make_record(**changes)))


def test_what_was_not_measured_is_not_there() -> None:
    bare: dict[str, Any] = {"losses": {}, "memory": [], "timing": {}}
    assert rows(**bare) == {"steps": "3"}
    assert rows(**bare, process_memory=[{"phase": "train", "peak_resident_bytes": 3 << 30}])["peak memory"] == (
        "3.00 GiB of this process"
    )


@pytest.mark.parametrize(
    ("num_steps", "says"),
    [
        (1, "1.2500 nats per token, in the only step"),
        (2, "4.5000 (step 1) -> 1.2500 (step 2)"),
        (9, "4.5000 (steps 1 to 4) -> 1.2500 (steps 6 to 9)"),
        (60, "4.5000 (steps 1 to 5) -> 1.2500 (steps 56 to 60)"),
    ],
)
def test_the_windows_of_the_train_loss_are_named_and_share_no_step(num_steps: int, says: str) -> None:
    assert rows(num_steps=num_steps)["train loss"].startswith(says)
    assert num_steps == 1 or 2 * loss_window(num_steps) <= num_steps


@pytest.mark.parametrize(("num_divided", "unit"), [(None, "examples"), (0, "documents"), (3, "parts of documents")])
def test_parts_are_not_called_documents(num_divided: int | None, unit: str) -> None:
    record = make_record(
        inputs={"num_divided_records": num_divided}, timing={"documents_per_second": 5.875, "tokens_per_second": 800.0}
    )
    assert dict(summary_rows(record))["speed"] == f"5.88 {unit} per second, 800 tokens"


def test_seconds_as_people_read_them() -> None:
    assert [duration(s) for s in (0.4, 9.2, 59.7, 3599, 3601, 86400)] == [
        *("0 s", "9 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "24 h 00 min"),
    ]


@pytest.mark.parametrize("width", [60, 100])
def test_a_status_keeps_its_paths_whole(width: int, tmp_path: Path) -> None:
    shown, stream = console(width)
    unknown = dict.fromkeys(
        ("loss", "validation_loss", "best_step", "best_validation_loss", "tokens_per_second", "seconds_left"), None
    )
    status = {
        **{"state": "interrupted", "step": 5, "num_planned_steps": 60, "checkpoint": "checkpoint-5", "killed": False},
        **{"message": None, "holder": None, "remedy": None, "run_dir": PATH, "next": ["forge", "train", PATH]},
    }
    show_status(status | unknown, Path(status["run_dir"]), shown)
    text = stream.getvalue()
    assert "…" not in text
    assert PATH.split(" ")[-1] in text
    assert "loss" not in text
    assert f"'{PATH}'" in text


def test_a_record_of_an_earlier_forge_has_a_summary() -> None:
    content = make_record().model_dump(mode="json")
    del content["process_memory"]
    assert RunRecord.model_validate(content).process_memory == []
