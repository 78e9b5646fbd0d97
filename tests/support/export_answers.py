"""The export suite's session, answers of its probes, verdicts on them, and faults planted in GGUF files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from harness.export.claims import KINDS, claim_of
from harness.measurement.results import RunSpec, Store
from harness.session import Session
from harness.verdict import Verdict

SPEC = RunSpec(backend="trl", workload="smoke", overrides=("data.validation_share=0.45",))


def make_session(directory: Path, **settings: object) -> Session:
    """A session whose store is below ``directory``; nothing here trains on its documents."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "train.jsonl").touch()
    return Session(Store(directory / "store"), directory / "train.jsonl", **settings)  # type: ignore[arg-type]


def verdict_on(answer: Any, claim: str) -> Verdict:
    """The verdict on a claim, by the bars of the gate."""
    return claim_of(claim).verdict(answer)


def assert_red(answer: Any, claim: str, because: str) -> None:
    """The claim is a FAIL, for a reason that ``because`` matches."""
    verdict = verdict_on(answer, claim)
    assert verdict.status == "FAIL", verdict.reason
    assert re.search(because, verdict.reason), verdict.reason


def divergence(run_dir: Path, *files: Path) -> Any:
    """What the probe `divergence` answers about three documents."""
    from harness.export.probes.divergence import measure_divergence

    return measure_divergence(run_dir, files, num_documents=3)


def divergence_answer(mean: float, error: float | None, num_documents: int = 10) -> dict[str, Any]:
    """What the probe `divergence` answers, with the same figures for all pairs and steps, three files among them."""
    pairs = [("adapter", "base"), ("adapter", "merged"), *(("merged", kind) for kind in KINDS)]
    return {
        "held_out": {"num_documents": num_documents},
        "base": {},
        "four_bit": None,
        "files": {kind: {"fallbacks": [], "file_type": kind} for kind in KINDS},
        "pairs": [
            {"reference": reference, "subject": subject, "mean_kl_nats": mean, "standard_error_nats": error}
            for reference, subject in pairs
        ],
        "chain": [
            {
                "subject": subject,
                "nats_per_token": 3.0,
                "change_nats_per_token": mean,
                "standard_error_nats_per_token": error,
            }
            for subject in ["base", "adapter", "merged", *KINDS]
        ],
    }


def file_of(run_dir: Path, kind: str) -> Path:
    """A GGUF file of the demo's export."""
    return run_dir / "export" / f"smoke.{kind}.gguf"


def patched(source: Path, target: Path, *changes: tuple[bytes, bytes]) -> Path:
    """A copy of a file with bytes replaced by as many others."""
    content = source.read_bytes()
    for old, new in changes:
        assert len(old) == len(new)
        assert content.count(old) == 1, (old, content.count(old))
        content = content.replace(old, new)
    target.write_bytes(content)
    return target


def entry(key: str, kind: int, value: bytes) -> bytes:
    """A metadata entry of a GGUF file: key, type, value."""
    return key.encode() + kind.to_bytes(4, "little") + value


def number(value: int) -> bytes:
    """An unsigned 32-bit number as GGUF has it."""
    return value.to_bytes(4, "little")
