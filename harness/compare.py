"""Two results of the gate side by side: ``python -m harness.compare OLD.json NEW.json`` (``make compare A=.. B=..``).

What cannot be compared is refused first, with every reason at once; then pytest-benchmark's own ``compare`` prints the
table. On its own that command passes in silence over a renamed entry, another workload, an unfinished gate.

Exit codes: 0 compared, 2 arguments or the same results twice, 3 a file that is no result of the gate, 6 ``--out``
exists or the disk is full, 8 the two cannot be compared.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, ValidationError

from forge.training.system.errors import CheckError, ConfigurationError, DataError, ForgeError
from forge.training.system.files import atomic_file, read_json_object, refuse_existing, sha256_file
from harness.recorder import NO_UNIT

ROOT = Path(__file__).resolve().parents[1]  # `pytest-benchmark compare` finds its hooks in ./conftest.py alone

NO_GPU = "no GPU"

# What must be equal for two values under one name to be one quantity. The plan may differ: that is what one compares.
_IDENTITY = ("record_kind", "metric", "unit", "workload", "workload_sha256", "backend", "arm")


def gpu_name(machine_info: Mapping[str, Any]) -> str:
    """The GPU of a ``machine_info``, for people; :data:`NO_GPU` where it names none."""
    gpu = machine_info.get("gpu")
    name = gpu.get("name") if isinstance(gpu, dict) else None
    return str(name) if name else NO_GPU


class _Stats(BaseModel):
    median: FiniteFloat


class Entry(BaseModel):
    """One entry of a pytest-benchmark JSON, as far as it is compared."""

    fullname: str
    extra_info: dict[str, Any]
    stats: _Stats


class Results(BaseModel):
    """A pytest-benchmark 5.3.1 JSON, as far as it is compared."""

    machine_info: dict[str, Any]
    commit_info: dict[str, Any] = {}
    datetime: str
    benchmarks: list[Entry]
    is_partial: bool = False  # what pytest_plugin.py keeps while the gate runs

    def by_name(self) -> dict[str, Entry]:
        """Entries by their full name, which is unique (:func:`read_results`)."""
        return {entry.fullname: entry for entry in self.benchmarks}

    def gpus(self) -> list[str]:
        """Names of the GPUs that the entries were measured on."""
        return sorted({str(entry.extra_info.get("gpu") or NO_GPU) for entry in self.benchmarks})


def read_results(path: Path) -> Results:
    """Raises :class:`DataError` for anything but a result of the gate with at least one entry."""
    content = read_json_object(path)
    try:
        results = Results.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path} is not a pytest-benchmark result: {where}: {first['msg']}") from error
    if not results.benchmarks:
        raise DataError(f"{path} holds no entry")
    for entry in results.benchmarks:
        missing = [key for key in ("metric", "unit", "record_kind") if not isinstance(entry.extra_info.get(key), str)]
        if missing:
            raise DataError(f"{path}: {entry.fullname} has no {', '.join(missing)}: the gate did not record it")
    if len(results.by_name()) < len(results.benchmarks):
        raise DataError(f"{path}: an entry's name occurs twice")
    return results


def check_comparable(old: Results, new: Results) -> None:
    """Raises :class:`CheckError` with all reasons why numbers of ``old`` and ``new`` say nothing about each other."""
    reasons = [*_other_gpus(old, new), *_unfinished("A", old), *_unfinished("B", new), *_other_entries(old, new)]
    if reasons:
        raise CheckError(
            "these results cannot be compared:\n" + "\n".join(f"  - {reason}" for reason in reasons),
            remedy="compare complete gates of the same workloads on one GPU model, their tests under the same names",
        )


def _other_gpus(old: Results, new: Results) -> Iterator[str]:
    if old.gpus() != new.gpus() or len(old.gpus()) > 1:
        yield f"different GPUs: A is of {' and '.join(old.gpus())}, B of {' and '.join(new.gpus())}"
    recorded = gpu_name(old.machine_info), gpu_name(new.machine_info)
    if recorded[0] != recorded[1]:
        yield f"different GPUs: A was recorded on a machine with {recorded[0]}, B on one with {recorded[1]}"


def _unfinished(name: str, results: Results) -> Iterator[str]:
    if results.is_partial:
        yield f"{name} was cut short: it is what was kept while the gate ran"
    for entry in results.benchmarks:
        verdict = entry.extra_info.get("verdict")
        if verdict is not None and (not isinstance(verdict, dict) or verdict.get("status") in (None, "INCOMPLETE")):
            yield f"{name} is an unfinished gate: {entry.fullname} is INCOMPLETE"


def _other_entries(old: Results, new: Results) -> Iterator[str]:
    a, b = old.by_name(), new.by_name()
    for here, there, side in ((a, b, "A"), (b, a, "B")):
        yield from (f"only in {side} (renamed or missing): {name}" for name in here if name not in there)
    for name in (name for name in a if name in b):
        for key in _IDENTITY:
            values = a[name].extra_info.get(key), b[name].extra_info.get(key)
            if values[0] != values[1]:
                yield f"{name}: {key} is {values[0]} in A, {values[1]} in B"


def write_csv(old: Results, new: Results, path: Path) -> None:
    """One line per entry with both medians in the entry's unit and the change in percent (empty where A is zero)."""
    b = new.by_name()
    with atomic_file(path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("entry", "metric", "unit", "workload", "arm", "a_median", "b_median", "change_percent"))
        for name, entry in sorted(old.by_name().items()):
            info, before, after = entry.extra_info, entry.stats.median, b[name].stats.median
            if info["unit"] != NO_UNIT:
                change = (after - before) / abs(before) * 100 if before else ""
                keys = [info.get(key) for key in ("metric", "unit", "workload", "arm")]
                writer.writerow((name, *keys, before, after, change))


def _describe(name: str, path: Path, results: Results) -> str:
    commit = str(results.commit_info.get("id") or "unknown")[:12]
    changed = ", with uncommitted changes" if results.commit_info.get("dirty") else ""
    return f"{name}: {path} (commit {commit}{changed}; {results.datetime[:16]})"


def _notes(old: Results, new: Results) -> Iterator[str]:
    """What differs between the two machines without making a comparison wrong by itself."""
    flat = [{**info, **(info.get("gpu") or {})} for info in (old.machine_info, new.machine_info)]
    for key in flat[0].keys() | flat[1].keys():
        a, b = flat[0].get(key), flat[1].get(key)
        if key != "gpu" and a != b:
            yield f"note: {key} is {a} in A, {b} in B"


def _print_table(a: Path, b: Path) -> int:
    """pytest-benchmark's own command, from the repository's root. It sorts files by name: they get new ones."""
    with tempfile.TemporaryDirectory() as folder:
        for name, path in (("A", a), ("B", b)):
            shutil.copyfile(path, Path(folder, f"{name}.json"))
        files = [str(Path(folder, "A.json")), str(Path(folder, "B.json"))]
        command = [sys.executable, "-m", "pytest_benchmark", f"--storage=file://{folder}", "compare"]
        return subprocess.run([*command, *files, "--between=median"], cwd=ROOT, check=False).returncode


def compare(a: Path, b: Path, out: Path | None = None, *, force: bool = False) -> int:
    """Print both results side by side; exit code of pytest-benchmark's command. Raises :class:`ForgeError`."""
    old, new = read_results(a), read_results(b)
    if a.samefile(b) or sha256_file(a) == sha256_file(b):
        raise ConfigurationError(f"{a} and {b} are the same results", remedy="name two results: A is the older one")
    if out is not None:
        refuse_existing(out, force)
    check_comparable(old, new)
    print(_describe("A", a, old), _describe("B", b, new), *sorted(_notes(old, new)), sep="\n", flush=True)
    exit_code = _print_table(a.absolute(), b.absolute())
    if out is not None and exit_code == 0:
        write_csv(old, new, out)
    return exit_code


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m harness.compare", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("a", metavar="A.json", type=Path, help="the older result (--benchmark-json of the gate)")
    parser.add_argument("b", metavar="B.json", type=Path, help="the newer one")
    parser.add_argument("--out", metavar="FILE.csv", type=Path, help="both medians of every entry as CSV")
    parser.add_argument("--force", action="store_true", help="replace FILE.csv")
    options = parser.parse_args(arguments)
    try:
        return compare(options.a, options.b, options.out, force=options.force)
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
