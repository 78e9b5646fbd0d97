"""Processes side by side on one GPU: allowed where what they compute counts and not how long it takes.

A small model's process keeps a GPU busy for a tenth of its time: the rest is imports, and kernels being launched one
after the other. Nothing that a process computes depends on the others, so a ladder of some forty processes takes a
quarter of the time. Speed and memory are never measured so (harness/measurement/trial.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from forge.training.system.errors import ForgeError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job(Generic[Result]):
    """``weight``: its share of the GPU's memory, in the unit of ``memory`` below."""

    call: Callable[[], Result]
    weight: int = 1


def run_side_by_side(jobs: Sequence[Job[Result]], *, most: int, memory: int) -> list[Result | ForgeError]:
    """Each job's result, or the :class:`ForgeError` that it raised; any other error is raised here.

    Jobs begin in order, at most ``most`` at a time and never weighing more than ``memory`` together (one may alone).
    """
    results: list[Result | ForgeError | None] = [None] * len(jobs)
    bugs: list[BaseException] = []
    ended = threading.Condition()
    running: list[int] = []

    def work(index: int) -> None:
        try:
            results[index] = jobs[index].call()
        except ForgeError as error:
            results[index] = error
        except BaseException as error:
            bugs.append(error)
        with ended:
            running.remove(index)
            ended.notify()

    def may_begin(index: int) -> bool:
        weight = jobs[index].weight + sum(jobs[other].weight for other in running)
        return not running or (len(running) < most and weight <= memory)

    for index in range(len(jobs)):
        with ended:
            ended.wait_for(lambda index=index: bool(bugs) or may_begin(index))  # type: ignore[misc]
            if bugs:
                break
            running.append(index)
        # daemons: Ctrl-C ends the session at once, and a child dies with the thread that started it (process.py)
        threading.Thread(target=work, args=(index,), name=f"side-by-side-{index}", daemon=True).start()
    with ended:
        ended.wait_for(lambda: not running)
    if bugs:
        raise bugs[0]
    return results  # type: ignore[return-value]
