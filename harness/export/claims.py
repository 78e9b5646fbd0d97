"""What an export must keep: each claim with its statement, the probe that is asked, its judge and its bars."""

from __future__ import annotations

from functools import partial

from forge.training.config.quantizations import GGUF_TYPES
from harness.export import contents, predictions
from harness.stats import CONFIDENCE, LOSS_MARGIN_NATS
from harness.verdict import Claim

# Mean KL(merged weights in float32 || file) in nats per predicted token, on held-out text of a trained base.
# For scale: 8B models have 2.4e-4 at q8_0 and 0.03 at q4_k_m (llama.cpp's tables), the tiny base 2e-4 and 0.015.
# f16 is llama.cpp's rounding of activations, not the file: 1.5e-7 on the tiny base, where an f32 file has 7e-12.
# It grows with depth and width, so that on a large model the bar may say more of llama.cpp than of the export.
KL_BARS = {"f16": 1e-6, "q8_0": 1e-3, "q4_k_m": 0.05}
KINDS = tuple(sorted(KL_BARS, key=list(GGUF_TYPES).index))  # what is made; greedy text and tokens are the first's

CLAIMS = (
    Claim(
        "merge",
        "Merged weights are base + scale B A, rounded once; every other tensor is the same bytes.",
        "merge",
        contents.judge_merge,
        {"scale_tolerance": 1e-3, "most_rounding": 1.0},  # a merge by 1% too much is ten times that tolerance
    ),
    Claim(
        "merged_against_adapter",
        "The merged weights predict what the adapter on the original 16-bit base predicts.",
        "divergence",
        predictions.judge_merged_against_adapter,
        {
            # Merging rounds every changed weight to 16 bits: it may lose no more than the finest quantisation does.
            "mean_kl_nats": KL_BARS["q8_0"],
            "loss_margin_nats": LOSS_MARGIN_NATS,
            "least_effect": 100.0,
            "confidence": CONFIDENCE,
        },
    ),
    *(
        Claim(
            f"divergence_{kind}",
            f"The {kind} file predicts what the merged weights predict: mean KL below {KL_BARS[kind]:g} nats.",
            "divergence",
            partial(predictions.judge_file, kind=kind),
            {"mean_kl_nats": KL_BARS[kind], "confidence": CONFIDENCE},
        )
        for kind in KINDS
    ),
    Claim(
        "chain",
        "From base to the smallest file the held-out loss is known, and the adapter improved it.",
        "divergence",
        predictions.judge_chain,
        {"confidence": CONFIDENCE},
    ),
    Claim(
        "greedy",
        "Greedy answers of the f16 file are those of the merged weights, token by token.",
        "divergence",
        predictions.judge_greedy,
    ),
    Claim(
        "lora_route",
        "Base and LoRA as GGUF files of their own predict what the merged model predicts.",
        "divergence",
        predictions.judge_lora_route,
        # To the adapter: the same numbers in float32, but for llama.cpp's float16 products.
        {"to_adapter_kl_nats": KL_BARS["f16"], "to_merged_kl_nats": KL_BARS["q8_0"], "confidence": CONFIDENCE},
    ),
    Claim(
        "tokens",
        "llama.cpp reads text as the tokenizer does, composed text (NFC) provided.",
        "tokens",
        contents.judge_tokens,
        {"least_strings": 200},
    ),
    Claim(
        "template",
        "The chat template in the file gives the tokenizer's text and ids.",
        "tokens",
        contents.judge_template,
    ),
    Claim("specials", "BOS, EOS and padding are the tokenizer's.", "tokens", contents.judge_specials),
    Claim(
        "modelfile",
        "The Modelfile is valid and its template renders the tokenizer's text.",
        "tokens",
        contents.judge_modelfile,
    ),
    Claim(
        "provenance",
        "Each artefact, from corpus to GGUF, is by its SHA-256 what the records say.",
        "provenance",
        contents.judge_provenance,
    ),
)


def claim_of(name: str) -> Claim:
    """The claim of that name."""
    return next(claim for claim in CLAIMS if claim.name == name)
