"""Claims about what a person sees of a run."""

from __future__ import annotations

import io

from rich.console import Console

from forge.training.train.display import TrainingDisplay


def test_a_line_that_quotes_a_document_is_said_as_it_is() -> None:
    console = Console(file=io.StringIO(), width=200, soft_wrap=True, highlight=False)
    TrainingDisplay(console).announce("left out: '[/INST] [bold]' :smile: [x](y)")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "left out: '[/INST] [bold]' :smile: [x](y)\n"
