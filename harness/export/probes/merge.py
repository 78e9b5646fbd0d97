"""Are the merged weights the base's plus scale B A, and nothing else?

    python -m harness.export.probes.merge RUN [--expect SHA256]

Computed again in float64 with the safetensors library and the scale that the run's *workload* asks for, not the one in
the adapter's own configuration, which the merge reads. Every changed number must be the exact sum, rounded once to the
weights' type. A small error of the scale hides below that rounding in each single number, so the scale is also fitted
over all of them. Every other tensor and every other file of the model must be the same bytes. The keys of the JSON are
in harness/export/answers.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from forge.training.config.workload import Workload
from forge.training.system.errors import DataError
from forge.training.train.record import RunRecord, completed_record
from harness.export.answers import MergeAnswer, MergedTensors, WorstTensor
from harness.export.probes.models_under_test import add_run, expected_run, merged_model, stated_merge
from harness.measurement.probe_main import probe_main

# Half a unit in the last place, relative: 2^-p for p significant bits.
_ROUNDOFF = {"torch.bfloat16": 2.0**-8, "torch.float16": 2.0**-11, "torch.float32": 2.0**-24}
# The merge adds in float32 what is exact here; products of a few hundred terms lose at most this much of their size.
_ACCUMULATION = 2.0**-20
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def check_merge(run_dir: Path) -> MergeAnswer:
    """The comparison described above. Raises :class:`DataError` where files are missing."""
    from safetensors.torch import load_file

    run = completed_record(run_dir)
    base_dir = Path(run.base_path)
    scale, stated_scale = _scales(run, run_dir)
    adapter = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    with merged_model(run, run_dir, stated_merge(run_dir / "export" / "any.gguf")) as merged_dir:
        differing_files = [
            name
            for name in _COMPANIONS
            if (base_dir / name).is_file()
            and (base_dir / name).read_bytes()
            != ((merged_dir / name).read_bytes() if (merged_dir / name).is_file() else b"")
        ]
        tensors = _compare(_tensor_files(base_dir), _tensor_files(merged_dir), adapter, scale)
    return {
        "run": {"adapter_sha256": run.adapter_sha256},
        "scale": scale,
        "adapter_states_scale": stated_scale,
        "differing_files": differing_files,
        **tensors,
    }


def _scales(run: RunRecord, run_dir: Path) -> tuple[float, float]:
    """What the workload asks for, and what the adapter's own configuration says."""

    def scale(alpha: float, rank: int, rslora: bool) -> float:
        return alpha / math.sqrt(rank) if rslora else alpha / rank

    lora = Workload.model_validate(run.workload).lora
    try:
        written = json.loads((run_dir / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{run_dir / 'adapter'} has no readable adapter_config.json: {error}") from error
    return (
        scale(lora.alpha, lora.rank, lora.use_rslora),
        scale(written["lora_alpha"], written["r"], bool(written.get("use_rslora"))),
    )


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file it is in."""
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as source:
            files |= dict.fromkeys(source.keys(), path)
    return files


def _read(path: Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as source:
        return source.get_tensor(name)


def _compare(base: dict[str, Path], merged: dict[str, Path], adapter: dict[str, Any], scale: float) -> MergedTensors:
    import torch

    num_changed = num_same = 0
    differing: list[str] = []
    worst: WorstTensor = {"tensor": None, "error_in_tolerances": 0.0}
    inner = squares = error_squares = 0.0
    for name in sorted(base):
        if name not in merged:
            continue
        before, after = _read(base[name], name), _read(merged[name], name)
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        a, b = adapter.get(f"{prefix}A.weight"), adapter.get(f"{prefix}B.weight")
        if a is None or b is None:
            num_same += 1
            same = before.dtype == after.dtype and torch.equal(before.view(torch.uint8), after.view(torch.uint8))
            differing += [] if same else [name]
            continue
        num_changed += 1
        change = b.double() @ a.double()
        exact = before.double() + scale * change
        size = before.double().abs() + abs(scale) * (b.double().abs() @ a.double().abs())
        allowed = _ROUNDOFF[str(before.dtype)] * exact.abs() + _ACCUMULATION * size + 1e-30
        error = after.double() - exact
        ratio = float((error.abs() / allowed).max()) if after.dtype == before.dtype else math.inf
        if not ratio <= worst["error_in_tolerances"]:
            worst = {"tensor": name, "error_in_tolerances": ratio if math.isfinite(ratio) else 1e30}
        inner += float(((after.double() - before.double()) * change).sum())
        squares += float((change * change).sum())
        error_squares += float((error * error).sum())
    num_pairs = sum(name.endswith(".lora_A.weight") for name in adapter)
    return {
        "num_changed_tensors": num_changed,
        "num_adapter_pairs": num_pairs,
        "num_same_tensors": num_same,
        "differing_tensors": differing,
        "missing_tensors": sorted(set(base) ^ set(merged)),
        "fitted_scale": inner / squares if squares else None,
        "worst": worst,
        "rounding_share_of_change": math.sqrt(error_squares / squares) / abs(scale) if squares else None,
    }


def main() -> int:
    """Print the answer as JSON."""
    parser = argparse.ArgumentParser(prog="harness.export.probes.merge", description=__doc__.splitlines()[0])
    add_run(parser)
    return probe_main(parser, lambda options: check_merge(expected_run(options)))


if __name__ == "__main__":
    sys.exit(main())
