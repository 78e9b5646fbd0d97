"""What an export must keep: each claim with its statement, the probe that is asked, its bars and its judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from harness.export import contents, predictions
from harness.export.answers import Judged
from harness.stats import CONFIDENCE, LOSS_MARGIN_NATS
from harness.verdict import Verdict

# Mean KL(merged weights in float32 || file) in nats per predicted token, on held-out text of a trained base.
# For scale: 8B models have 2.4e-4 at q8_0 and 0.03 at q4_k_m (llama.cpp's tables), the tiny base 2e-4 and 0.015.
# f16 is llama.cpp's rounding of activations, not the file: 1.5e-7 on the tiny base, where an f32 file has 7e-12.
# It grows with depth and width, so that on a large model the bar may say more of llama.cpp than of the export.
KL_BARS = {"f16": 1e-6, "q8_0": 1e-3, "q4_k_m": 0.05}
KINDS = tuple(KL_BARS)  # the GGUF types that this suite makes, in this order; greedy text and tokens are the first's


@dataclass(frozen=True)
class Claim:
    """One thing that an export must keep. ``judge`` is given the answer of ``probe`` and the ``bars`` by name."""

    name: str
    statement: str
    probe: str
    judge: Callable[..., Judged]
    bars: Mapping[str, float] = field(default_factory=dict)

    def verdict(self, answer: Any) -> Verdict:
        """The verdict on what the probe answers, which is as answers.py describes it."""
        status, reason, figures = self.judge(answer, **self.bars)
        return Verdict(name=self.name, statement=self.statement, status=status, reason=reason, figures=figures)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="merge",
        statement="Merged weights are base + scale B A, rounded once; every other tensor is the same bytes.",
        probe="merge",
        judge=contents.judge_merge,
        bars={"scale_tolerance": 1e-3, "most_rounding": 1.0},  # a merge by 1% too much is ten times that tolerance
    ),
    Claim(
        name="merged_against_adapter",
        statement="The merged weights predict what the adapter on the original 16-bit base predicts.",
        probe="divergence",
        judge=predictions.judge_merged_against_adapter,
        bars={
            # Merging rounds every changed weight to 16 bits: it may lose no more than the finest quantisation does.
            "mean_kl_nats": KL_BARS["q8_0"],
            "loss_margin_nats": LOSS_MARGIN_NATS,
            "least_effect": 100.0,
            "confidence": CONFIDENCE,
        },
    ),
    *(
        Claim(
            name=f"divergence_{kind}",
            statement=f"The {kind} file predicts what the merged weights predict: mean KL below {bar:g} nats.",
            probe="divergence",
            judge=partial(predictions.judge_file, kind=kind),
            bars={"mean_kl_nats": bar, "confidence": CONFIDENCE},
        )
        for kind, bar in KL_BARS.items()
    ),
    Claim(
        name="chain",
        statement="From base to the smallest file the held-out loss is known, and the adapter improved it.",
        probe="divergence",
        judge=predictions.judge_chain,
        bars={"confidence": CONFIDENCE},
    ),
    Claim(
        name="greedy",
        statement="Greedy answers of the f16 file are those of the merged weights, token by token.",
        probe="divergence",
        judge=predictions.judge_greedy,
    ),
    Claim(
        name="lora_route",
        statement="Base and LoRA as GGUF files of their own predict what the merged model predicts.",
        probe="divergence",
        judge=predictions.judge_lora_route,
        bars={
            "to_adapter_kl_nats": KL_BARS["f16"],  # the same numbers in float32, but for llama.cpp's float16 products
            "to_merged_kl_nats": KL_BARS["q8_0"],
            "confidence": CONFIDENCE,
        },
    ),
    Claim(
        name="tokens",
        statement="llama.cpp reads text as the tokenizer does, composed text (NFC) provided.",
        probe="tokens",
        judge=contents.judge_tokens,
        bars={"least_strings": 200},
    ),
    Claim(
        name="template",
        statement="The chat template in the file gives the tokenizer's text and ids.",
        probe="tokens",
        judge=contents.judge_template,
    ),
    Claim(
        name="specials",
        statement="BOS, EOS and padding are the tokenizer's.",
        probe="tokens",
        judge=contents.judge_specials,
    ),
    Claim(
        name="modelfile",
        statement="The Modelfile is valid and its template renders the tokenizer's text.",
        probe="tokens",
        judge=contents.judge_modelfile,
    ),
    Claim(
        name="provenance",
        statement="Each artefact, from corpus to GGUF, is by its SHA-256 what the records say.",
        probe="provenance",
        judge=contents.judge_provenance,
    ),
)


def claim_of(name: str) -> Claim:
    """The claim of that name."""
    return next(claim for claim in CLAIMS if claim.name == name)
