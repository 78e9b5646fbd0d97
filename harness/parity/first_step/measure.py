"""What rungs 1 to 3 measure: inputs and first steps of every arm, each by a process of its own, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from forge.training.backends import Backend
from forge.training.system.errors import ForgeError
from forge.training.system.files import sha256_file, sha256_json
from harness.parity.claims import Unmeasured
from harness.parity.first_step.compare import MeasuredStep, read_step
from harness.parity.session import Ladder, ProbeCall
from harness.parity.suite import BASELINE_STEP_LAYOUT, MOST_STEPS_A_PROCESS, QUANTIZATIONS
from harness.verdict import Role, status_of_error

Whose = Literal["reference", "baseline", "candidate"]  # step a process takes


@dataclass(frozen=True)
class WantedSteps:
    """First steps on one base: the reference's and the baseline's in each quantisation, the candidate's in each layout.

    ``layouts``: LAYOUT:PADDING, and more of the plan. ``dropout``: the workload's, else none.
    ``with_inputs``: the inputs of baseline and candidate too.
    """

    base: Path
    quantizations: tuple[str, ...]
    layouts: tuple[str, ...]
    dropout: bool = False
    with_inputs: bool = False


@dataclass(frozen=True)
class Process:
    """What one process measures. ``steps``: QUANTIZATION:LAYOUT:PADDING, of the reference QUANTIZATION alone.

    ``plan``: what differs from the workload's.
    """

    whose: Whose
    backend: Backend | Literal["reference"]
    steps: tuple[str, ...] = ()
    plan: tuple[str, ...] = ()
    dropout: bool = False
    inputs: bool = False


@dataclass(frozen=True)
class MeasuredSteps:
    """First steps as they were measured. ``facts``: what the probe answered, by whose step it is and its name.

    ``folder``: where the tensors are.
    """

    wanted: WantedSteps
    folder: Path
    facts: dict[tuple[Whose, str], dict[str, Any]]

    @property
    def digests(self) -> list[str]:
        """Of all tensor files, in order."""
        return [facts["file_sha256"] for facts in self.facts.values()]

    @property
    def has_files(self) -> bool:
        """Whether every tensor file still exists with its recorded digest."""
        paths = [(self.folder / str(facts["file"]), facts["file_sha256"]) for facts in self.facts.values()]
        return all(path.is_file() and sha256_file(path) == digest for path, digest in paths)

    def step(self, whose: Whose, step: str) -> MeasuredStep:
        """Read one of them."""
        return read_step(self.folder / str(self.facts[whose, step]["file"]))


def quantizations(ladder: Ladder) -> tuple[str, ...]:
    """Those of the ladder's overrides, else all: a ladder without a GPU names the one that it can measure."""
    named = [setting.partition("=")[2] for setting in ladder.overrides if setting.startswith("model.quantization=")]
    return tuple(named) or QUANTIZATIONS


def own_steps(ladder: Ladder) -> WantedSteps:
    """What rungs 2 and 3 judge: steps on the ladder's own base."""
    return WantedSteps(ladder.base_dir, quantizations(ladder), ladder.step_layouts)


def dropout_steps(ladder: Ladder) -> WantedSteps:
    """What rung 3 judges too where Forge's layers train: the same steps with the workload's dropout."""
    return WantedSteps(ladder.base_dir, quantizations(ladder), ladder.dropout_layouts, dropout=True)


def measure_inputs(ladder: Ladder, backends: Sequence[Backend], base: Path) -> list[dict[str, Any]]:
    """What the probe answers of each backend's inputs. Raises :class:`Unmeasured`."""
    answers = _ask(ladder, [_inputs(ladder, backend) for backend in backends], base)
    return [answer["inputs"] for answer in answers]


def measure_steps(ladder: Ladder, wanted: WantedSteps, attempt: int = 0) -> MeasuredSteps:
    """First steps from the store, or measured now. Raises :class:`Unmeasured`.

    ``attempt``: from 0. A store only ever grows, so what is measured again, because its tensors are gone, is another
    measurement.
    """
    processes = _processes(ladder, wanted)
    answers = _ask(ladder, processes, wanted.base, attempt)
    facts = {
        (process.whose, step): facts
        for process, answer in zip(processes, answers, strict=True)
        for step, facts in zip(process.steps, answer["steps"], strict=True)
    }
    return MeasuredSteps(wanted, ladder.folder / "steps", facts)


def prefetch_steps(ladder: Ladder, wanted: Sequence[WantedSteps]) -> None:
    """Measure what rungs 1 to 3 will ask for of several bases, all of it side by side."""
    calls = []
    for steps in wanted:
        processes = _processes(ladder, steps)
        if steps.with_inputs:
            processes += [_inputs(ladder, backend) for backend in (ladder.baseline, ladder.candidate)]
        calls += [_call(ladder, process, steps.base) for process in processes]
    ladder.probes("first_step", calls, is_prefetch=True)


def has_steps(ladder: Ladder, wanted: WantedSteps) -> bool:
    """Whether the store has all of these steps; nothing is measured."""
    calls = [_call(ladder, process, wanted.base) for process in _processes(ladder, wanted)]
    store_only = replace(ladder, session=replace(ladder.session, measures=False))
    return all(isinstance(answer, dict) for answer in store_only.probes("first_step", calls, is_prefetch=True))


def _processes(ladder: Ladder, wanted: WantedSteps) -> list[Process]:
    """One for the reference, one for the baseline; the candidate's, whose imports and compilers are slow, divided."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for quantization in wanted.quantizations:
        padding = Counter[str]()
        for layout in wanted.layouts:
            of = layout.split(":")[1]
            group = (quantization, of, padding[of] // MOST_STEPS_A_PROCESS)
            groups.setdefault(group, []).append(f"{quantization}:{layout}")
            padding[of] += 1
    baseline = tuple(f"{name}:{BASELINE_STEP_LAYOUT}" for name in wanted.quantizations)
    return [
        Process("reference", "reference", wanted.quantizations, dropout=wanted.dropout),
        Process("baseline", ladder.baseline, baseline, dropout=wanted.dropout),
        *(
            Process("candidate", ladder.candidate, tuple(steps), ladder.plan, wanted.dropout)
            for steps in groups.values()
        ),
    ]


def _inputs(ladder: Ladder, backend: Backend) -> Process:
    if backend == ladder.candidate:
        return Process("candidate", backend, plan=ladder.plan, inputs=True)
    return Process("baseline", backend, inputs=True)


def _call(ladder: Ladder, process: Process, base: Path, attempt: int = 0) -> ProbeCall:
    overrides = (
        f"model.path={base}",
        f"data.train={ladder.documents[0]}",
        "data.validation=null",
        "data.validation_share=0",
        *ladder.overrides,
    )
    # of documents and base: the store knows probes by their arguments, and those name files without their content
    content: list[Any] = [sha256_file(ladder.documents[0]), _base_digest(base), list(ladder.overrides)]
    content += [list(process.plan), process.dropout]
    tag, out = sha256_json(content)[:12], ladder.folder / "steps"
    return "trl" if process.backend == "reference" else process.backend, (
        *("parity", "--backend", process.backend),
        *(part for setting in overrides for part in ("--set", setting)),
        *(part for setting in process.plan for part in ("--plan", setting)),
        *(f"--positions={ladder.num_positions}", f"--out={out}", f"--tag={tag}"),
        *(part for step in process.steps for part in ("--step", step)),
        *(("--dropout",) if process.dropout else ()),
        *(("--inputs",) if process.inputs else ()),
        *((f"--attempt={attempt}",) if attempt else ()),
    )


def _ask(ladder: Ladder, processes: Sequence[Process], base: Path, attempt: int = 0) -> list[dict[str, Any]]:
    """What the probe answers in each process. The reference's failure leaves as little to compare as the baseline's."""
    answers = ladder.probes("first_step", [_call(ladder, process, base, attempt) for process in processes])
    for process, answer in zip(processes, answers, strict=True):
        if isinstance(answer, ForgeError):
            role: Role = "candidate" if process.whose == "candidate" else "baseline"
            raise Unmeasured(status_of_error(answer, role), str(answer)) from answer
    missing = dict.fromkeys(process.backend for process, answer in zip(processes, answers, strict=True) if not answer)
    if missing:
        raise Unmeasured("INCOMPLETE", f"first step of {', '.join(missing)}: {ladder.session.why_missing()}")
    return [answer for answer in answers if isinstance(answer, dict)]


@cache
def _base_digest(directory: Path) -> str:
    return sha256_json([[path.name, sha256_file(path)] for path in sorted(directory.glob("*.safetensors"))])
