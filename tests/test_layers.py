"""Claim: no folder imports one above it, so that the code can be read from the bottom to the top.

Read from the source: imports inside functions and under TYPE_CHECKING count too. What a child process of llama.cpp is
told as text ("module:function") is no import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From low to high. Names on one line are equals, which do not import one another.
LAYERS = {
    "forge.training": [
        *(
            "system",
            "config",
            "llamacpp",
            "models",
            "data",
            "kernels",
            "backends",
            "train",
            "planner",
            "adapter",
            "evaluation",
            "export",
        ),
        *("report", "checks", "init", "pipeline", "cli", "__main__"),
    ],
    "harness": [
        *("stats", "simulation", "measurement", "documents", "trained_base", "verdict", "recorder", "compare"),
        "session",
        "perf parity export reliability",
        *("report", "pytest_plugin", "conftest"),
    ],
}


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file of ``package`` imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def wrong_imports(root: Path) -> list[str]:
    """``file:line imports name`` for each import that points upward or sideways, or from forge to harness."""
    wrong = []
    for package, layers in LAYERS.items():
        level = {name: number for number, names in enumerate(layers) for name in names.split()}
        folder = root / package.replace(".", "/")
        for path in sorted(folder.rglob("*.py")):
            own = path.relative_to(folder).with_suffix("").parts
            if own == ("__init__",):
                continue
            assert own[0] in level, f"{path} is in no layer"
            for line, name in imports(path, ".".join([package, *own[:-1]])):
                other = name.removeprefix(f"{package}.").partition(".")[0] if name.startswith(f"{package}.") else None
                is_above = other in level and other != own[0] and level[other] >= level[own[0]]
                if is_above or (package != "harness" and name.partition(".")[0] == "harness"):
                    wrong.append(f"{path.relative_to(root)}:{line} imports {name}")
    return wrong


def test_no_import_points_upward() -> None:
    assert wrong_imports(ROOT) == []


@pytest.mark.parametrize(
    ("file", "planted", "named"),
    [
        (
            "forge/training/config/plan.py",
            "from forge.training.train.run import train",
            "forge.training.train.run.train",
        ),
        ("forge/training/system/files.py", "def f():\n    import forge.training.cli", "forge.training.cli"),
        (
            "forge/training/models/base.py",
            "if TYPE_CHECKING:\n    from forge.training import export",
            "forge.training.export",
        ),
        ("forge/training/data/inputs.py", "from ..backends.job import TrainingJob", "forge.training.backends.job"),
        ("forge/training/export/card.py", "from harness.stats import Interval", "harness.stats.Interval"),
        ("harness/measurement/key.py", "from harness import report", "harness.report"),
        ("harness/parity/suite.py", "from harness.export.claims import CLAIMS", "harness.export.claims.CLAIMS"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, planted: str, named: str) -> None:
    allowed = "from forge.training.system.errors import ForgeError\n"
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(allowed)
    assert wrong_imports(tmp_path) == []
    (tmp_path / file).write_text(allowed + planted)
    (wrong,) = wrong_imports(tmp_path)
    assert wrong.startswith(file)
    assert named in wrong
