"""What the parity ladder measures, as data. What it is judged by: claims.py."""

from __future__ import annotations

from dataclasses import dataclass

from forge.training.backends import Backend

WORKLOAD = "parity"
BASELINE: Backend = "legacy"
CANDIDATE: Backend = "unsloth"
OTHER_ARM: Backend = "trl"  # no claim is about it, but what is reported beside the claims must be the same work

# Rungs 2 and 3: QUANTIZATION is nf4, or none for the workload's 16 bits as they are. LAYOUT:PADDING is documents per
# micro-batch x micro-batches, and padding; the first is that of the candidate's own plan. What may follow after another
# colon is more of the plan.
QUANTIZATIONS = ("nf4", "none")
STEP_LAYOUTS = ("4x2:none", "8x1:none", "1x8:none", "8x1:longest")
BASELINE_STEP_LAYOUT = "1x8:longest"  # that of legacy's own plan
NUM_POSITIONS = 16  # tokens of each document: errors of equal size over 128 miss the bar of 1.5 in 3 of a million cases

# Rungs 1 to 3 once more, on the ladder's base written as another architecture, in the first quantisation.
ARCHITECTURES = ("llama", "qwen3")
ARCHITECTURE_LAYOUTS = ("8x1:none", "1x8:none")

# Rung 3 where Forge's layers train: the same step with the workload's dropout, in every layout of such a plan.
DROPOUT_LAYOUTS = (
    *("1x8:none", "2x4:none", "4x2:none", "8x1:longest"),
    "8x1:none:gradient_checkpointing=none,mlp_tile_tokens=null",  # everything kept
    "8x1:none:gradient_checkpointing=full,mlp_tile_tokens=null",  # recomputed
    "8x1:none:gradient_checkpointing=offload,mlp_tile_tokens=200",  # offloaded, in tiles that end inside documents
    "8x1:none:gradient_checkpointing=full,kept_activations_gib=0.2,mlp_tile_tokens=1000",  # some layers kept
    "8x1:none:micro_batch_tokens=2048",  # as many documents as fit
    "8x1:none:dequantize_once=true",
)


@dataclass(frozen=True)
class StepPlan:
    """A plan that goes through rungs 1 to 3 beside the candidate's own: that of workload ``of``, with ``changes``."""

    name: str
    backend: Backend
    of: str = WORKLOAD
    changes: tuple[str, ...] = ()
    layouts: tuple[str, ...] = STEP_LAYOUTS


# Every plan that is shipped, in the ladder's own micro-batches (those of smoke and genome_8k are among them), and
# Forge's layers in each stack.
_PACKED, _PADDED = ("8x1:none", "1x8:none"), ("8x1:longest", "1x8:longest")
PLANS = (
    StepPlan("unsloth with kernels=forge", "unsloth", changes=("kernels=forge",)),
    StepPlan("trl with kernels=forge", "trl", changes=("kernels=forge",)),
    StepPlan("unsloth as legacy_256", "unsloth", "legacy_256", layouts=_PACKED),
    StepPlan("unsloth as demo", "unsloth", "demo", layouts=_PACKED),
    StepPlan("trl as legacy_256", "trl", "legacy_256", layouts=_PADDED),
    StepPlan("trl as genome_full", "trl", "genome_full", layouts=_PADDED),
    StepPlan("trl as demo", "trl", "demo", layouts=_PADDED),
)

# Rung 4: runs of the baseline that differ in rounding alone, the first in legacy's own plan. Micro-batches of other
# sizes and make-up add up other partial results; length, padding and what is allowed decide which attention kernel is
# taken. ``rounding=``: probes/float32_adapter.py. All layouts of one backend share most of its kernels, and another
# backend shares few of them, so layouts alone would show less noise than there is between backends. Therefore five of
# the eight runs replace a kernel that the others share. One run computes everything in float32, which no layout does:
# it shows what rounding to bfloat16 itself moves. Only one: a second would equal it to a millionth and hide noise.
LAYOUTS: tuple[tuple[str, ...], ...] = (
    (),
    ("micro_batch=2", "rounding=float32_head"),
    ("micro_batch=4", "rounding=eager"),
    ("micro_batch=8", "attention=flash"),
    ("micro_batch=2", "grouping=length", "attention=flash"),
    ("micro_batch=4", "grouping=tokens", "rounding=float32_head"),
    ("micro_batch=4", "grouping=length", "rounding=eager", "rounding=float32_head"),
    ("micro_batch=8", "grouping=length", "rounding=float32"),
)
TRAJECTORY_SEED = 1000
NO_DROPOUT = "lora.dropout=0.0"  # masks differ between layouts

# Rung 6
PILOT_SEEDS = (1, 2, 3, 4, 5, 6)
FIRST_TEST_SEED = 101

PROBE_SECONDS = 420.0
MOST_STEPS_A_PROCESS = 3  # of a candidate's: then a process ends well within that
# What a process is expected to take before one of its kind has been timed: nothing is begun that could not end in time.
# A micro-batch of legacy takes 0.4 s at 28 layers, whatever is in it (docs/results), so 0.12 s at eight.
PROBE_EXPECTED_SECONDS = 180.0
RUN_EXPECTED_SECONDS, EVALUATION_EXPECTED_SECONDS, MICRO_BATCH_EXPECTED_SECONDS = 60.0, 55.0, 0.15

# Side by side on one GPU. A document's worth of memory is 1,024 tokens of full float32 logits, with their gradient and
# copies some 3 GiB in legacy; processes wait for the CPU, so some cores are left to the rest.
DOCUMENTS_SIDE_BY_SIDE = 24
MOST_SIDE_BY_SIDE, CORES_LEFT = 10, 4
