"""The key of a measurement: what changes it, and what does not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from forge.training.system.environment import ROOT
from forge.training.system.errors import DataError
from harness.measurement import environment as arms
from harness.measurement import key
from harness.measurement.results import RunSpec
from tests.support.fake_runs import OTHER, SPEC

TRAINING = ROOT / "forge" / "training"


def closure_of(starts: list[str], without: tuple[str, ...] = ()) -> set[Path]:
    """All files that these of forge/training import, but for the imports of ``without``."""
    closure: set[Path] = set()
    waiting = {TRAINING / start for start in starts}
    while waiting:
        path = waiting.pop()
        closure.add(path)
        if path not in [TRAINING / name for name in ("cli.py", *without)]:  # a command that runs is in `starts`
            imported, _ = key._modules_in(path.read_text(encoding="utf-8"))
            waiting |= {file for name in imported for file in key._files_of(name)} - closure
    return closure


def test_whatever_a_run_could_import_is_in_the_key() -> None:
    """Including what no run here does: Unsloth's side, Qwen2's tokenizer rebuilt."""
    starts = ["__main__.py", "train/run.py", "train/display.py", "models/base.py", "config/workload.py"]
    starts += [f"backends/{name}.py" for name in ("__init__", "legacy", "trl", "unsloth")]
    executed, making = set(key.executed_files()), set(key.executed_files(makes_corpus=True))
    closure = closure_of(starts) - {ROOT / "forge" / "__init__.py"}
    assert closure <= executed | making
    assert making <= closure
    assert TRAINING / "llamacpp" / "native.py" in closure
    assert TRAINING / "evaluation" / "evaluate.py" not in executed | making
    # a run that is given its corpus reaches the maker of corpora by one import, and does not make it
    given = closure_of(starts, without=("data/corpus.py",))
    assert given & making == {TRAINING / "data" / "corpus.py"}


FILES = {
    "harness/perf/probes/one.py": "def f():\n    from harness.perf.probes.two import x\n",
    "harness/perf/probes/two.py": "import forge.training.export.card\nfrom forge.training import train\n",
    "harness/perf/probes/other.py": "x = 1\n",
    "forge/training/export/card.py": "TASK = 'forge.training.llamacpp.converter:convert'\n",
    "forge/training/export/__init__.py": "",
    "forge/training/llamacpp/converter.py": "x = 1\n",
    "forge/training/train/__init__.py": "import forge.training.checks.check\n",
    "forge/training/checks/check.py": "x = 1\n",
}
OF_ONE = [
    *("harness/perf/probes/one.py", "harness/perf/probes/two.py", "forge/training/export/__init__.py"),
    *("forge/training/export/card.py", "forge/training/llamacpp/converter.py"),
]


@pytest.mark.parametrize("changed", FILES)
def test_a_probes_key_follows_every_file_that_it_can_execute_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Imports in functions and tasks of a child process included; a training run's files have a digest of their own."""
    monkeypatch.setattr(key, "ROOT", tmp_path)
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert {path.relative_to(tmp_path).as_posix() for path in key.source_files("harness.perf.probes.one")} == {*OF_ONE}
    before = key.source_sha256("harness.perf.probes.one")
    (tmp_path / changed).write_text(f"# a remark\n{FILES[changed]}")
    assert key.source_sha256("harness.perf.probes.one") == before
    (tmp_path / changed).write_text(f"{FILES[changed]}y = 1\n")
    assert (key.source_sha256("harness.perf.probes.one") != before) == (changed in OF_ONE)


def test_an_evaluations_key_holds_what_it_executes_in_its_child_process_too() -> None:
    names = {path.relative_to(TRAINING).as_posix() for path in key.source_files("forge.training.export.export")[1:]}
    assert {"export/gguf.py", "adapter/merge.py", "llamacpp/child.py", "llamacpp/converter.py"} <= names
    assert not names & {path.relative_to(TRAINING).as_posix() for path in key.executed_files()}


def test_equal_measurements_have_equal_keys_wherever_their_files_lie(tmp_path: Path) -> None:
    keys = []
    for name, content in (("one", "{}\n"), ("two", "{}\n"), ("three", "{ }\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(content)
        spec = RunSpec(backend="trl", workload="smoke", overrides=(f"data.train={tmp_path / name / 'train.jsonl'}",))
        keys.append(key.identify(spec))
    assert keys[0].key == keys[1].key != keys[2].key
    assert len(key.explain(keys[0].parts, keys[2].parts)) == 1
    assert key.explain(keys[0].parts, keys[2].parts)[0].startswith("workload.data.train_sha256: ")
    assert str(tmp_path) not in json.dumps(keys[0].parts)


def test_a_key_changes_with_plan_packages_settings_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key.identify(SPEC)
    assert {line.partition(":")[0] for line in key.explain(before.parts, key.identify(OTHER).parts)} == {
        "plan.micro_batch",
        "spec.plan_overrides",
    }
    assert before.parts["packages"]["trl"] is not None
    monkeypatch.setattr(key, "describe_gpu", lambda: {"name": "Some GPU"})
    monkeypatch.setattr(key, "settings", lambda: {**arms.settings(), "OMP_NUM_THREADS": "77"})
    monkeypatch.setattr(key, "_ask_versions", lambda python, path: {**before.parts["packages"], "trl": "0.0"})
    lines = key.explain(before.parts, key.identify(SPEC).parts)
    assert [line.partition(":")[0] for line in lines] == ["gpu", "packages.trl", "settings.OMP_NUM_THREADS"]


def test_only_what_is_measured_is_in_the_codes_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key, "ROOT", tmp_path)
    training = tmp_path / "forge" / "training"
    for name in ("backends/trainer.py", "export/card.py", "models/weights.py", "data/embedded/a.md"):
        (training / name).parent.mkdir(parents=True, exist_ok=True)
        (training / name).write_text("a = 1\n")
    before = key.code_sha256()
    for name in ("export/card.py", "data/embedded/a.md"):
        (training / name).write_text("a = 2\n")
    assert key.code_sha256() == before
    (training / "backends" / "trainer.py").write_text("a = 2\n")
    assert key.code_sha256() != before


def test_code_for_a_resume_is_in_the_key_of_what_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key, "ROOT", tmp_path)
    trainer = tmp_path / "forge" / "training" / "backends" / "trainer.py"
    trainer.parent.mkdir(parents=True)
    source = "class T:\n    def step(self):\n        return 1\n\n{}    def last(self):\n        return 2\n"
    resumed = (
        '    @of(\n        1\n    )\n    def _load_from_checkpoint(self):\n        """Do it."""\n        return {}\n\n'
    )
    digests = []
    for text in (source.format(""), source.format(resumed.format(1)), source.format(resumed.format(2))):
        trainer.write_text(text)
        digests.append((key.code_sha256(), key.resume_sha256()))
    assert len({code for code, _ in digests}) == 1
    assert len({resume for _, resume in digests}) == 3
    trainer.write_text(source.format(resumed.format(2) + "    x = 1\n"))
    assert key.code_sha256() != digests[0][0]


def test_a_run_that_is_given_its_corpus_does_not_depend_on_how_corpora_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("{}\n")
    given = RunSpec(backend="trl", workload="smoke", overrides=(f"data.train={train}",))
    before = [key.identify(spec).key for spec in (given, SPEC)]
    real = key.code_sha256_of
    monkeypatch.setattr(key, "code_sha256_of", lambda path: "0" if path.name == "corpus.py" else real(path))
    after = [key.identify(spec).key for spec in (given, SPEC)]
    assert after[0] == before[0]
    assert after[1] != before[1], "the demo makes its corpus itself"


SOURCE = '''"""What this is for."""

LIMIT = 3  # of them


class Thing:
    """A thing."""

    def work(self) -> str:
        """Do it.

        In two paragraphs.
        """
        # with care
        return f"# no remark {LIMIT}"
'''


def test_a_remark_voids_no_measurement_and_a_statement_does(tmp_path: Path) -> None:
    path = tmp_path / "loop.py"

    def digest(source: str) -> str:
        path.write_text(source)
        return key.code_sha256_of(path)

    before = digest(SOURCE)
    for old, new in {
        "What this is for": "What it is for, and why",
        "# of them": "# of those",
        "In two paragraphs.": "In three\n\n        paragraphs.",
        "        # with care\n": "\n",
        '    """A thing."""\n': "",
    }.items():
        assert old in SOURCE
        assert digest(SOURCE.replace(old, new)) == before, old
    for old, new in {
        "LIMIT = 3": "LIMIT = 4",
        "# no remark": "# a remark",
        "        return": "        return None\n        return",
        "    def work": "    def play",
        '    """A thing."""': '    """A thing."""; work = 1',
        "        # with care\n": '        "a string that is no docstring"\n',
    }.items():
        assert old in SOURCE
        assert digest(SOURCE.replace(old, new)) != before, old
    with pytest.raises(DataError, match=r"loop\.py is not Python"):
        digest("def f(:\n")


def test_another_base_in_the_same_place_is_another_measurement(tmp_path: Path) -> None:
    spec = RunSpec(backend="trl", workload="smoke", overrides=(f"model.path={tmp_path}",))
    weights = bytearray(os.urandom(1 << 20) * 8)
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = key.identify(spec).key
    assert key.identify(spec).key == before
    weights[:] = bytes(255 - b for b in weights)
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert key.identify(spec).key != before
