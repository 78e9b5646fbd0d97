"""One session of the parity ladder: what it runs, as data, and its runs and verdicts as they are asked for.

A rung is judged once its predecessor has passed, from runs that the store has or that are made now. What a session
has no time for is INCOMPLETE; the next session goes on from the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from forge.training.environment import ROOT
from forge.training.errors import CheckError, ForgeError, MachineError
from forge.training.plan import Backend
from harness.arms import EVALUATOR, environment, interpreter
from harness.parity.corpus import write_documents
from harness.parity.verdicts import Rung, blocked_by
from harness.probes import run_probe
from harness.process import run_process
from harness.store import Outcome, RunSpec, Store
from harness.trial import Run, run_single
from harness.worker import TIME_LIMIT_SECONDS, run_once

WORKLOAD = "parity"
BASELINE: Backend = "legacy"
CANDIDATE: Backend = "unsloth"

# Rung 4: the baseline's layouts that differ in rounding alone, the first being its own. Micro-batches of other sizes
# and make-up sum other partial results, and the attention kernel follows from length, padding and what is allowed.
LAYOUTS: tuple[tuple[str, ...], ...] = (
    (),
    ("micro_batch=2",),
    ("micro_batch=4",),
    ("micro_batch=8",),
    ("micro_batch=1", "attention=flash"),
    ("micro_batch=2", "grouping=length", "attention=flash"),
    ("micro_batch=4", "grouping=tokens"),
    ("micro_batch=8", "grouping=length", "attention=flash"),
)
TRAJECTORY_SEED = 1000
NO_DROPOUT = "lora.dropout=0.0"  # masks differ between layouts
FAULT = ("learning_rate", 1.1)  # of the optimizer: what rung 5 must see to be worth anything

# Rung 6. These two belong into the workload's `gate:` section (equivalence_margin_nats, num_seeds) once it knows them.
MARGIN_NATS = 0.01
LEAST_SEEDS = 5
MOST_SEEDS = 20  # beyond it the spread is too large for the margin, and the workload wants changing
PILOT_SEEDS = (1, 2, 3, 4)
FIRST_TEST_SEED = 101

PROBE_SECONDS = 420.0
BASE_SECONDS = 900.0


@dataclass
class Ladder:
    """One session. ``train``: the gate's documents; ``deadline``: on :func:`time.monotonic`'s clock.

    ``base``: a name or directory. ``measures``: whether runs may be made; if not, verdicts rest on what the store has.
    ``layouts``: plans of the baseline's runs on rung 4. ``overrides``: of the workload, for all arms alike.
    """

    store: Store
    train: Path
    base: str = "small"
    baseline: Backend = BASELINE
    candidate: Backend = CANDIDATE
    layouts: tuple[tuple[str, ...], ...] = LAYOUTS
    overrides: tuple[str, ...] = ()
    deadline: float | None = None
    measures: bool = True
    run: Run = run_once
    time_limit_seconds: float = TIME_LIMIT_SECONDS
    announce: Callable[[str], None] = lambda line: None
    _verdicts: dict[int, Rung] = field(default_factory=dict)
    _longest: dict[tuple[Backend, bool], float] = field(default_factory=dict)

    # ----------------------------------------------------------------------------------------------------------------
    # Verdicts

    def verdict(self, number: int) -> Rung:
        """The verdict on a rung, judged once a session; INCOMPLETE where the rung below is no PASS."""
        if number not in self._verdicts:
            below = self.verdict(number - 1) if number > 1 else None
            if below is not None and below.status != "PASS":
                self._verdicts[number] = blocked_by(below, number)
            else:
                self._verdicts[number] = self._judge(number)
        return self._verdicts[number]

    def _judge(self, number: int) -> Rung:
        from harness.parity import first_step, outcome, trajectory  # they know the ladder

        judges: dict[int, Callable[[Ladder], Rung]] = {
            1: first_step.judge_inputs,
            2: first_step.judge_first_step,
            3: first_step.judge_step_equivalence,
            4: trajectory.judge_noise,
            5: trajectory.judge_trajectory,
            6: outcome.judge_outcome,
        }
        try:
            return judges[number](self)
        except CheckError as error:  # other work, other weights: found, not failed to look
            return Rung(number=number, status="FAIL", reason=str(error))
        except ForgeError as error:
            return Rung(number=number, status="INCOMPLETE", reason=str(error))

    # ----------------------------------------------------------------------------------------------------------------
    # Measuring

    def probe(self, name: str, backend: Backend, arguments: tuple[str, ...]) -> dict[str, Any] | None:
        """What ``forge.training.probes.NAME`` answers in a process of ``backend``; ``None``: no time for it."""
        deadline = self.deadline if self.measures else 0.0
        return run_probe(
            name,
            backend,
            arguments,
            self.store,
            time_limit_seconds=PROBE_SECONDS,
            deadline=deadline,
            announce=self.announce,
        )

    def spec(
        self,
        backend: Backend,
        seed: int,
        *,
        plan: tuple[str, ...] = (),
        changes: tuple[str, ...] = (),
        evaluate: bool = False,
        float32_adapter: bool = False,
    ) -> RunSpec:
        """A run of the ladder's workload."""
        train, validation = self.documents
        overrides = (
            f"model.path={self.base_dir}",
            f"data.train={train}",
            f"data.validation={validation}",
            f"training.seed={seed}",
            *self.overrides,
            *changes,
        )
        return RunSpec(
            backend=backend,
            workload=WORKLOAD,
            overrides=overrides,
            plan_overrides=plan,
            evaluate=evaluate,
            float32_adapter=float32_adapter,
        )

    def outcome(self, spec: RunSpec) -> Outcome | None:
        """The run of ``spec``, from the store or made now; ``None``: neither.

        A run of a kind not timed yet is expected to take as long as the session's longest of that arm.
        """
        kind = (spec.backend, spec.evaluate)
        deadline = None if self.deadline is None else self.deadline - self._longest.get(kind, 0.0)
        outcome = run_single(
            spec,
            self.store,
            deadline=deadline if self.measures else 0.0,
            run=self.run,
            time_limit_seconds=self.time_limit_seconds,
            announce=self.announce,
        )
        if outcome is not None:
            self._longest[kind] = max(self._longest.get(kind, 0.0), outcome.wall_seconds)
        return outcome

    def outcomes(self, specs: Sequence[RunSpec]) -> list[Outcome]:
        """The runs of ``specs`` up to the first that is missing or failed, which is included if it failed."""
        found: list[Outcome] = []
        for spec in specs:
            outcome = self.outcome(spec)
            if outcome is None:
                break
            found.append(outcome)
            if outcome.status != "completed":
                break
        return found

    # ----------------------------------------------------------------------------------------------------------------
    # What all runs share

    @cached_property
    def documents(self) -> tuple[Path, Path]:
        """What is trained on and what is held out: beside the store, not in it, for a store may be committed."""
        return write_documents(self.train, self.store.directory.parent / "parity")

    @cached_property
    def base_dir(self) -> Path:
        """The base's directory, made now if need be (`small`: some minutes on a GPU), alike on every machine of a kind.

        By its directory and not its name a base is in the key of every run by content: one with other weights, as
        another kind of machine would train it, begins the ladder anew.
        """
        if Path(self.base).is_dir():
            return Path(self.base).absolute()
        self.announce(f"the base {self.base}")
        ended = run_process(
            [interpreter(EVALUATOR), "-m", "forge.training.probes.repeatable_base", self.base],
            environment=environment(EVALUATOR),
            directory=ROOT,
            time_limit_seconds=BASE_SECONDS,
        )
        lines = ended.output.decode("utf-8", "replace").strip().splitlines()
        if ended.exit_code or not lines or not Path(lines[-1]).is_dir():
            said = lines[-1] if lines else "nothing was said"
            raise MachineError(
                f"the base {self.base} cannot be had: {said}", remedy=f"`forge base {self.base}` says why"
            )
        return Path(lines[-1])
