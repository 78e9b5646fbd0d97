"""What the acceptance gate measures, as data: trials for the claims, and what is reported beside them."""

from __future__ import annotations

from dataclasses import dataclass

from forge.training.backends import Backend

MODEL = "qwen2-7b"
# What a run's whole process takes on an H200, for a deadline's sake; the store's own runs know better.
EXPECTED_SECONDS = {"genome_full": 125.0, "genome_8k": 100.0, "legacy_256": 85.0}
CEILING_SECONDS, CEILING_TAKES_SECONDS = 90.0, 10.0


@dataclass(frozen=True)
class Arm:
    """A backend in a layout. ``plan``: what differs from the layout in ``workloads/*.plans.yaml``."""

    name: str
    backend: Backend
    plan: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()  # other work: never compared with anything


@dataclass(frozen=True)
class Planned:
    """A trial to be measured. ``num_pairs``: ``None`` is the workload's own number."""

    workload: str
    baseline: Arm
    candidate: Arm
    num_pairs: int | None = None


LEGACY, TRL, UNSLOTH = Arm("legacy", "legacy"), Arm("trl", "trl"), Arm("unsloth", "unsloth")
_FASTEST = "legacy fastest layout"
_FP16 = "legacy in fp16"

TRIALS: dict[str, Planned] = {
    "genome_full": Planned("genome_full", LEGACY, UNSLOTH),
    "legacy_256": Planned("legacy_256", LEGACY, UNSLOTH),
    "control_aa": Planned("legacy_256", LEGACY, LEGACY),
    # reported beside the claims, one pair each
    "genome_8k": Planned("genome_8k", LEGACY, UNSLOTH, num_pairs=1),
    "legacy_256_fastest_legacy": Planned(
        "legacy_256", Arm(_FASTEST, "legacy", ("micro_batch=8", "attention=flash")), UNSLOTH, num_pairs=1
    ),
    "genome_full_fastest_legacy": Planned(
        "genome_full",
        Arm(_FASTEST, "legacy", ("micro_batch=4", "grouping=tokens", "attention=mixed")),
        UNSLOTH,
        num_pairs=1,
    ),
}

_ONE_BY_EIGHT = ("micro_batch=1", "grouping=none")
SINGLES: tuple[tuple[str, Arm], ...] = (
    ("genome_full", TRL),
    ("genome_full", Arm("trl 1 x 8", "trl", _ONE_BY_EIGHT)),
    ("legacy_256", TRL),
    ("genome_8k", TRL),
    ("genome_8k", Arm("trl 1 x 8", "trl", _ONE_BY_EIGHT)),
    # what of the legacy stack's fastest layout, measured as a pair above, is owed to attention alone
    ("genome_full", Arm("legacy 1 x 8, flash attention", "legacy", ("attention=mixed",))),
)

# Its owner trains in fp16, which both TRL versions' bf16 adapters rule out: what happens is recorded, not compared.
FP16: tuple[str, Arm] = ("legacy_256", Arm(_FP16, "legacy", overrides=("model.dtype=float16",)))

# Where the gain comes from: one change a rung. The first and the last rung are the claims' own arms.
_OWNERS = ("micro_batch=1", "grouping=none", "attention=default", "padding=longest", "mlp_tile_tokens=null")
_PLAIN = (*_OWNERS, "loss_chunk_gib=null", "gradient_checkpointing=full")
_FOUR = (*_OWNERS[1:], "micro_batch=4", "attention=mixed")
LADDER: tuple[tuple[str, Arm], ...] = (
    ("genome_full", Arm("legacy 1 x 8", "legacy")),
    ("genome_full", Arm("trl 1 x 8: fused loss", "trl", (*_ONE_BY_EIGHT, "attention=default"))),
    ("genome_full", Arm("unsloth 1 x 8: its kernels", "unsloth", _PLAIN)),
    ("genome_full", Arm("+ checkpoints on the host", "unsloth", (*_OWNERS, "loss_chunk_gib=null"))),
    ("genome_full", Arm("+ flash attention below 8,192, loss in chunks", "unsloth", (*_OWNERS, "attention=mixed"))),
    ("genome_full", Arm("+ 4 x 2, padded", "unsloth", (*_FOUR, "grouping=length"))),
    ("genome_full", Arm("+ no padding", "unsloth", (*_FOUR, "grouping=length", "padding=none"))),
    ("genome_full", Arm("+ micro-batches of equal tokens", "unsloth", ("mlp_tile_tokens=null",))),
    ("genome_full", Arm("+ MLP in tiles", "unsloth")),
)

CONTEXT_WORKLOAD = "genome_full"
# Budget in GiB: seconds of steps that its probe may take. At 80 GiB one takes a minute and longer.
CONTEXT_SECONDS = {8.0: 60.0, 24.0: 240.0, 80.0: 330.0}
CONTEXT_BUDGETS_GIB = tuple(CONTEXT_SECONDS)
CONTEXT_LOAD_SECONDS = 120.0  # at most; imports and the load of 7B took 30 to 50
# What such a probe is expected to take in all: the old stack's documents are short, and so are their steps.
CONTEXT_TAKES_SECONDS: dict[tuple[Backend, float], float] = {
    **{("legacy", 8.0): 50.0, ("legacy", 24.0): 60.0, ("legacy", 80.0): 120.0},
    **{("trl", 8.0): 50.0, ("trl", 24.0): 90.0, ("trl", 80.0): 280.0},
    **{("unsloth", 8.0): 60.0, ("unsloth", 24.0): 240.0, ("unsloth", 80.0): 400.0},
}

# What to measure first. Names for --gate-only.
ORDER: tuple[str, ...] = (*list(TRIALS)[:3], "ceiling", *list(TRIALS)[3:], "singles", "ladder", "context")
