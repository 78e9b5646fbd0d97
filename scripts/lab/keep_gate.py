#!/usr/bin/env python3
"""Take up what scripts/lab/gate_stretch.sh left: ``scripts/lab/keep_gate.py OUT docs/results/NAME``.

The store goes to ``NAME/store`` (what is there is only added to), benchmark.json beside it, and the report is made anew
from both. A gate may be carried out one suite at a time: the suites of the new benchmark.json take the place of the
same suites in the kept one, the others stay. Ends with exit code 8 where git would not take all of it: records have
been lost that way.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from forge.training.system.errors import CheckError, DataError, ForgeError, MachineError
from forge.training.system.files import read_json_object, write_json
from harness.compare import gpu_name, read_results

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("runs", "probes")  # never change once they are there


def unpack_store(archive: Path, folder: Path) -> Path:
    """Unpack into ``folder``; returns the store. Raises :class:`DataError` for what is no store's archive."""
    try:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from error
    if not any((folder / "store" / name).is_dir() for name in MEASURED):
        raise DataError(f"{archive} holds no store/runs")
    return folder / "store"


def files_of(store: Path) -> dict[str, bytes]:
    """Content by relative name of everything but the lock."""
    paths = (path for path in sorted(store.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in paths}


def add_store(new: Path, kept: Path) -> int:
    """Add a store's files to the one kept; returns how many are new.

    Raises :class:`DataError`, changing nothing, where the new store lacks or contradicts a measurement of the other.
    """
    ours, theirs = files_of(kept) if kept.is_dir() else {}, files_of(new)
    measured = [name for name in ours if name.startswith(MEASURED)]
    if lacking := [name for name in measured if name not in theirs]:
        raise DataError(f"{kept} holds {len(lacking)} that are not in the new store, as {lacking[0]}: an older one?")
    if other := [name for name in measured if ours[name] != theirs[name]]:
        raise DataError(f"{other[0]} is another in {kept}: the two stores do not belong together")
    for name, content in theirs.items():
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).write_bytes(content)
    for name in ours.keys() - theirs.keys():  # a trial that was put away since, or taken up
        (kept / name).unlink()
    return len(theirs.keys() - ours.keys())


def join_benchmarks(new: Path, kept: Path) -> list[str]:
    """Put a benchmark JSON's suites (folders of tests) into the kept one; returns those that stay as they were.

    Raises :class:`DataError`, changing nothing, for what is no result of the gate, and where the two were made on
    different GPUs or with other torch.
    """
    made_with, content = _made_with(new), read_json_object(new)
    staying = []
    if kept.is_file():
        if made_with != _made_with(kept):
            raise DataError(f"{new} was made with {made_with}, {kept} with {_made_with(kept)}")
        judged = {_suite(entry) for entry in content["benchmarks"]}
        staying = [entry for entry in read_json_object(kept)["benchmarks"] if _suite(entry) not in judged]
        content["benchmarks"] += staying
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, content)
    return sorted({_suite(entry) for entry in staying})


def _suite(entry: dict[str, Any]) -> str:
    return str(entry["fullname"]).partition("::")[0].rpartition("/")[0]


def _made_with(benchmark: Path) -> str:
    machine = read_results(benchmark).machine_info
    return f"{gpu_name(machine)}, torch {machine.get('torch')}"


def ignored(folder: Path) -> list[str]:
    """Files of a folder that git would leave out of a commit."""
    names = [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]
    command = ["git", "-C", str(folder), "check-ignore", "--stdin"]
    done = subprocess.run(command, input="\n".join(names), capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise MachineError(f"git does not say what it ignores: {done.stderr.strip()}")
    return done.stdout.splitlines()


def keep(out: Path, folder: Path) -> None:
    """Everything; raises :class:`ForgeError`."""
    if not (out / "store.tar.gz").is_file():
        raise DataError(f"{out} holds no store.tar.gz")
    with tempfile.TemporaryDirectory() as temporary:
        num_new = add_store(unpack_store(out / "store.tar.gz", Path(temporary)), folder / "store")
    print(f"{folder / 'store'}: {num_new} new files")
    if (out / "benchmark.json").is_file():
        if staying := join_benchmarks(out / "benchmark.json", folder / "benchmark.json"):
            print(f"as they were judged before: {', '.join(staying)}")
        report = [sys.executable, "-m", "harness.report", str((folder / "benchmark.json").absolute())]
        if subprocess.run([*report, "-o", str(folder.absolute())], cwd=ROOT, check=False).returncode:
            raise DataError("no report could be made of it (see above)")
    else:
        print("no benchmark.json: the next stretch records these runs as well")
    if left_out := ignored(folder):
        raise CheckError(f"git ignores {len(left_out)} of its files, as {left_out[0]}: correct .gitignore")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Take up what a stretch of the gate left.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder that gate_stretch.sh wrote into")
    parser.add_argument("folder", type=Path, metavar="docs/results/NAME", help="where results are kept")
    arguments = parser.parse_args()
    try:
        keep(arguments.out, arguments.folder)
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
