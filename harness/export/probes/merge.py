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
import filecmp
import math
import sys
from pathlib import Path
from typing import Any

from forge.training.config.workload import Workload
from forge.training.system.files import read_json_object
from forge.training.train.record import completed_record
from harness.export.answers import MergeAnswer
from harness.export.probes.models_under_test import add_run, expected_run, merged_model, stated_merge
from harness.measurement.probe_main import probe_main

# Half a unit in the last place, relative: 2^-p for p significant bits.
_ROUNDOFF = {"torch.bfloat16": 2.0**-8, "torch.float16": 2.0**-11, "torch.float32": 2.0**-24}
# The merge adds in float32 what is exact here; products of a few hundred terms lose at most this much of their size.
_ACCUMULATION = 2.0**-20
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def check_merge(run_dir: Path) -> MergeAnswer:
    """The comparison described above. Raises :class:`DataError` where files are missing."""
    import torch
    from safetensors.torch import load_file

    run = completed_record(run_dir)
    lora = Workload.model_validate(run.workload).lora
    scale = _scale(lora.alpha, lora.rank, lora.use_rslora)
    stated = read_json_object(run_dir / "adapter" / "adapter_config.json")
    adapter = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    base_dir = Path(run.base_path)
    num_changed = num_same = 0
    differing: list[str] = []
    worst: dict[str, Any] = {"tensor": None, "error_in_tolerances": 0.0}
    inner = squares = error_squares = 0.0
    with merged_model(run, run_dir, stated_merge(run_dir / "export" / "any.gguf")) as merged_dir:
        names = [name for name in _COMPANIONS if (base_dir / name).is_file()]
        _, differing_files, missing_files = filecmp.cmpfiles(base_dir, merged_dir, names, shallow=False)
        base, merged = _open_tensors(base_dir), _open_tensors(merged_dir)
        for name in sorted(base.keys() & merged.keys()):
            before, after = base[name].get_tensor(name), merged[name].get_tensor(name)
            prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            a, b = adapter.get(f"{prefix}A.weight"), adapter.get(f"{prefix}B.weight")
            if a is None or b is None:
                num_same += 1
                same = before.dtype == after.dtype and torch.equal(before.view(torch.uint8), after.view(torch.uint8))
                differing += [] if same else [name]
                continue
            num_changed += 1
            ratio, *terms = _compare(before, after, a.double(), b.double(), scale)
            inner, squares, error_squares = inner + terms[0], squares + terms[1], error_squares + terms[2]
            if not ratio <= worst["error_in_tolerances"]:
                worst = {"tensor": name, "error_in_tolerances": ratio if math.isfinite(ratio) else 1e30}
    return {
        "run": {"adapter_sha256": run.adapter_sha256},
        "scale": scale,
        "adapter_states_scale": _scale(stated["lora_alpha"], stated["r"], bool(stated.get("use_rslora"))),
        "differing_files": differing_files + missing_files,
        "num_changed_tensors": num_changed,
        "num_adapter_pairs": sum(name.endswith(".lora_A.weight") for name in adapter),
        "num_same_tensors": num_same,
        "differing_tensors": differing,
        "missing_tensors": sorted(base.keys() ^ merged.keys()),
        "fitted_scale": inner / squares if squares else None,
        "worst": worst,
        "rounding_share_of_change": math.sqrt(error_squares / squares) / abs(scale) if squares else None,
    }


def _compare(before: Any, after: Any, a: Any, b: Any, scale: float) -> tuple[float, float, float, float]:
    """A changed tensor's largest error / what rounding allows there; sums of (after - before) B A, (B A)^2, error^2."""
    change = b @ a
    exact = before.double() + scale * change
    size = before.double().abs() + abs(scale) * (b.abs() @ a.abs())
    allowed = _ROUNDOFF[str(before.dtype)] * exact.abs() + _ACCUMULATION * size + 1e-30
    error = after.double() - exact
    ratio = float((error.abs() / allowed).max()) if after.dtype == before.dtype else math.inf
    moved = after.double() - before.double()
    return ratio, float((moved * change).sum()), float((change * change).sum()), float((error * error).sum())


def _scale(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _open_tensors(directory: Path) -> dict[str, Any]:
    """Tensor name -> the open file that it is in."""
    from safetensors import safe_open

    files = [safe_open(path, framework="pt") for path in sorted(directory.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - a file is no dictionary


def main() -> int:
    """Print the answer as JSON."""
    parser = argparse.ArgumentParser(prog="harness.export.probes.merge", description=__doc__.splitlines()[0])
    add_run(parser)
    return probe_main(parser, lambda options: check_merge(expected_run(options)))


if __name__ == "__main__":
    sys.exit(main())
