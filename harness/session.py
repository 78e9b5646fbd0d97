"""One session of the gate: results come from the store or are measured now, as long as there is time.

Every suite measures through it: a run, a trial of interleaved pairs, a probe. ``None`` is always "not measured": there
was no time left, or the session leaves that suite out (``--gate-only``). Nothing is tried twice in one session: an
error that ended a measurement is raised each time it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from forge.training.backends import Backend
from forge.training.system.errors import ConfigurationError, ForgeError
from harness.measurement.probe import run_probe
from harness.measurement.results import Outcome, RunSpec, Store
from harness.measurement.runner import TIME_LIMIT_SECONDS, run_once
from harness.measurement.trial import Run, Trial, read_trial, run_single, run_trial
from harness.verdict import Claim, Verdict, status_of_error

MODEL = "qwen2-7b"  # random weights in that shape, where no base is given

_Result = TypeVar("_Result")


@dataclass
class Session:
    """``store``: where results are kept. ``train``: the documents. ``model``: the base of the 7B runs.

    ``deadline``: on :func:`time.monotonic`'s clock; ``None``: no limit. ``only``: what ``--gate-only`` names; empty:
    everything. ``measures``: whether anything may be measured; if not, the store's results are all there is.
    ``run_seconds``: a run that takes longer is stopped, which is an outcome. ``run_one`` makes one run.
    """

    store: Store
    train: Path
    model: str = MODEL
    deadline: float | None = None
    only: tuple[str, ...] = ()
    measures: bool = True
    run_seconds: float = TIME_LIMIT_SECONDS
    announce: Callable[[str], None] = lambda line: None
    run_one: Run = run_once
    _results: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.train.is_file():
            raise ConfigurationError(
                f"the gate trains on real documents, and {self.train} is not a file",
                remedy="name the JSONL that `forge dataset` wrote: --gate-train FILE",
            )

    def limited_to(self, suite: str) -> Session:
        """This session as a suite sees it: without leave to measure where ``--gate-only`` names other things only."""
        return replace(self, measures=self.measures and (not self.only or suite in self.only))

    @property
    def until(self) -> float | None:
        """The deadline, as everything that measures takes it: long past where this session may not measure."""
        return self.deadline if self.measures else 0.0

    def why_missing(self) -> str:
        """Why something has no result, for people."""
        if not self.measures:
            return "left out of this session (--gate-only), and the store has none"
        return "no time was left for it in this session"

    def run(self, spec: RunSpec, *, expected_seconds: float, is_alone: bool = True) -> Outcome | None:
        """The newest sound outcome of ``spec`` in the store, else a new run; ``None``: not measured."""
        return self._once(
            (spec, is_alone),  # what fails beside others may succeed alone
            lambda: run_single(
                spec,
                self.store,
                deadline=self.until,
                run=self.run_one if is_alone else partial(self.run_one, is_alone=False),
                time_limit_seconds=self.run_seconds,
                unseen_seconds=expected_seconds,
                announce=self.announce,
            ),
        )

    def trial(
        self, name: str, baseline: RunSpec, candidate: RunSpec, num_pairs: int, *, expected_seconds: float
    ) -> Trial | None:
        """A trial, with what is missing of it measured as far as there is time.

        ``None``: nothing may be measured, and the store has none of today's code, data and packages.
        ``expected_seconds``: of a run, where the store has none of either arm. Raises what
        :func:`harness.measurement.trial.run_trial` raises.
        """

        def measure() -> Trial | None:
            if not self.measures:
                return read_trial(name, self.store, specs=(baseline, candidate))
            return run_trial(
                name,
                baseline,
                candidate,
                num_pairs,
                self.store,
                deadline=self.until,
                run=self.run_one,
                time_limit_seconds=self.run_seconds,
                unseen_seconds=expected_seconds,
                announce=self.announce,
            )

        return self._once((name, baseline, candidate), measure)

    def probe(
        self,
        module: str,
        backend: Backend,
        arguments: tuple[str, ...] = (),
        *,
        expected_seconds: float,
        limit_seconds: float,
        is_alone: bool = True,
        resumes: bool = False,
        work: RunSpec | None = None,
    ) -> dict[str, Any] | None:
        """What ``python -m MODULE ARGUMENTS`` answers in the backend's interpreter; ``None``: not measured.

        The other arguments are those of :func:`harness.measurement.probe.run_probe`. Raises :class:`ForgeError` with
        the probe's own exit code.
        """
        return self._once(
            (module, backend, is_alone, *arguments),
            lambda: run_probe(
                module,
                backend,
                arguments,
                self.store,
                deadline=self.until,
                expected_seconds=expected_seconds,
                time_limit_seconds=limit_seconds,
                announce=self.announce,
                is_alone=is_alone,
                resumes=resumes,
                work=work,
            ),
        )

    def _once(self, question: Any, measure: Callable[[], _Result | None]) -> _Result | None:
        """What ``measure`` returned or raised the first time that there was time for it."""
        if self._results.get(question) is None:
            try:
                self._results[question] = measure()
            except ForgeError as error:
                self._results[question] = error
        result: _Result | ForgeError | None = self._results[question]
        if isinstance(result, ForgeError):
            raise result
        return result

    def verdict(self, claim: Claim, ask: Callable[[], Any]) -> Verdict:
        """The verdict on what ``ask`` answers; where it answers ``None`` or raises :class:`ForgeError`, on that."""
        try:
            answer = ask()
        except ForgeError as error:
            status, reason = status_of_error(error), str(error)
        else:
            if answer is not None:
                return claim.verdict(answer)
            status, reason = "INCOMPLETE", self.why_missing()
        return Verdict(name=claim.name, statement=claim.statement, status=status, reason=reason)
