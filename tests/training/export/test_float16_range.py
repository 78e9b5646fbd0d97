"""Claims about weights that float16 cannot hold: known before training, and shipped all the same."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from forge.training.checks.model import check_export
from forge.training.config.workload import Workload
from forge.training.export import disk_space
from forge.training.export.export import export_run
from forge.training.models.digests import base_sha256, largest_weight
from forge.training.models.weights import largest_magnitude, read_weights
from forge.training.system.errors import ConfigurationError, DataError
from forge.training.system.files import sha256_file, sha256_json
from tests.support.tiny_model import shared_adapter, shared_base
from tests.support.tiny_run import write_run

NAME = "model.layers.1.mlp.up_proj.weight"


def base_with(value: float, directory: Path) -> Path:
    """A copy of the shared base, one of whose weights is another."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(shared_base(), directory)
    path = next(path for path in directory.glob("*.safetensors") if NAME in load_file(path))
    tensors = load_file(path)
    tensors[NAME][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_with(-1e5, tmp_path_factory.mktemp("large") / "base")


def run_on(base: Path, run_dir: Path) -> Path:
    shutil.copytree(shared_adapter(), run_dir / "adapter")
    write_run(run_dir, base)
    return run_dir


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("values", [[0.0], [1.0, -3.5, 2.0], [-math.inf, 1.0], [1.0, math.nan, math.inf], []])
def test_the_largest_magnitude_is_found_in_the_bits(dtype: str, values: list[float]) -> None:
    if dtype == "BF16":
        raw = (np.asarray(values, dtype="<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        raw = np.asarray(values, dtype={"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    wanted = max((abs(value) for value in values), default=0.0)
    found = largest_magnitude(raw, dtype)
    assert math.isnan(found) if any(map(math.isnan, values)) else found == wanted


def test_the_weights_are_read_once_for_their_digest_and_their_largest(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge.training.models import digests

    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    files = sorted(large.glob("*.safetensors"))
    assert base_sha256(large) == sha256_json({path.name: sha256_file(path) for path in files})
    monkeypatch.setattr(digests, "read_whole", None)
    found = largest_weight(large)
    assert (found.tensor, found.file.parent) == (NAME, large)
    assert found.value == pytest.approx(1e5, rel=0.01)  # bfloat16


def test_check_says_that_f16_cannot_hold_it_and_what_is_taken_for_the_others(large: Path) -> None:
    def findings(*quantizations: str) -> list[tuple[str, str]]:
        export = {"quantizations": list(quantizations)}
        workload = Workload.model_validate({"name": "x", "data": {"documents": "embedded"}, "export": export})
        return [(finding.level, finding.message) for finding in check_export(workload, read_weights(large))]

    ((level, message),) = findings("q8_0", "f16")
    assert level == "error"
    for part in (NAME, "99840", "65504", str(large)):
        assert part in message
    ((level, message),) = findings("q8_0", "bf16")
    assert level == "ok"
    assert "from bf16" in message


@pytest.mark.slow
def test_such_a_base_is_exported_by_way_of_bf16_and_one_more_is_made_from_it(large: Path, tmp_path: Path) -> None:
    run = run_on(large, tmp_path / "run")
    with pytest.raises(ConfigurationError, match=f"f16 cannot hold {NAME}"):
        export_run(run, quantizations=["q8_0", "f16"])
    assert not (run / "export").exists()
    record = export_run(run, quantizations=["bf16"])
    assert [report.file_type for report in record.files] == ["bf16"]
    # its random adapter moves such weights by less than bfloat16 can hold
    assert record.merge_proof["base type"]["mean_kl"] > 1e-3 > 10 * record.merge_proof["float32"]["mean_kl"]
    more = export_run(run, quantizations=["q8_0"])
    assert more.quantized_from == "f32"
    assert [step.name for step in more.steps if step.name.startswith(("quantise", "convert"))] == [
        *("convert f32", "quantise q8_0")
    ]


def test_a_weight_that_is_no_number_is_refused_with_its_place(tmp_path: Path) -> None:
    base = base_with(math.nan, tmp_path / "base")
    with pytest.raises(DataError, match=f"{NAME} holds nan"):
        disk_space.check_range(read_weights(base), ["q8_0"])
