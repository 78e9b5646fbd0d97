"""Claim: with an importance matrix the file that predicts more like the adapter is kept, and both KL are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.training.export import gguf
from forge.training.export.export import export_run
from forge.training.system.errors import ConfigurationError, DataError
from tests.support.gguf_faults import rewrite, stale_merge
from tests.support.tiny_model import shared_base
from tests.support.tiny_run import add_training_examples, made_up_run


def test_types_that_need_one_are_refused_without_it(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run")
    with pytest.raises(ConfigurationError, match="iq2_xs cannot be made without an importance matrix"):
        export_run(run, quantizations=["f16", "iq2_xs"])


@pytest.mark.slow
def test_both_are_measured_and_the_nearer_is_kept(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run")
    with pytest.raises(DataError, match="holds no training examples"):
        export_run(run, quantizations=["q4_0"], imatrix=True)
    add_training_examples(run, shared_base())
    made = export_run(run, quantizations=["q8_0", "q4_0", "iq2_xs"], imatrix=True)
    q8, q4, iq2 = (report.proof for report in made.files)
    assert q8 is not None
    assert q4 is not None
    assert iq2 is not None
    assert q4.text == "training documents (nothing was held out)"
    assert (q8.uses_imatrix, q8.other_way) == (False, None)  # the quantiser ignores it for q8_0
    assert (iq2.uses_imatrix, iq2.other_way) == (True, None)  # it cannot be made without
    assert q4.other_way is not None
    assert q4.predictions is not None
    assert q4.predictions.mean_kl <= q4.other_way.mean_kl
    if q4.uses_imatrix:
        assert f"({q4.other_way.mean_kl:.1e} without imatrix)" in (run / "export" / "README.md").read_text()
    else:
        assert any("the importance matrix does not help" in note for note in made.notes)
    assert made.imatrix is not None
    assert made.imatrix["num_matrices"] == 15
    assert {path.suffix for path in (run / "export").iterdir()} == {".gguf", ".json", ".md", ""}


@pytest.mark.slow
def test_a_matrix_that_spoils_the_file_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SmolLM2 a matrix made q5_k_m so much worse that it was refused, and the good file with it."""
    run, quantize = made_up_run(tmp_path / "run"), gguf.quantize
    add_training_examples(run, shared_base())

    def spoilt(source: Path, target: Path, kind: str, *, imatrix: Path | None = None) -> object:
        if imatrix is not None:
            rewrite(source, tmp_path / "spoilt.gguf", stale_merge)
            source = tmp_path / "spoilt.gguf"
        return quantize(source, target, kind, imatrix=imatrix)

    monkeypatch.setattr(gguf, "quantize", spoilt)
    monkeypatch.setattr("forge.training.export.proof.Proof.limits", lambda proof, kind: (0.02, 0.1))
    made = export_run(run, quantizations=["q5_1"], imatrix=True)
    (report,) = made.files
    assert report.proof is not None
    assert report.proof.predictions is not None
    assert report.proof.other_way is not None
    assert report.proof.uses_imatrix is False
    assert report.proof.predictions.mean_kl < 0.02 < 0.1 < report.proof.other_way.mean_kl
    assert any("the importance matrix does not help" in note for note in made.notes)
