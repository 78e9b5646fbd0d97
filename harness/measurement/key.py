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
import re
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

# Of forge/training, what a training run executes: folders and files. The part of llamacpp/ with which a run's child
# process, `forge base`, tries a tokenizer that it made.
_EXECUTED = (
    *("config", "data", "models", "kernels", "backends", "train", "system"),
    *("llamacpp/__init__.py", "llamacpp/install.py", "llamacpp/native.py", "llamacpp/parent.py"),
    *("llamacpp/answers.py", "llamacpp/importance.py"),
    *("__init__.py", "__main__.py", "cli.py"),
)
# Of those files, the functions that only a resumed run executes: a measured run is a fresh one (`train_command`).
RESUMES: dict[str, frozenset[str]] = {"backends/trainer.py": frozenset({"_load_from_checkpoint"})}
# What turns a repository into a corpus: executed only by a run that is given no corpus.
_MAKES_CORPUS = tuple(
    f"data/{name}.py" for name in ("corpus", "discovery", "documents", "gitignore", "kinds", "listing", "notebook")
)

# A module named in a text, as what is to run in a child process: "forge.training.export.gguf:convert".
_MODULE_IN_TEXT = re.compile(r"((?:forge|harness)(?:\.\w+)+)(?::\w+)?")

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
            "sample_answers": workload.training.sample_answers,
            "report_to": list(workload.report_to),
        },
        "plan": load_plan(workload, spec.backend, spec.plan_overrides).model_dump(mode="json"),
        "code": code_sha256(),
        "packages": package_versions(spec.backend),
        "gpu": (describe_gpu() or {}).get("name"),
        "settings": settings(),
    }
    if workload.data.train is None:
        parts["corpus_code"] = _sha256_of(executed_files(makes_corpus=True))
    if spec.evaluate:
        parts["evaluation"] = {
            "code": source_sha256("forge.training.evaluation.evaluate"),
            "packages": package_versions(EVALUATOR),
            "section": workload.evaluation.model_dump(mode="json"),  # not in the workload's digest
        }
    if spec.float32_adapter:
        parts["float32_adapter"] = source_sha256("harness.parity.probes.float32_adapter")
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


def executed_files(*, makes_corpus: bool = False) -> list[Path]:
    """The Python files that a training run can execute, sorted.

    ``makes_corpus``: instead those that it executes besides where it makes its corpus itself.
    """
    training = _training()
    paths = [training / name for name in _EXECUTED]
    files = {file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))}
    names = sorted(file.relative_to(training).as_posix() for file in files)
    return [training / name for name in names if name.startswith(_MAKES_CORPUS) == makes_corpus]


def code_sha256() -> str:
    """SHA-256 over path and code of :func:`executed_files`, less the functions of :data:`RESUMES`."""
    return _sha256_of(executed_files())


def resume_sha256() -> str:
    """SHA-256 over the files of :data:`RESUMES`, those functions included: for what resumes from a checkpoint."""
    return sha256_json([[name, code_sha256_of(_training() / name, is_resumed=True)] for name in sorted(RESUMES)])


def source_sha256(*modules: str) -> str:
    """SHA-256 over path and code of :func:`source_files`: with :func:`code_sha256`, all that ``modules`` execute."""
    return _sha256_of(source_files(*modules))


def source_files(*modules: str) -> list[Path]:
    """The project's Python files that ``modules`` can import, themselves included, less :func:`executed_files`.

    Imports inside functions count, and modules named in a text (:mod:`forge.training.llamacpp.parent` is given its
    tasks so). The imports of a file that a training run executes are not followed: they are in the same list, but for
    the commands' (`cli.py`), of which a training run carries out its own, and for the makers of a corpus.
    """
    executed = set(executed_files())
    waiting = [path for module in modules for path in _files_of(module)]
    reached: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            imported, in_texts = _modules_in(path.read_text(encoding="utf-8"))
            names = in_texts if path in executed else imported | in_texts
            waiting += [file for name in names for file in _files_of(name)]
    return sorted(reached - executed)


@cache
def _modules_in(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names that may be modules of the project: imported, and in texts that are nothing but such a name."""
    imported: set[str] = set()
    in_texts: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            in_texts |= {match[1] for match in [_MODULE_IN_TEXT.fullmatch(node.value)] if match}
    return frozenset(imported), frozenset(in_texts)


def _files_of(module: str) -> list[Path]:
    """The files that importing a module executes: its packages' and its own; none for other projects' modules."""
    parts = module.split(".")
    if parts[0] not in ("forge", "harness"):
        return []
    packages = [ROOT.joinpath(*parts[:count], "__init__.py") for count in range(1, len(parts) + 1)]
    return [path for path in (*packages, ROOT.joinpath(*parts).with_suffix(".py")) if path.is_file()]


def _training() -> Path:
    return ROOT / "forge" / "training"


def _sha256_of(files: list[Path]) -> str:
    return sha256_json([[path.relative_to(ROOT).as_posix(), code_sha256_of(path)] for path in files])


def code_sha256_of(path: Path, *, is_resumed: bool = False) -> str:
    """SHA-256 of a Python file less its comments, docstrings and blank lines, the same in every Python version.

    Without its functions of :data:`RESUMES` too, unless ``is_resumed``. Raises :class:`DataError` for a file that
    does not parse.
    """
    name = path.relative_to(_training()).as_posix() if path.is_relative_to(_training()) else ""
    unused = frozenset() if is_resumed else RESUMES.get(name, frozenset())
    try:
        return _code_sha256(path.read_text(encoding="utf-8"), unused)
    except (SyntaxError, tokenize.TokenError) as error:
        raise DataError(f"{path} is not Python: {error}", remedy="correct it before measuring") from error


@cache
def _code_sha256(source: str, unused: frozenset[str]) -> str:
    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            first, last = node.body[0].lineno - 1, node.body[0].end_lineno or 0
            if lines[first].lstrip()[:1] in "rR\"'" and lines[last - 1].rstrip()[-1:] in "\"'":
                lines[first:last] = [""] * (last - first)  # else it shares a line with a statement: let it count
        if not isinstance(node, ast.Module) and node.name in unused:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            last = node.end_lineno or 0
            lines[first:last] = [""] * (last - first)
    text = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(text.encode()).hexdigest()


def package_versions(backend: Backend) -> dict[str, str | None]:
    """Versions of what an arm's own interpreter would import, and its Python's. Asked once per interpreter."""
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
            columns = {"columns": dict(data.columns)} if data.columns else {}
            return {"train_sha256": sha256_file(data.train), "validation_sha256": validation} | columns
        assert data.documents is not None
        root = _training() / "data" / "embedded" if data.documents == "embedded" else Path(data.documents)
        files = sorted(p for p in root.rglob("*") if p.is_file() and ".git" not in p.relative_to(root).parts)
        return {
            "documents_sha256": sha256_json([[p.relative_to(root).as_posix(), sha256_file(p)] for p in files]),
            "instructions": [rule.model_dump() for rule in data.instructions],
            "validation_share": data.validation_share,
        }
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}", remedy="correct data.train") from error
