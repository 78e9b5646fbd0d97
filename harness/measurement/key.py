"""The key of a measurement: a digest of everything that can change its numbers, and of nothing else.

Committing results, documentation or tests leaves every key as it is, and so does a comment or a docstring in the
training code; a statement of it, the workload, its plan or its data, a package, a setting of the environment or
another GPU does not.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import subprocess
import tokenize
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from forge.training.backends import Backend, load_plan
from forge.training.config.workload import Workload, load_workload
from forge.training.system.environment import PACKAGES, ROOT, describe_gpu
from forge.training.system.errors import DataError, MachineError
from forge.training.system.files import sha256_file, sha256_json
from harness.measurement.environment import EVALUATOR, environment, interpreter, settings
from harness.measurement.results import RunSpec

TRAINING = ROOT / "forge" / "training"
FLOAT32_ADAPTER = ROOT / "harness" / "parity" / "probes" / "float32_adapter.py"

# Of forge/training, what no training run executes. `train` finds its base by a child process, `base`, which,
# once, rebuilds Qwen2's tokenizer: hence the exceptions to "all but llamacpp/".
_NOT_EXECUTED = ("adapter/", "export/", "evaluation/", "checks/", "llamacpp/", "pipeline.py")
_EXECUTED_ALL_THE_SAME = ("__init__", "install", "native", "parent")
# Of those files, the functions that only a resumed run executes: a measured run is a fresh one (`arms.train_command`).
RESUMES: dict[str, frozenset[str]] = {"backends/trainer.py": frozenset({"_load_from_checkpoint"})}
# What turns a repository into a corpus: executed only by a run that is given no corpus.
_MAKES_CORPUS = ("data/corpus", "data/discovery.py", "data/split.py")

_SAMPLE_BYTES, _NUM_SAMPLES = 64 << 10, 64


@dataclass(frozen=True)
class Identity:
    """``key``: hex SHA-256 of ``parts``, which are JSON-able and hold no path of this machine."""

    key: str
    parts: dict[str, Any]


def identify(spec: RunSpec) -> Identity:
    """The key that a run of ``spec`` would have now. Raises what a wrong workload, plan or interpreter raises."""
    workload = load_workload(spec.workload, spec.overrides)
    parts = {
        "spec": spec.portable().model_dump(mode="json"),
        "workload": {
            "sha256": workload.digest(),
            "model": _describe_model(workload),
            "data": _describe_data(workload),
            # left out of the digest, because they change no mathematics; they take time
            "save_every_steps": workload.training.save_every_steps,
            "save_every_minutes": workload.training.save_every_minutes,
            "report_to": list(workload.report_to),
        },
        "plan": load_plan(workload, spec.backend, spec.plan_overrides).model_dump(mode="json"),
        "code": code_sha256(),
        "packages": package_versions(spec.backend),
        "gpu": (describe_gpu() or {}).get("name"),
        "settings": settings(),
    }
    if workload.data.train is None:
        parts["corpus_code"] = _sha256_of(measured_files(makes_corpus=True))
    if spec.evaluate:
        parts["evaluation"] = {
            "code": evaluation_sha256(),
            "packages": package_versions(EVALUATOR),
            "asked": workload.evaluation.model_dump(mode="json"),  # not in the workload's digest
        }
    if spec.float32_adapter:
        parts["float32_adapter"] = code_sha256_of(FLOAT32_ADAPTER)
    parts = json.loads(json.dumps(parts))  # as it will be read back
    return Identity(sha256_json(parts), parts)


def explain(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """A line ``packages.torch: 2.11.0 -> 2.13.0`` for each part of two keys that differs; digests shortened."""
    lines = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += explain(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {_short(old)} -> {_short(new)}")
    return lines


def _short(value: Any) -> Any:
    is_digest = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value[:8] if is_digest else value


def measured_files(*, makes_corpus: bool = False) -> list[Path]:
    """The Python files that a training run can execute, sorted, relative to ``forge/training``.

    ``makes_corpus``: instead those that it executes besides where it makes its corpus itself.
    """
    found = sorted(path.relative_to(TRAINING) for path in TRAINING.rglob("*.py"))
    kept = {Path("llamacpp") / f"{name}.py" for name in _EXECUTED_ALL_THE_SAME}
    executed = [path for path in found if path in kept or not path.as_posix().startswith(_NOT_EXECUTED)]
    return [path for path in executed if path.as_posix().startswith(_MAKES_CORPUS) == makes_corpus]


def code_sha256() -> str:
    """SHA-256 over path and code of :func:`measured_files`, less the functions of :data:`RESUMES`."""
    return _sha256_of(measured_files())


def resume_sha256() -> str:
    """SHA-256 over the files of :data:`RESUMES`, those functions included: for what resumes from a checkpoint."""
    return sha256_json([[name, code_sha256_of(TRAINING / name, is_resumed=True)] for name in sorted(RESUMES)])


def evaluation_sha256() -> str:
    """SHA-256 over path and code of what an evaluation executes beside what training does."""
    files = [TRAINING / "adapter" / "lora.py", *sorted((TRAINING / "evaluation").glob("*.py"))]
    return _sha256_of([path.relative_to(TRAINING) for path in files])


def _sha256_of(files: list[Path]) -> str:
    return sha256_json([[path.as_posix(), code_sha256_of(TRAINING / path)] for path in files])


def code_sha256_of(path: Path, *, is_resumed: bool = False) -> str:
    """SHA-256 of a Python file less its comments, docstrings and blank lines, the same in every Python version.

    Without its functions of :data:`RESUMES` too, unless ``is_resumed``. Raises :class:`DataError` for a file that
    does not parse.
    """
    name = path.relative_to(TRAINING).as_posix() if path.is_relative_to(TRAINING) else ""
    unused = frozenset() if is_resumed else RESUMES.get(name, frozenset())
    try:
        return _code_sha256(path.read_text(encoding="utf-8"), unused)
    except (SyntaxError, tokenize.TokenError) as error:
        raise DataError(f"{path} is no Python: {error}", remedy="correct it before measuring") from error


@cache
def _code_sha256(source: str, unused: frozenset[str]) -> str:
    lines: list[str | None] = list(source.split("\n"))
    nodes: list[Any] = list(ast.walk(ast.parse(source)))
    remarks = [node.body[0] for node in nodes if _has_docstring(node)]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = (lines[row - 1] or "")[:column]
    for remark in remarks:
        first, last = remark.lineno - 1, remark.end_lineno or remark.lineno
        if (lines[first] or "").lstrip()[:1] in "rR\"'" and (lines[last - 1] or "").rstrip()[-1:] in "\"'":
            lines[first:last] = [None] * (last - first)  # else it shares a line with a statement: let it count
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in unused:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            last = node.end_lineno or node.lineno
            lines[first:last] = [None] * (last - first)
    text = "\n".join(line.rstrip() for line in lines if line and line.strip())
    return hashlib.sha256(text.encode()).hexdigest()


def _has_docstring(node: Any) -> bool:
    is_documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    return is_documented and ast.get_docstring(node, clean=False) is not None


def package_versions(backend: Backend) -> dict[str, str | None]:
    """Versions of what an arm's own interpreter would import, and its Python's. Asked once an interpreter."""
    arm = environment(backend)
    return dict(_ask_versions(interpreter(backend), arm.get("PYTHONPATH")))


@cache
def _ask_versions(python: str, pythonpath: str | None) -> dict[str, str | None]:
    code = (
        "import json, platform, sys\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "def find(name):\n    try: return version(name)\n    except PackageNotFoundError: return None\n"
        "print(json.dumps({'python': platform.python_version()} | {name: find(name) for name in sys.argv[1:]}))"
    )
    arm = environment("legacy") | ({"PYTHONPATH": pythonpath} if pythonpath is not None else {})
    try:
        done = subprocess.run(
            [python, "-c", code, *PACKAGES], env=arm, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
        )
        answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise MachineError(
            f"{python} does not answer: {detail[-1] if detail else type(error).__name__}",
            remedy="make that environment again, or point FORGE_LEGACY_PYTHON / FORGE_GPU_PYTHON elsewhere",
        ) from error
    return dict(answer)


def _describe_model(workload: Workload) -> dict[str, Any]:
    model = workload.model
    directory = Path(model.path)
    if not directory.is_dir():
        return {"path": model.path, "revision": model.revision}
    files = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    return {"path": directory.name, "sampled_sha256": sha256_json([[p.name, _sampled_sha256(p)] for p in files])}


def _sampled_sha256(path: Path) -> str:
    """Digest of a file's size and of 64 evenly spread pieces of 64 KiB: other weights differ nearly everywhere."""
    size = path.stat().st_size
    if size <= _NUM_SAMPLES * _SAMPLE_BYTES:
        return sha256_file(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        for number in range(_NUM_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _describe_data(workload: Workload) -> dict[str, Any]:
    """The documents by content, and what the training run makes its corpus with where it makes it itself."""
    data = workload.data
    try:
        if data.train is not None:
            validation = sha256_file(data.validation) if data.validation else None
            return {"train_sha256": sha256_file(data.train), "validation_sha256": validation}
        assert data.documents is not None
        root = TRAINING / "data" / "embedded" if data.documents == "embedded" else Path(data.documents)
        files = sorted(p for p in root.rglob("*") if p.is_file() and ".git" not in p.relative_to(root).parts)
        return {
            "documents_sha256": sha256_json([[p.relative_to(root).as_posix(), sha256_file(p)] for p in files]),
            "instructions": [rule.model_dump() for rule in data.instructions],
            "validation_share": data.validation_share,
        }
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}", remedy="correct data.train") from error
