"""What rungs 1 to 3 measure: inputs and first steps of every arm, by processes of their own that run side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.training.system.errors import ForgeError
from forge.training.system.files import sha256_file, sha256_json
from harness.parity.first_step.compare import MeasuredStep, read_step

if TYPE_CHECKING:
    from harness.parity.session import Ladder

# "none": not quantised, the workload's 16 bits as they are.
QUANTIZATIONS = ("nf4", "none")
BASELINE_LAYOUT = "1x8:longest"  # its owner's
_ITS_OWN_FAULT = (1, 5, 7, 8)  # exit codes: crash, memory, diverged, a check


class NotMeasured(Exception):
    """The session has no time for a probe."""


class CandidateFailed(Exception):
    """The candidate cannot take the step: its failure is data."""


@dataclass(frozen=True)
class Process:
    """What one process measures. ``steps``: QUANTIZATION:LAYOUT:PADDING, of the reference QUANTIZATION alone."""

    backend: str  # or "reference"
    steps: tuple[str, ...] = ()
    inputs: bool = False

    @property
    def arm(self) -> Any:
        """Whose interpreter it runs in."""
        return "trl" if self.backend == "reference" else self.backend


@dataclass(frozen=True)
class Measured:
    """First steps on one base. ``facts``: by backend and step, what the probe said; its tensors lie in ``folder``."""

    folder: Path
    facts: dict[tuple[str, str], dict[str, Any]]

    @property
    def digests(self) -> list[str]:
        """Of all files, in order."""
        return [facts["file_sha256"] for facts in self.facts.values()]

    @property
    def is_there(self) -> bool:
        """Whether all files are, as the probe left them."""
        paths = [(self.folder / str(facts["file"]), facts["file_sha256"]) for facts in self.facts.values()]
        return all(path.is_file() and sha256_file(path) == digest for path, digest in paths)

    def step(self, backend: str, step: str) -> MeasuredStep:
        """Read one of them."""
        return read_step(self.folder / str(self.facts[backend, step]["file"]))


def quantizations(ladder: Ladder) -> tuple[str, ...]:
    """Those of the ladder's overrides, else all: a ladder without a GPU names the one that it can."""
    named = [setting.partition("=")[2] for setting in ladder.overrides if setting.startswith("model.quantization=")]
    return tuple(named) or QUANTIZATIONS


def measure_inputs(ladder: Ladder, backends: Sequence[str], base: Path | None = None) -> list[dict[str, Any]]:
    """What the probe says of each backend's inputs. Raises :class:`NotMeasured`, :class:`CandidateFailed`."""
    answers = _ask(ladder, [Process(backend, inputs=True) for backend in backends], base)
    return [answer["inputs"] for answer in answers]


def measure_steps(
    ladder: Ladder,
    base: Path | None = None,
    asked: tuple[str, ...] | None = None,
    layouts: tuple[str, ...] | None = None,
    attempt: int = 0,
) -> Measured:
    """The reference's, the baseline's and the candidate's first steps, from the store or measured now.

    ``asked``: quantisations. ``attempt``: from 0; a store only ever grows, so what is measured again, because its
    tensors are gone, is another measurement. Raises :class:`NotMeasured`, :class:`CandidateFailed`,
    :class:`ForgeError`.
    """
    processes = _processes(ladder, asked or quantizations(ladder), layouts or ladder.step_layouts)
    answers = _ask(ladder, processes, base, attempt)
    facts = {
        (process.backend, step): found
        for process, answer in zip(processes, answers, strict=True)
        for step, found in zip(process.steps, answer["steps"], strict=True)
    }
    return Measured(_folder(ladder), facts)


def _processes(ladder: Ladder, asked: Sequence[str], layouts: Sequence[str]) -> list[Process]:
    """One for the reference, one for the baseline; the candidate's, whose imports and compilers are slow, divided."""
    groups: dict[tuple[str, str], list[str]] = {}
    for quantization in asked:
        for layout in layouts:
            groups.setdefault((quantization, layout.partition(":")[2]), []).append(f"{quantization}:{layout}")
    return [
        Process("reference", tuple(asked)),
        Process(ladder.baseline, tuple(f"{quantization}:{BASELINE_LAYOUT}" for quantization in asked)),
        *(Process(ladder.candidate, tuple(steps)) for steps in groups.values()),
    ]


def has_steps(ladder: Ladder) -> bool:
    """Whether the store has every first step of the ladder's own base: only then is nothing of it to be fetched."""
    asked = [_call(ladder, process, None) for process in _processes(ladder, quantizations(ladder), ladder.step_layouts)]
    return None not in replace(ladder, measures=False).probes("first_step", asked, is_prefetch=True)


def _folder(ladder: Ladder) -> Path:
    return ladder.store.directory.parent / "parity" / "steps"


def prefetch_steps(ladder: Ladder, bases: Sequence[tuple[Path | None, tuple[str, ...], tuple[str, ...], bool]]) -> None:
    """Measure what rungs 2 and 3 will ask for of several bases at once: (base, quantisations, layouts, inputs too)."""
    if ladder.num_side_by_side == 1 or not ladder.measures:
        return
    asked = []
    for base, wanted, layouts, with_inputs in bases:
        processes = _processes(ladder, wanted, layouts)
        if with_inputs:
            processes += [Process(backend, inputs=True) for backend in (ladder.baseline, ladder.candidate)]
        asked += [_call(ladder, process, base) for process in processes]
    ladder.probes("first_step", asked, is_prefetch=True)


def _call(ladder: Ladder, process: Process, base: Path | None, attempt: int = 0) -> tuple[Any, tuple[str, ...]]:
    """Backend and arguments of the probe."""
    base = base or ladder.base_dir
    overrides = (f"model.path={base}", f"data.train={ladder.documents[0]}", "data.validation=null", *ladder.overrides)
    # of documents and base: the store knows probes by their arguments, and those name files without their content
    content = [sha256_file(ladder.documents[0]), _base_digest(base), list(ladder.overrides)]
    return process.arm, (
        *("parity", "--backend", process.backend),
        *(part for setting in overrides for part in ("--set", setting)),
        *(f"--positions={ladder.num_positions}", f"--out={_folder(ladder)}", f"--tag={sha256_json(content)[:12]}"),
        *(part for step in process.steps for part in ("--step", step)),
        *(("--inputs",) if process.inputs else ()),
        *((f"--attempt={attempt}",) if attempt else ()),
    )


def _ask(ladder: Ladder, processes: Sequence[Process], base: Path | None, attempt: int = 0) -> list[dict[str, Any]]:
    """What the probe answers in each process."""
    answers = ladder.probes("first_step", [_call(ladder, process, base, attempt) for process in processes])
    for process, answer in zip(processes, answers, strict=True):
        if not isinstance(answer, ForgeError):
            continue
        if process.backend == ladder.candidate != ladder.baseline and answer.exit_code in _ITS_OWN_FAULT:
            raise CandidateFailed(str(answer)) from answer
        raise answer
    missing = [process.backend for process, answer in zip(processes, answers, strict=True) if answer is None]
    if missing:
        raise NotMeasured(f"no time for the first step of {', '.join(dict.fromkeys(missing))}")
    return answers


@cache
def _base_digest(directory: Path) -> str:
    return sha256_json([[path.name, sha256_file(path)] for path in sorted(directory.glob("*.safetensors"))])
