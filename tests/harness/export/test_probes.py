"""The suite's probes as commands, and what they are made of: awkward strings and Go's templates."""

from __future__ import annotations

import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from forge.training.export.awkward_text import awkward_strings
from forge.training.export.modelfile import chatml_template
from forge.training.system.environment import ROOT
from forge.training.system.errors import CheckError
from harness.export.probes.go_template import render_chat
from harness.export.suite import PROBES
from tests.support.export_answers import file_of


def ask(probe: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"harness.export.probes.{probe}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_probe_says_what_is_wrong_in_one_line(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(file_of(run_dir, "f16").read_bytes()[:30_000])
    for probe in ("divergence", "tokens"):
        done = ask(probe, str(run_dir), "--gguf", str(tmp_path / "bad.gguf"))
        assert done.returncode == 8, done.stderr
        assert "Traceback" not in done.stderr.split("error:")[-1]
    done = ask("provenance", str(tmp_path))
    assert (done.returncode, "is not a run" in done.stderr) == (3, True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("probe", PROBES)
def test_a_run_with_another_adapter_than_expected_is_exit_code_2_from_every_probe(run_dir: Path, probe: str) -> None:
    options = ("--gguf", "x") if probe in ("divergence", "tokens") else ()
    done = ask(probe, str(run_dir), *options, "--expect", "0" * 64)
    assert (done.returncode, "000000000000" in done.stderr) == (2, True), done.stderr


def test_the_awkward_strings_are_many_the_same_each_time_and_of_every_kind() -> None:
    control = ["<|im_start|>", "<|im_end|>"]
    strings = awkward_strings(control)
    assert strings == awkward_strings(control)
    assert sum(map(len, strings.values())) > 350
    text = "".join("".join(texts) for texts in strings.values())
    seen = {unicodedata.category(character) for character in text}
    assert len(seen) >= 28  # all but unassigned and surrogates
    assert all(unicodedata.is_normalized("NFC", mixture) for mixture in strings["mixtures"])
    assert sum(not unicodedata.is_normalized("NFC", one) for one in strings["not in NFC"]) >= 14


TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\n"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ .System }}|", "s|"),
        ("a {{- .System -}} \n b", "asb"),
        ("{{ if .System }}yes{{ end }}{{ if not .System }}no{{ .Absent }}{{ end }}", "yes"),
        ("{{ range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}.", "<system>s<user>a\n<assistant>b."),
        ("{{ range .Messages }}{{ if .Content }}x{{ end }}{{ end }}", "xxx"),
    ],
)
def test_go_templates_are_rendered_by_gos_rules(template: str, text: str) -> None:
    assert render_chat(template, TALK) == text


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ .Absent }}", "asks for .Absent"),
        ("{{ if .System }}x", "lacks an"),
        ("{{ end }}", "too many"),
        ("{{ if .System }}x{{ else }}y{{ end }}", "more than Forge renders"),
        ("{{ len .Messages }}", "more than Forge renders"),
        ("{{ range $i, $m := .Messages }}{{ end }}", "more than Forge renders"),
    ],
)
def test_what_go_templates_can_do_beyond_that_is_refused_and_never_guessed(template: str, complaint: str) -> None:
    with pytest.raises(CheckError, match=re.escape(complaint)):
        render_chat(template, TALK)


def test_the_modelfiles_template_is_chatml_with_and_without_a_default_system_message() -> None:
    opening = "<|im_start|>system\nBe kind.<|im_end|>\n"
    asked = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    user = [{"role": "user", "content": "a"}]
    assert render_chat(chatml_template("Be kind."), user) == opening + asked
    assert render_chat(chatml_template(None), user) == asked
    system = [{"role": "system", "content": "Be brief."}, *user]
    assert render_chat(chatml_template("Be kind."), system) == opening.replace("kind", "brief") + asked
