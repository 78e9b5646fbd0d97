"""What is measured of speed and memory, as data: trials for the claims, and what is reported beside them.

:class:`PerfSuite` measures it through the gate's session, in the order of :data:`ORDER`: first what the claims need.
Everything is kept in the store, so a gate may take as many sessions and machines (of one kind) as it needs; until then
a trial is INCOMPLETE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from forge.training.backends import Backend
from forge.training.config.workload import load_workload
from forge.training.system.errors import ForgeError
from harness.measurement.environment import work_arguments
from harness.measurement.metrics import Metric, measure
from harness.measurement.results import Outcome, RunSpec
from harness.measurement.trial import Trial
from harness.perf.claims import Claim, judge
from harness.recorder import Unit
from harness.session import Session
from harness.verdict import Verdict, status_of_error

METRICS: dict[Metric, Unit] = {
    "measured_seconds": "seconds",
    "peak_allocated_bytes": "bytes",
    "peak_reserved_bytes": "bytes",
    "device_used_bytes": "bytes",
    "last_train_loss": "nats",
}

# What a run's whole process takes on an H200, for a deadline's sake; the store's own runs know better.
EXPECTED_SECONDS = {"genome_full": 125.0, "genome_8k": 100.0, "legacy_256": 85.0}
PEAK_SECONDS, PEAK_TAKES_SECONDS = 90.0, 10.0  # the limit of the matrix-product probe, and what it takes


@dataclass(frozen=True)
class Arm:
    """A backend in a layout. ``plan``: what differs from the layout in ``forge/workloads/*.plans.yaml``."""

    name: str
    backend: Backend
    plan: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()  # other work: never compared with anything


@dataclass(frozen=True)
class Planned:
    """A trial to be measured. ``fixed_pairs``: ``None`` is the workload's own number."""

    workload: str
    baseline: Arm
    candidate: Arm
    fixed_pairs: int | None = None

    @property
    def num_pairs(self) -> int:
        """Pairs of the trial, fixed before its first."""
        return self.fixed_pairs or load_workload(self.workload).gate.num_pairs


LEGACY, TRL, UNSLOTH = Arm("legacy", "legacy"), Arm("trl", "trl"), Arm("unsloth", "unsloth")
_FASTEST = "legacy fastest layout"

TRIALS: dict[str, Planned] = {
    "genome_full": Planned("genome_full", LEGACY, UNSLOTH),
    "legacy_256": Planned("legacy_256", LEGACY, UNSLOTH),
    "control_aa": Planned("legacy_256", LEGACY, LEGACY),
    # reported beside the claims, one pair each
    "genome_8k": Planned("genome_8k", LEGACY, UNSLOTH, fixed_pairs=1),
    "legacy_256_fastest_legacy": Planned(
        "legacy_256", Arm(_FASTEST, "legacy", ("micro_batch=8", "attention=flash")), UNSLOTH, fixed_pairs=1
    ),
    "genome_full_fastest_legacy": Planned(
        "genome_full",
        Arm(_FASTEST, "legacy", ("micro_batch=4", "grouping=tokens", "attention=mixed")),
        UNSLOTH,
        fixed_pairs=1,
    ),
}

_ONE_BY_EIGHT = ("micro_batch=1", "grouping=none")
SINGLES: tuple[tuple[str, Arm], ...] = (
    ("genome_full", TRL),
    ("genome_full", Arm("trl 1 x 8", "trl", _ONE_BY_EIGHT)),
    ("legacy_256", TRL),
    ("genome_8k", TRL),
    ("genome_8k", Arm("trl 1 x 8", "trl", _ONE_BY_EIGHT)),
    # what of the gain of legacy's fastest layout, measured as a pair above, comes from attention alone
    ("genome_full", Arm("legacy 1 x 8, flash attention", "legacy", ("attention=mixed",))),
)

# The legacy pipeline trained in fp16, which both TRL versions' bf16 adapters rule out: what happens is recorded, not
# compared.
FP16: tuple[str, Arm] = ("legacy_256", Arm("legacy in fp16", "legacy", overrides=("model.dtype=float16",)))

# Where the gain comes from: each arm has one change more than the one before. The first and last are the claims' own.
_ORIGINAL = ("micro_batch=1", "grouping=none", "attention=default", "padding=longest", "mlp_tile_tokens=null")
_PLAIN = (*_ORIGINAL, "loss_chunk_gib=null", "gradient_checkpointing=full")
_FOUR = (*_ORIGINAL[1:], "micro_batch=4", "attention=mixed")
ABLATION: tuple[tuple[str, Arm], ...] = (
    ("genome_full", Arm("legacy 1 x 8", "legacy")),
    ("genome_full", Arm("trl 1 x 8: fused loss", "trl", (*_ONE_BY_EIGHT, "attention=default"))),
    ("genome_full", Arm("unsloth 1 x 8: its kernels", "unsloth", _PLAIN)),
    ("genome_full", Arm("+ checkpoints on the host", "unsloth", (*_ORIGINAL, "loss_chunk_gib=null"))),
    ("genome_full", Arm("+ flash attention below 8,192, loss in chunks", "unsloth", (*_ORIGINAL, "attention=mixed"))),
    ("genome_full", Arm("+ 4 x 2, padded", "unsloth", (*_FOUR, "grouping=length"))),
    ("genome_full", Arm("+ no padding", "unsloth", (*_FOUR, "grouping=length", "padding=none"))),
    ("genome_full", Arm("+ micro-batches of equal tokens", "unsloth", ("mlp_tile_tokens=null",))),
    ("genome_full", Arm("+ MLP in tiles", "unsloth")),
)

CONTEXT_ARMS = (LEGACY, TRL, UNSLOTH)
CONTEXT_WORKLOAD = "genome_full"
# Budget in GiB: seconds of steps that its probe may take. At 80 GiB a single step takes a minute and longer.
CONTEXT_SECONDS = {8.0: 60.0, 24.0: 240.0, 80.0: 330.0}
CONTEXT_BUDGETS_GIB = tuple(CONTEXT_SECONDS)
_CONTEXT_LOAD_SECONDS = 120.0  # at most; imports and the load of 7B took 30 to 50
# What such a probe is expected to take in all: legacy's longest documents are short, and so are its steps.
CONTEXT_TAKES_SECONDS: dict[tuple[Backend, float], float] = {
    **{("legacy", 8.0): 50.0, ("legacy", 24.0): 60.0, ("legacy", 80.0): 120.0},
    **{("trl", 8.0): 50.0, ("trl", 24.0): 90.0, ("trl", 80.0): 280.0},
    **{("unsloth", 8.0): 60.0, ("unsloth", 24.0): 240.0, ("unsloth", 80.0): 400.0},
}

# What is reported side by side: (workload, arm) -> what of ORDER measures it. Without the A/A control.
ITEM_OF_ARM: dict[tuple[str, Arm], str] = dict.fromkeys(SINGLES, "singles")
for _name, _planned in reversed(TRIALS.items()):  # the claims' own trials come first, and have the last word
    if _name != "control_aa":
        ITEM_OF_ARM |= {(_planned.workload, arm): _name for arm in (_planned.baseline, _planned.candidate)}

# What to measure first. Names for --gate-only.
ORDER: tuple[str, ...] = (
    *(*list(TRIALS)[:3], "matmul_peak", *list(TRIALS)[3:]),
    *("singles", "ablation", "max_context"),
)


@dataclass
class PerfSuite:
    """Everything above, from the session's store or measured now. ``None`` is always "not measured"."""

    session: Session

    def spec(self, workload: str, arm: Arm) -> RunSpec:
        """A run of ``arm``: the workload's first ``gate.num_steps`` steps on a sample of as many documents."""
        own = load_workload(workload)
        steps = own.gate.num_steps
        overrides = (
            f"model.path={self.session.model}",
            f"data.train={self.session.train}",
            "data.validation=null",
            "data.validation_share=0",
            f"data.sample={steps * own.training.effective_batch}",
            f"training.max_steps={steps}",
            "training.save_every_steps=null",
            "training.save_every_minutes=null",
            "report_to=[]",
            *arm.overrides,
        )
        return RunSpec(backend=arm.backend, workload=workload, overrides=overrides, plan_overrides=arm.plan)

    def num_warmup_steps(self, workload: str) -> int:
        """Steps of a run that are not timed."""
        return load_workload(workload).gate.num_warmup_steps

    def measure_all(self) -> None:
        """Measure what ``--gate-only`` names, in its order, else all of :data:`ORDER`, as long as there is time.

        An error ends the run, trial or probe that met it and nothing else.
        """
        for name in self.session.only or ORDER:
            for measure_part in self._parts_of(name):
                try:
                    measure_part()
                except ForgeError as error:
                    self.session.announce(f"{name}: {error}")

    def _parts_of(self, name: str) -> Iterator[Callable[[], Any]]:
        """The runs, trials and probes of an item of :data:`ORDER`; none of another suite's name."""
        if name in TRIALS:
            yield partial(self.trial, name)
        elif name == "singles":
            yield from (partial(self.single, *run) for run in (*SINGLES, FP16))
        elif name == "ablation":
            yield from (partial(self.single, *run, item="ablation") for run in ABLATION)
        elif name == "matmul_peak":
            yield self.matmul_peak
        elif name == "max_context":
            for arm in CONTEXT_ARMS:
                yield from (partial(self.max_context, arm, budget_gib) for budget_gib in CONTEXT_BUDGETS_GIB)

    def trial(self, name: str) -> Trial | None:
        """A trial as far as it could be measured; ``None`` also where the store's has other code, data or packages."""
        planned = TRIALS[name]
        return self.session.limited_to(name).trial(
            name,
            self.spec(planned.workload, planned.baseline),
            self.spec(planned.workload, planned.candidate),
            planned.num_pairs,
            expected_seconds=EXPECTED_SECONDS[planned.workload],
        )

    def single(self, workload: str, arm: Arm, item: str = "singles") -> Outcome | None:
        """A run beside the trials. ``item``: what of :data:`ORDER` measures it."""
        session = self.session.limited_to(item)
        return session.run(self.spec(workload, arm), expected_seconds=EXPECTED_SECONDS[workload])

    def matmul_peak(self) -> dict[str, Any] | None:
        """The answer of :mod:`harness.perf.probes.matmul_peak`."""
        return self.session.limited_to("matmul_peak").probe(
            "harness.perf.probes.matmul_peak",
            UNSLOTH.backend,
            expected_seconds=PEAK_TAKES_SECONDS,
            limit_seconds=PEAK_SECONDS,
        )

    def max_context(self, arm: Arm, budget_gib: float) -> dict[str, Any] | None:
        """The answer of :mod:`harness.perf.probes.max_context` for an arm in a budget of GPU memory."""
        work, seconds = self.spec(CONTEXT_WORKLOAD, arm), CONTEXT_SECONDS[budget_gib]
        return self.session.limited_to("max_context").probe(
            "harness.perf.probes.max_context",
            arm.backend,
            (*work_arguments(work), "--budget", f"{budget_gib:g}", "--seconds", f"{seconds:g}"),
            expected_seconds=CONTEXT_TAKES_SECONDS[arm.backend, budget_gib],
            limit_seconds=seconds + _CONTEXT_LOAD_SECONDS,
            work=work,
        )

    def why_missing(self, item: str) -> str:
        """Why something of an item of :data:`ORDER` was not measured, for people."""
        return self.session.limited_to(item).why_missing()

    def verdict(self, claim: Claim) -> Verdict:
        """The verdict on a claim by the pairs there are; what ended its trial, by the policy of all suites."""
        planned = TRIALS[claim.trial]
        try:
            trial = self.trial(claim.trial)
        except ForgeError as error:
            no_pairs = judge(
                claim, [], [], num_pairs_planned=planned.num_pairs, baseline_statuses=[], candidate_statuses=[]
            )
            return no_pairs.model_copy(update={"status": status_of_error(error), "reason": str(error)})
        pairs = trial.pairs if trial else []
        sides = [self.samples([pair[side] for pair in pairs], claim.metric, planned.workload) for side in (0, 1)]
        verdict = judge(
            claim,
            *sides,
            num_pairs_planned=planned.num_pairs,
            baseline_statuses=trial.statuses("baseline") if trial else [],
            candidate_statuses=trial.statuses("candidate") if trial else [],
        )
        why = trial.stopped if trial else self.why_missing(claim.trial)
        reason = f"{verdict.reason} ({why})" if why and verdict.status == "INCOMPLETE" else verdict.reason
        run_ids = [outcome.run_id for pair in pairs for outcome in pair]
        return verdict.model_copy(update={"reason": reason, "run_ids": run_ids})

    def samples(self, outcomes: list[Outcome], metric: str, workload: str) -> list[float]:
        """One figure of each run, warm-up steps left out."""
        warmup = self.num_warmup_steps(workload)
        return [measure(outcome, metric, num_warmup_steps=warmup) for outcome in outcomes]

    def runs_of(self, workload: str, arm: Arm) -> list[Outcome]:
        """The runs of one of :data:`ITEM_OF_ARM`: of its trial's complete pairs, or the single one."""
        item = ITEM_OF_ARM[workload, arm]
        if item == "singles":
            outcome = self.single(workload, arm)
            return [outcome] if outcome else []
        trial, side = self.trial(item), int(arm != TRIALS[item].baseline)
        return [pair[side] for pair in trial.pairs] if trial else []


def describe_runs(outcomes: list[Outcome], arm: str) -> dict[str, Any]:
    """The work and the layout that these runs share, for an entry."""
    first = outcomes[0]
    record = first.record or {}
    return {
        "workload": (record.get("workload") or {}).get("name") or first.spec.workload,
        "workload_sha256": record.get("workload_sha256"),
        "backend": first.spec.backend,
        "arm": arm,
        "plan": record.get("plan") or first.key_parts.get("plan"),
        "code_sha256": first.key_parts.get("code"),
        "gpu": first.key_parts.get("gpu"),
        "run_ids": [outcome.run_id for outcome in outcomes],
    }
