"""The claims about an export, as data: which probe is asked, and who judges its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from harness.export import contents, predictions
from harness.export.findings import Finding
from harness.export.statements import BARS


@dataclass(frozen=True)
class Claim:
    """One thing that an export must keep. ``probe``: whose answer ``judge`` takes."""

    name: str
    probe: str
    judge: Callable[[Mapping[str, Any]], Finding]


CLAIMS: tuple[Claim, ...] = (
    Claim("merge", "merge", contents.judge_merge),
    Claim("merged_against_adapter", "divergence", predictions.judge_merged_against_adapter),
    *(Claim(f"divergence_{kind}", "divergence", partial(predictions.judge_file, kind=kind)) for kind in BARS),
    Claim("chain", "divergence", predictions.judge_chain),
    Claim("greedy", "divergence", predictions.judge_greedy),
    Claim("lora_route", "divergence", predictions.judge_lora_route),
    Claim("tokens", "tokens", contents.judge_tokens),
    Claim("template", "tokens", contents.judge_template),
    Claim("specials", "tokens", contents.judge_specials),
    Claim("modelfile", "tokens", contents.judge_modelfile),
    Claim("lineage", "provenance", contents.judge_lineage),
)
