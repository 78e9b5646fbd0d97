"""The README's figures are those of the record that it names, and its commands exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from forge.training.cli import app
from forge.training.system.environment import ROOT
from harness.export import claims as export
from harness.parity.claims import MARGIN_NATS
from harness.perf.claims import CLAIMS

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORD = ROOT / "docs" / "results" / "2026-11-25-h200-gate"  # the one record that a test reads: the README's own
DOCUMENTS = 8 * 8  # of the timed steps
GIB = 2**30


@cache
def entries() -> list[dict[str, Any]]:
    content: dict[str, Any] = json.loads((RECORD / "benchmark.json").read_text(encoding="utf-8"))
    return [{**entry["extra_info"], "samples": entry["stats"]["data"]} for entry in content["benchmarks"]]


def verdict(name: str) -> dict[str, Any]:
    verdicts = [entry["verdict"] for entry in entries() if entry.get("verdict")]
    return next(v for v in verdicts if name in ((v.get("claim") or {}).get("name"), v.get("name")))


def samples(arm: str, metric: str) -> list[float]:
    found = (e for e in entries() if (e.get("arm"), e.get("workload")) == (arm, "genome_full"))
    values: list[float] = next(e["samples"] for e in found if e.get("metric") == metric)
    return values


def gib(arm: str) -> str:
    return f"{max(samples(arm, 'peak_allocated_bytes')) / GIB:.1f}"


def measured() -> list[str]:
    """Every phrase with a figure, as the record has it."""
    short, whole, memory = (verdict(n) for n in ("legacy_256_speed", "genome_full_speed", "genome_full_peak_allocated"))
    outcome, q8 = verdict("outcome")["figures"], verdict("divergence_q8_0")["figures"]["pair"]
    both, stock = outcome["equivalence"], outcome["no_worse_than_stock"]
    speeds = sorted(DOCUMENTS / seconds for seconds in samples("unsloth", "measured_seconds"))
    (trl,) = (DOCUMENTS / seconds for seconds in samples("trl", "measured_seconds"))
    report = (RECORD / "report.md").read_text(encoding="utf-8")
    fastest = re.findall(r"\| unsloth against legacy fastest layout \| [^|]+ \| ([\d.]+)×", report)
    assert len(fastest) == 2
    return [
        f"{max(fastest)} and {min(fastest)} times as fast",
        f"{short['estimate']:.2f}x (95% interval {short['low']:.2f} to {short['high']:.2f})",
        f"{whole['estimate']:.2f}x ({whole['low']:.2f} to {whole['high']:.2f})",
        f"{memory['estimate']:.1%} ({gib('unsloth')} of {gib('legacy')} GiB)",
        f"{both['mean']:+.4f} nats per token (90%: {both['low']:.4f} to {both['high']:+.4f})",
        f"{stock['mean']:.4f} nats per token",
        f"{q8['mean_kl_nats']:.1e} nats".replace("e-0", "e-"),
        f"{trl:.2f} documents/s at {gib('trl')} GiB; Forge {speeds[0]:.2f} to {speeds[-1]:.2f} at {gib('unsloth')} GiB",
    ]


def bars() -> list[str]:
    by_name = {claim.name: claim for claim in CLAIMS}
    return [
        f"at least {by_name['legacy_256_speed'].bar:g}x",
        f"at least {by_name['genome_full_speed'].bar:g}x",
        f"at most {by_name['genome_full_peak_allocated'].bar:.0%}",
        f"within {MARGIN_NATS:g}",
        f"below {export.KL_BARS['q8_0']:.0e}".replace("e-0", "e-"),
    ]


def section(title: str) -> str:
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_every_figure_of_the_results_is_the_records() -> None:
    text = section("What it gains").replace("\n", " ")
    for phrase in [*measured(), *bars()]:
        assert phrase in text, phrase
        text = text.replace(phrase, "", 1)
    assert verdict("genome_full_speed")["status"] == verdict("outcome")["status"] == "PASS"
    left = re.sub(r"\]\([^)]*\)|H200|7B|exit code 0|Qwen2|float32|q8_0|8 GB|256 tokens|32,768 tokens", "", text)
    assert not re.findall(r"\d[\d.,]*", left), "a figure without a record"


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 115


def blocks(text: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def test_the_environment_is_activated_before_forge_is_called() -> None:
    lines = "".join(blocks(README)).splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("forge "))
    assert any(line.startswith("source .venv/bin/activate") for line in lines[:first])


@pytest.mark.slow
def test_ones_own_documents_work_as_they_are_typed(tmp_path: Path) -> None:
    for n, part in enumerate(("hemp", "tar", "the wheel", "the sledge", "twine", "the yarn house", "the top", "oakum")):
        text = (
            f"# Of {part}\n\nIn the ropewalk {part} is kept in bay {n + 3}. The foreman there is called Agathe {n}.\n"
        )
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / f"{n}.md").write_text(text)
    (block,) = blocks(section("Your own documents"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    typed = ["bash", "-e", "-c", block]
    done = subprocess.run(
        typed, cwd=tmp_path, env=environment, input="Who is the foreman?\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name in block
    assert list((run_dir / "export").glob("*.gguf"))
    corpus = next(run_dir.rglob("corpus*.jsonl")).read_text()
    assert "Agathe" in corpus
    assert "Sanctuary" not in corpus + done.stdout + done.stderr + (run_dir / "export" / "Modelfile").read_text()
    assert f"run directory: runs/{run_dir.name}" in done.stderr
    assert "Agathe" in done.stdout, "the preview"
    assert list((tmp_path / "runs" / run_dir.name).glob("tensorboard/**/events.*")), "as the README says"
    said = (done.stdout + done.stderr).replace(f"are free in {tmp_path}\n", "")
    assert str(tmp_path) not in said, "paths as they were typed"
    modelfile = re.findall(r"ollama create docs -f (\S+)`", section("Your own documents"))
    assert [(tmp_path / path).is_file() for path in modelfile] == [True]
    assert {"report_to", "training.early_stopping_patience"} <= set(re.findall(r"`([\w.]+)[`:]", README))


def commands(text: str) -> list[list[str]]:
    """The command lines of a page, in blocks and inline."""
    lines = [line.partition("#")[0].strip() for line in "\n".join(blocks(text)).splitlines()]
    lines += [inline.replace("\\|", "|") for inline in re.findall(r"`(forge [^`\n]+)`", text)]
    return [shlex.split(line) for line in lines if line.startswith("forge ")]


@pytest.mark.parametrize(
    "page", ["README.md", "docs/commands.md", "docs/migration.md", "docs/inputs.md", "docs/export.md"]
)
def test_every_command_and_option_that_is_named_exists(page: str) -> None:
    known: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    text = (ROOT / page).read_text(encoding="utf-8")
    for words in commands(text):
        if words[1].isupper() or words[1].startswith("-"):
            continue
        assert words[1] in known, words
        options = {option for parameter in known[words[1]].params for option in parameter.opts}
        assert {w for w in words[2:] if w.startswith("-")} <= options | {"--help"}, words
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (Path(ROOT / page).parent / target).exists(), target
