"""What each GGUF type of a run loses: Forge's own figures put together; a type that is refused does not stop others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from forge.training.system.environment import ROOT

sys.path.insert(0, str(ROOT / "scripts" / "lab"))

import quantizations

from tests.support.tiny_model import shared_base
from tests.support.tiny_run import add_training_examples, made_up_run

# forge, whose limit for q4_0 no file can keep
STRICT = """
import sys
from dataclasses import replace
from forge.training.config.quantizations import GGUF_TYPES
GGUF_TYPES["q4_0"] = replace(GGUF_TYPES["q4_0"], refused_kl=1e-12)
from forge.training.cli import main
sys.argv[0] = "forge"
main()
"""


@pytest.mark.slow
def test_types_are_measured_both_ways_and_a_refused_one_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = made_up_run(tmp_path / "run"), tmp_path / "out.json"
    add_training_examples(run, shared_base())
    monkeypatch.setattr(quantizations, "FORGE", (sys.executable, "-c", STRICT))
    given = [str(run), str(out), "--types", "f16,q4_0,q8_0,iq4_nl,iq2_xs", "--at-once", "4"]
    assert quantizations.main(given) == 8
    record = json.loads(out.read_text())
    rows = record["types"]
    assert [rows[name]["verdict"] for name in ("f16", "q8_0", "iq4_nl", "iq2_xs")] == ["good"] * 4
    assert rows["q4_0"]["verdict"] == "refused"
    assert "lighthouse.q4_0.gguf: predictions: mean KL" in rows["q4_0"]["error"]
    assert [done["types"] for done in record["exports"]] == [
        ["f16", "q4_0", "q8_0", "iq4_nl"],
        ["f16", "q8_0", "iq4_nl", "iq2_xs"],
    ]
    kl = {name: rows[name]["without_imatrix"]["mean_kl"] for name in ("f16", "q8_0", "iq4_nl")}
    assert kl["f16"] < kl["q8_0"] < kl["iq4_nl"] < rows["iq2_xs"]["with_imatrix"]["mean_kl"]
    assert rows["iq4_nl"]["with_imatrix"]["mean_kl"] != kl["iq4_nl"]
    assert (rows["q8_0"]["with_imatrix"], rows["iq2_xs"]["without_imatrix"]) == (None, None)
    assert rows["f16"]["num_bytes"] > rows["q8_0"]["num_bytes"] > rows["iq4_nl"]["num_bytes"]
    whole = record["exports"][-1]
    assert whole["peak_tree_rss_bytes"] > whole["peak_rss_bytes"] > 100e6
    assert record["imatrix"]["num_matrices"] == 15
    assert str(tmp_path) not in out.read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert quantizations.table(record) in capsys.readouterr().out
    assert "| q4_0 (refused) |" in quantizations.table(record)


def test_what_cannot_be_measured_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = made_up_run(tmp_path / "run"), tmp_path / "out.json"
    assert quantizations.main([str(run), str(out), "--types", "q9_9"]) == 2
    assert quantizations.main([str(run), str(out), "--types", "iq2_xs", "--imatrix", "none"]) == 2
    assert quantizations.main([str(tmp_path), str(out)]) == 3
    assert quantizations.main([str(run), str(out), "--types", "q4_0", "--base", str(tmp_path / "gone")]) != 0
    assert not out.exists()
    assert capsys.readouterr().err.count("error: ") == 4


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("demo.q4_0.gguf: predictions: mean KL 1; a good q4_0 file stays below 0.6", "q4_0"),
        ("cannot quantise demo.f16.gguf to iq2_xs: missing importance matrix\n  | converting to q4_0", "iq2_xs"),
        ("the model does not fit", None),
    ],
)
def test_the_type_that_an_error_speaks_of(line: str, found: str | None) -> None:
    assert quantizations.refused_type(line, ["f16", "q4_0", "iq2_xs"]) == found
