"""What the parity ladder measures, as data."""

from __future__ import annotations

from forge.training.backends import Backend

WORKLOAD = "parity"
BASELINE: Backend = "legacy"
CANDIDATE: Backend = "unsloth"

# Rungs 2 and 3: documents a micro-batch x micro-batches, and padding; the candidate's own plan's first.
STEP_LAYOUTS = ("4x2:none", "8x1:none", "1x8:none", "8x1:longest")
NUM_POSITIONS = 16  # tokens of each document: errors of equal size over 128 miss the bar of 1.5 in 3 of a million cases

# Rung 4: runs of the baseline that differ in rounding alone, the first its owner's. Micro-batches of other sizes and
# make-up sum other partial results; which attention kernel is taken follows from length, padding and what is allowed.
# ``rounding=``: probes/float32_adapter.py. Half of them must not share what the others' kernels have in common, and one
# not what all of a stack's layouts share, bfloat16 products and residuals in its order: another stack's are others.
# One: a second run in float32 would be its twin, to a millionth, and show less noise than there is.
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
FAULT = ("learning_rate", 1.1)  # of the optimizer: what rung 5 must see to be worth anything

# Rung 6; its margin and least number of seeds are the workload's (`gate:`).
MOST_SEEDS = 20  # beyond it the spread is too large for the margin, and the workload wants changing
PILOT_SEEDS = (1, 2, 3, 4, 5, 6)
FIRST_TEST_SEED = 101

PROBE_SECONDS = 420.0
# What a process is expected to take before one of its kind has been timed: nothing is begun that could not end in time.
# A micro-batch of the legacy stack takes 0.4 s at 28 layers, whatever is in it (docs/results), so 0.12 s at eight.
PROBE_EXPECTED_SECONDS = 180.0
RUN_EXPECTED_SECONDS, EVALUATION_EXPECTED_SECONDS, MICRO_BATCH_EXPECTED_SECONDS = 60.0, 55.0, 0.15

# Side by side on one GPU. A documents' worth of memory is 1,024 tokens of full float32 logits, with their gradient and
# copies some 3 GiB in the legacy stack; processes wait for the CPU, so some cores are left to the rest.
DOCUMENTS_SIDE_BY_SIDE = 24
MOST_SIDE_BY_SIDE, CORES_LEFT = 10, 4
