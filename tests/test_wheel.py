"""A wheel holds all that `forge` needs to run without its checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def ended(command: list[str], folder: Path, **environment: str) -> str:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=own | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, installed alone."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    names = ended(["git", "ls-files", "-z", "forge", "harness", "pyproject.toml", "README.md", "LICENSE"], ROOT)
    for name in filter(None, names.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--no-cache-dir"]
    ended([*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(wheels)], source)
    ended([*pip, "install", "--no-deps", "--target", str(target), *map(str, wheels.glob("*.whl"))], source)
    return target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--help"], "Documents in, a tested GGUF model out."),
        (["init", "--template"], "documents: path/to/documents"),
        (["preview", "smoke", "--set", "model.path={base}"], "preview: smoke"),
    ],
    ids=["help", "template", "a config by name"],
)
def test_an_installed_wheel_runs_from_another_folder(
    installed: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    from tests.support.tiny_model import shared_base

    typed = [argument.format(base=shared_base()) for argument in arguments]
    where = ["-c", "import forge; print(forge.__file__)"]
    assert ended([sys.executable, *where], tmp_path, PYTHONPATH=str(installed)).startswith(str(installed))
    command = [sys.executable, str(installed / "bin" / "forge"), *typed]
    assert says in ended(command, tmp_path, PYTHONPATH=str(installed))
