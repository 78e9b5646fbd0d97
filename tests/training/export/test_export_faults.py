"""Claims about exports that are failed: one error with its cause, the old one kept, nothing half-written, nobody left.

Converter and library are stand-ins that misbehave (support/stub_llama_cpp.py); processes and verification are real.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from forge.training.adapter.merge import merge_adapter
from forge.training.cli import app
from forge.training.export import gguf
from forge.training.export.export import export_run
from forge.training.export.gguf import quantize, verify_gguf
from forge.training.llamacpp import install as llama_cpp
from forge.training.system.command import _Stdout, carry_out
from forge.training.system.errors import CheckError, DiskError, ForgeError, MachineError
from tests.support import stub_llama_cpp as stub
from tests.support.processes import children_of, wait_for_end
from tests.support.tiny_model import gguf_file, merged_dir, scratch, shared_adapter, shared_base
from tests.support.tiny_run import made_up_run


@cache
def good_gguf() -> Path:
    """The tiny merged model as f16, made by the real converter before any test puts another in its place."""
    return gguf_file("f16")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A completed run, merged already: an export converts, quantises and verifies."""
    good_gguf()
    run = made_up_run(tmp_path / "run")
    shutil.copytree(merged_dir(), run / "merged")
    return run


def old_export(run: Path) -> None:
    """A folder whose record lists one file: an export's own, which --force may replace."""
    (run / "export").mkdir()
    (run / "export" / "lighthouse.q8_0.gguf").write_bytes(b"the last good one")
    (run / "export" / "export.json").write_text('{"files": [{"name": "lighthouse.q8_0.gguf"}]}')


def foreign_file(run: Path) -> None:
    (run / "export").mkdir()
    (run / "export" / "thesis.md").write_text("three years")


def quick(names: Iterable[str], *chosen: str) -> list[Any]:
    """All names as parameters; those not chosen run with the slow tests."""
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.slow) for name in names]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TOOLS: dict[str, tuple[str, type[ForgeError], str]] = {
    "killed midway": (stub.DIES, CheckError, r"killed by SIGKILL"),
    "ends well, its file cut off": (stub.TRUNCATES, CheckError, r"not a readable GGUF file|refuses"),
    "ends well, without a file": (stub.WRITES_NOTHING, CheckError, "ended without an error and without a file"),
    "ends with an exit code": (stub.EXITS, CheckError, r"(?s)converter refuses .*\| the reason is on this line"),
    "raises what it likes": (stub.RAISES, CheckError, "converter refuses .*ZeroDivisionError: the reason"),
    "does not know the tokenizer": (stub.ASKS_FOR_A_TOKENIZER, CheckError, "does not implement the pre-tokenizer"),
    "does not begin": ("import no_such_module", MachineError, "cannot be run: ModuleNotFoundError"),
    "does not parse": ("(", MachineError, "cannot be run: SyntaxError"),
}


@pytest.mark.parametrize(
    "name", quick(TOOLS, "killed midway", "ends well, its file cut off", "does not know the tokenizer")
)
def test_a_converter_that_fails_is_one_error_and_the_old_export_stays(
    run_dir: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    action, kind, complaint = TOOLS[name]
    stub.use_converter(tmp_path, good_gguf(), action, monkeypatch)
    old_export(run_dir)
    before, others = contents(run_dir), children_of(os.getpid())  # resource trackers of tests before this one
    with pytest.raises(kind, match=complaint) as error:
        export_run(run_dir, quantizations=["q8_0"], force=True)
    assert error.value.exit_code == (4 if kind is MachineError else 8)
    assert contents(run_dir) == before | {".lock": contents(run_dir)[".lock"]}
    assert set(children_of(os.getpid())) <= set(others)


@pytest.mark.slow
def test_a_converter_that_hangs_is_ended_with_the_end_of_its_log(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.use_converter(tmp_path, good_gguf(), stub.HANGS, monkeypatch)
    monkeypatch.setattr(gguf, "time_limit_seconds", lambda _: 10.0)  # a busy machine takes seconds to start a child
    started, others = time.monotonic(), children_of(os.getpid())
    with pytest.raises(CheckError, match=r"(?s)no answer within 10 s; the process was ended.*\| hanging"):
        export_run(run_dir, quantizations=["q8_0"])
    assert time.monotonic() - started < 60
    assert not (run_dir / "export").exists()
    assert set(children_of(os.getpid())) <= set(others)


LIBRARIES: dict[str, tuple[str, type[ForgeError], str]] = {
    "segfaults": ("sys.stderr.write('last words\\n')\nctypes.string_at(0)", CheckError, r"SIGSEGV(?s:.*)\| last words"),
    "hangs": ("sys.stderr.write('waiting\\n')\ntime.sleep(600)", CheckError, r"no answer within(?s:.*)\| waiting"),
    "does not load": ("raise OSError('libllama.so: no such file')", MachineError, "cannot be loaded: libllama"),
    "ends": ("sys.stderr.write('bye\\n')\nimport os; os._exit(0)", CheckError, r"exited with 0(?s:.*)\| bye"),
}


@pytest.mark.parametrize("name", quick(LIBRARIES, "segfaults"))
def test_a_library_that_fails_is_one_error_in_bounded_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    action, kind, complaint = LIBRARIES[name]
    good_gguf()
    stub.use_library(tmp_path, action, monkeypatch)
    monkeypatch.setattr(gguf, "time_limit_seconds", lambda _: 10.0 if name == "hangs" else 60.0)
    work: tuple[Callable[[], object], ...] = (
        lambda: verify_gguf(good_gguf()),
        lambda: quantize(good_gguf(), tmp_path / "x.gguf", "q8_0"),
    )
    others = children_of(os.getpid())
    for attempt in work[: 1 if name == "hangs" else 2]:
        started = time.monotonic()
        with pytest.raises(kind, match=complaint):
            attempt()
        assert time.monotonic() - started < 60
    assert not (tmp_path / "x.gguf").exists()
    assert set(children_of(os.getpid())) <= set(others)


def test_missing_tools_are_said_before_work_begins(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run_dir)
    with monkeypatch.context() as patch:
        patch.setenv("FORGE_LLAMA_CPP", str(tmp_path / "nowhere"))
        with pytest.raises(MachineError, match="converter is not at") as error:
            export_run(run_dir, quantizations=["q8_0"])
        assert error.value.exit_code == 4
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "find_spec", lambda _: None)
        with pytest.raises(MachineError, match="llama-cpp-python is missing"):
            export_run(run_dir, quantizations=["q8_0"])
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "package_version", lambda _: "0.3.1")
        with pytest.raises(MachineError, match=r"is 0\.3\.1; the converter belongs to"):
            export_run(run_dir, quantizations=["q8_0"])
    assert contents(run_dir) == before


# Disks


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """RLIMIT_FSIZE for this process and those it starts: a write beyond it fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITES = "open(TARGET, 'wb').write(open(GOOD, 'rb').read())"
NUMPY_WRITES = "import numpy; numpy.fromfile(GOOD, dtype='u1').tofile(TARGET)"  # as gguf-py does; it gives no errno
DISK_STEPS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "merge": ("", lambda out: merge_adapter(shared_base(), shared_adapter(), out, force=True)),
    "convert": (WRITES, lambda out: gguf.convert_to_gguf(merged_dir(), out, force=True)),
    "convert, without an errno": (NUMPY_WRITES, lambda out: gguf.convert_to_gguf(merged_dir(), out, force=True)),
    "quantise": ("", lambda out: quantize(good_gguf(), out, "q8_0", force=True)),
}


REALLY = "convert, with the real converter"
DISK_STEPS[REALLY] = ("", DISK_STEPS["convert"][1])


@pytest.mark.parametrize("name", quick(DISK_STEPS, *(name for name in DISK_STEPS if name != REALLY)))
def test_a_file_that_does_not_fit_is_a_disk_error_and_the_last_good_one_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    action, write = DISK_STEPS[name]
    good_gguf(), merged_dir()
    if action:
        stub.use_converter(tmp_path / "tools", good_gguf(), action, monkeypatch)
    out = tmp_path / "out"
    out.mkdir()
    target = out / "model"
    target.write_bytes(b"the last good one")
    with files_limited_to(500_000), pytest.raises(DiskError, match=r"cannot write .*size limit") as error:
        write(target)
    assert error.value.exit_code == 6
    assert contents(out) == {"model": b"the last good one"}
    write_again = [path for path in out.iterdir() if path.name != "model"]
    assert write_again == []


IN_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=1m tmpfs "$1"
printf 'the last good one' > "$1/model"
shift
"$@" || code=$?
ls -A "$DISK"; cat "$DISK/model"; exit ${code:-0}
"""
QUANTISE = """
import sys
from pathlib import Path
from forge.training.system.errors import DiskError
from forge.training.export.gguf import quantize
try:
    quantize(Path(sys.argv[1]), Path(sys.argv[2]), "q8_0", force=True)
except DiskError as error:
    print(error.message)
    sys.exit(6)
"""


def test_a_full_disk_is_a_disk_error_and_the_last_good_file_stays(tmp_path: Path) -> None:
    """A tmpfs of 1 MB in a mount namespace of its own, which needs no root where the kernel allows it."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no mount namespaces")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["unshare", "-rm", "sh", "-c", IN_A_SMALL_DISK, "sh", str(disk)]
    command += [sys.executable, "-c", QUANTISE, str(good_gguf()), str(disk / "model")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DISK": str(disk)}, check=False)
    assert done.returncode == 6, done.stderr
    said, *left = done.stdout.splitlines()
    assert re.fullmatch(r"cannot write .*: no space left on the device", said)
    assert left == ["model", "the last good one"]


def test_space_is_asked_for_again_before_every_file(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.use_converter(tmp_path, good_gguf(), stub.COPIES, monkeypatch)
    free_bytes = {"now": 10**12}
    usage = shutil._ntuple_diskusage  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, free_bytes["now"]))
    for step, file in (("convert to f16", "f16"), ("quantise to q8_0", "q8_0")):
        free_bytes["now"] = 10**12

        def fill(line: str, step: str = step) -> None:  # somebody else writes meanwhile
            free_bytes["now"] = 1000 if line == step else free_bytes["now"]

        with pytest.raises(DiskError, match=f"the {file} file needs .* MB in .*, 0.0 MB are free"):
            export_run(run_dir, quantizations=["q8_0"], progress=fill)
    assert sorted(contents(run_dir).keys()) == sorted([".lock", "run.json", *adapter_and_merge(run_dir)])


def adapter_and_merge(run: Path) -> list[str]:
    return [name for name in contents(run) if name.startswith(("adapter/", "merged/"))]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_holds_no_export_is_refused_by_name_and_stays_as_it_is(run_dir: Path, force: bool) -> None:
    foreign_file(run_dir)
    before = contents(run_dir)
    with pytest.raises(DiskError, match=r"exists already and holds no export, but thesis\.md") as error:
        export_run(run_dir, quantizations=["q8_0"], force=force)
    assert error.value.exit_code == 6
    assert contents(run_dir) == before


def test_a_target_that_cannot_be_written_is_a_disk_error(run_dir: Path) -> None:
    (run_dir / "file").write_text("in the way")
    before = contents(run_dir)
    with pytest.raises(DiskError, match=r"a parent of the path is a file|a file is in the way"):
        export_run(run_dir, quantizations=["q8_0"], out_dir=run_dir / "file" / "export")
    assert contents(run_dir) == before | {".lock": contents(run_dir)[".lock"]}


# Signals

INTERRUPTIONS: dict[str, tuple[list[int], int]] = {
    "SIGINT": ([signal.SIGINT], 130),
    "SIGTERM": ([signal.SIGTERM], 143),
    "SIGTERM twice": ([signal.SIGTERM, signal.SIGTERM], 143),
    "SIGKILL": ([signal.SIGKILL], -9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_export_stopped_by_a_signal_keeps_the_old_one_and_leaves_no_process(
    run_dir: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, code = INTERRUPTIONS[name]
    old_export(run_dir)
    before = contents(run_dir)
    stub.use_converter(tmp_path, good_gguf(), stub.HANGS, monkeypatch)
    command = [sys.executable, "-m", "forge.training", "export", str(run_dir), "--quant", "q8_0", "--force"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(run_dir.glob(".export.*.part/.intermediate*/model.gguf")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = children_of(process.pid)
    assert children
    stopped = time.monotonic()
    for number in numbers:
        process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert time.monotonic() - stopped < 15
    assert process.returncode == code, said
    wait_for_end(children)
    assert {
        name: raw for name, raw in contents(run_dir).items() if not name.startswith((".lock", ".export."))
    } == before
    if code == 143 and len(numbers) == 1:
        assert "stopped by SIGTERM" in said
    if len(numbers) == 1 and code > 0:
        assert not list(run_dir.glob(".export.*"))
    stub.use_converter(tmp_path, good_gguf(), stub.COPIES, monkeypatch)
    export_run(run_dir, quantizations=["q8_0"], force=True)  # whatever was left, the next one cleans up and works
    assert not list(run_dir.glob(".export.*"))
    assert sorted(os.listdir(run_dir)) == [".lock", "adapter", "export", "merged", "run.json"]
    verify_gguf(run_dir / "export" / "lighthouse.q8_0.gguf")


# The command


@pytest.mark.parametrize("name", ["unfinished", "no run", "exists", "tool"])
def test_every_failure_is_one_json_document(
    run_dir: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = {
        "unfinished": (3, "is interrupted at step 7"),
        "no run": (3, "is not a run"),
        "exists": (6, "exists already"),
        "tool": (8, "the reason is on this line"),
    }[name]
    if name == "unfinished":
        record = json.loads((run_dir / "run.json").read_text())
        (run_dir / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    if name == "no run":
        (run_dir / "run.json").unlink()
    if name == "exists":
        foreign_file(run_dir)
    if name == "tool":
        stub.use_converter(tmp_path, good_gguf(), stub.EXITS, monkeypatch)
    capfd.readouterr()
    monkeypatch.setattr(_Stdout, "has_result", False)  # of a process, and this one has run commands before
    assert carry_out(app, ["export", str(run_dir), "--quant", "q8_0", "--json"]) == code
    document = json.loads(capfd.readouterr().out)
    assert document["exit_code"] == code
    assert said in document["error"]


def test_no_credential_reaches_a_child_a_log_or_a_file_and_no_path_of_this_machine_an_export(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_" + "x7Q" * 11
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("FORGE_SEEN_BY_CHILDREN", "yes")
    stub.use_converter(tmp_path, good_gguf(), stub.TELLS_ITS_ENVIRONMENT, monkeypatch)
    with pytest.raises(CheckError, match="converter refuses") as error:
        export_run(run_dir, quantizations=["q8_0"])
    environment = child_environment(tmp_path, monkeypatch)
    assert environment["FORGE_SEEN_BY_CHILDREN"] == "yes"
    stub.use_converter(tmp_path, good_gguf(), stub.COPIES, monkeypatch)
    assert carry_out(app, ["export", str(run_dir), "--quant", "q8_0"]) == 0
    printed = capfd.readouterr()
    assert secret not in str(error.value) + printed.out + printed.err + json.dumps(environment)
    for path, content in contents(run_dir).items():
        assert secret.encode() not in content, path
    for path, content in contents(run_dir / "export").items():
        for place in (tmp_path, shared_base(), Path.home(), Path.cwd()):
            assert f"{place}/".encode() not in content, path


def child_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    told = tmp_path / "environment.json"
    action = f"import json; json.dump(dict(os.environ), open({str(told)!r}, 'w')); sys.exit(3)"
    stub.use_converter(tmp_path, good_gguf(), action, monkeypatch)
    with pytest.raises(CheckError):
        gguf.convert_to_gguf(merged_dir(), scratch() / "never.gguf")
    found: dict[str, str] = json.loads(told.read_text())
    return found
