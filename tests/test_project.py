"""The house: set-up is complete or absent, pins are exact and agree, the GPU bundle forgets nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from pytest_socket import SocketBlockedError

from forge.training.system.environment import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import build_llama_cpp
import check_pins
import gpu_bundle
import set_up

from forge.training.checks.packages import SECURITY_FLOORS

REQUIREMENTS = ["requirements-cpu.txt", "requirements-gpu.txt", "requirements-legacy.txt"]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@pytest.fixture
def quiet_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip may look nowhere but in the folders that a test names."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


# Pins


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_is_an_exact_pin(name: str) -> None:
    assert len(gpu_bundle.read_pins(ROOT / name)) > 80


def test_a_loose_requirement_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "requirements-x.txt").write_text("# why\ntorch==2.11.0  # exact\ntrl>=1.15\n")
    with pytest.raises(build_llama_cpp.BuildError, match=r"requirements-x.txt, line 3: 'trl>=1.15'"):
        gpu_bundle.read_pins(tmp_path / "requirements-x.txt")


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_pins_are_above_the_security_floors_whose_reason_stands_beside_them(name: str) -> None:
    pins, text = gpu_bundle.read_pins(ROOT / name), (ROOT / name).read_text(encoding="utf-8")
    for package, (floor, why) in SECURITY_FLOORS.items():
        if package not in pins:
            continue
        identifier = why.partition(":")[0]
        if (name, package) == ("requirements-legacy.txt", "transformers"):  # its own pin, and said at the top
            assert identifier in text.partition("\n\n")[0]
            continue
        assert numbers(pins[package]) >= numbers(floor)
        above = text.partition(f"\n{package}==")[0].splitlines()
        beside = "\n".join(above[-3:])
        assert f"Floor {floor}. {identifier}" in beside


def test_an_installation_without_pins_has_the_same_security_floors() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = dict(entry.split(">=") for entry in project["dependencies"])
    assert all(numbers(asked[package]) >= numbers(floor) for package, (floor, _) in SECURITY_FLOORS.items())


def test_cpu_and_gpu_train_with_the_same_stack() -> None:
    cpu, gpu = (gpu_bundle.read_pins(ROOT / name) for name in REQUIREMENTS[:2])
    stack = ["transformers", "trl", "peft", "accelerate", "datasets", "pytest-benchmark", "pydantic", "typer"]
    assert [cpu[name] for name in stack] == [gpu[name] for name in stack]


def test_the_legacy_arm_has_the_pins_of_the_legacy_pipeline() -> None:
    legacy = gpu_bundle.read_pins(ROOT / "requirements-legacy.txt")
    pins = {"trl": "0.26.2", "transformers": "4.57.3", "peft": "0.18.0"}
    pins |= {"accelerate": "1.12.0", "datasets": "4.4.2", "bitsandbytes": "0.49.0"}
    assert {name: legacy[name] for name in pins} == pins


def test_pins_that_resolve_otherwise_are_listed_one_by_one() -> None:
    differences = check_pins.compare({"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"})
    assert differences == [
        "b: pinned 1, resolves to 2",
        "c: pinned 1, but nothing needs it",
        "d: installed as 1, but not pinned",
    ]


def test_what_the_project_imports_is_pinned_for_the_cpu() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["harness"]
    names = {gpu_bundle.canonical_name(entry.partition(">=")[0].partition("==")[0]) for entry in wanted}
    assert names <= gpu_bundle.read_pins(ROOT / "requirements-cpu.txt").keys()


# Set-up


@pytest.mark.slow
def test_a_set_up_is_made_anew_only_where_it_failed_or_its_pins_changed(
    tmp_path: Path, quiet_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    requirements, environment = tmp_path / "requirements.txt", tmp_path / "env"

    def makes_anew(text: str) -> bool:
        """Whether these requirements make the environment, and nothing of the one before is left in it."""
        requirements.write_text(text)
        (environment / "left-behind").touch()
        is_made = set_up.set_up(environment, requirements, with_llama_cpp=False, editable=None)
        assert (environment / "left-behind").exists() is not is_made
        return is_made

    requirements.write_text("no-such-package==1\n")
    assert set_up.main([str(environment), str(requirements)]) == 4
    assert "error: could not install requirements.txt" in capfd.readouterr().err
    assert makes_anew("# none\n"), "what failed is not taken for complete"
    assert not makes_anew("# none\n")
    assert not makes_anew("# none, for another reason\n\n")
    assert makes_anew("--no-index\n")


def test_an_interpreter_that_is_too_old_is_refused_with_the_way_out() -> None:
    with pytest.raises(build_llama_cpp.BuildError, match=r"is Python 3\.\d+\.\d+; 3.99 or newer is needed"):
        set_up.check_interpreter((3, 99))


def test_a_python_without_venv_is_refused_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(build_llama_cpp.BuildError, match="apt-get install python3-venv"):
        set_up.check_interpreter((3, 11))


# llama.cpp


def sdist_with(folder: Path, names: list[str]) -> Path:
    """A source distribution with these members, each holding its own name."""
    path = folder / f"llama_cpp_python-{build_llama_cpp.VERSION}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            info = tarfile.TarInfo(f"llama_cpp_python-{build_llama_cpp.VERSION}/{name}")
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    return path


def test_only_the_converters_files_are_unpacked(tmp_path: Path) -> None:
    inside = [f"vendor/llama.cpp/{name}" for name in (*build_llama_cpp.TREE_NEEDED, "gguf-py/gguf/__init__.py")]
    outside = ["setup.py", "vendor/llama.cpp/src/llama.cpp", "vendor/llama.cpp/conversion/../../escape.py"]
    build_llama_cpp.unpack_tree(sdist_with(tmp_path, inside + outside), tmp_path / "tree")
    found = {
        path.relative_to(tmp_path / "tree").as_posix() for path in (tmp_path / "tree").rglob("*") if path.is_file()
    }
    assert found == {name.removeprefix("vendor/llama.cpp/") for name in inside}
    assert not (tmp_path / "escape.py").exists()


def test_a_source_distribution_without_the_converter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(build_llama_cpp.BuildError, match=r"lacks .*convert_hf_to_gguf.py"):
        build_llama_cpp.unpack_tree(sdist_with(tmp_path, ["vendor/llama.cpp/LICENSE"]), tmp_path / "tree")


def test_another_source_distribution_is_refused_before_it_is_run(
    tmp_path: Path, quiet_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    sdist_with(index, ["pyproject.toml"])
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build_llama_cpp, "BUILD_TOOLS", ("pip",))  # there already: no network
    with pytest.raises(build_llama_cpp.BuildError, match=r"(?s)could not fetch.*DO NOT MATCH THE HASHES"):
        build_llama_cpp.provide_llama_cpp()
    assert not build_llama_cpp.cache_directory().exists()
    assert not list((tmp_path / "cache").glob("*-building-*"))


def test_a_machine_without_a_compiler_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build_llama_cpp.BuildError, match=r"apt-get install g\+\+"):
        build_llama_cpp.provide_llama_cpp()


@pytest.mark.parametrize("damage", ["build.json", "wheel/x.whl", "llama.cpp/LICENSE"])
def test_an_incomplete_cache_is_not_used(tmp_path: Path, damage: str) -> None:
    for name in ["wheel/x.whl", *(f"llama.cpp/{name}" for name in build_llama_cpp.TREE_NEEDED)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "build.json").write_text(json.dumps(build_llama_cpp.made_from()))
    assert build_llama_cpp.find_complete(tmp_path) == tmp_path / "wheel/x.whl"
    (tmp_path / damage).unlink()
    assert build_llama_cpp.find_complete(tmp_path) is None


def test_what_a_killed_build_left_is_cleared_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    left = tmp_path / f"llama_cpp_python-{build_llama_cpp.VERSION}-building-x" / "new"
    left.mkdir(parents=True)
    with build_llama_cpp.locked(build_llama_cpp.cache_directory()):
        assert not left.parent.exists()


# GPU bundle


def test_the_bundle_holds_all_that_is_pinned_and_not_there() -> None:
    gpu, legacy = (gpu_bundle.read_pins(ROOT / name) for name in REQUIREMENTS[1:])
    site, old = gpu_bundle.choose_packages(gpu, gpu), gpu_bundle.choose_packages(legacy, gpu)
    assert {
        "unsloth",
        "unsloth-zoo",
        "trl",
        "datasets",
        "bitsandbytes",
        "xformers",
        "pydantic",
        "evaluate",
    } <= site.keys()
    assert not {"torch", "triton", "transformers", "numpy", "nvidia-cublas"} & site.keys()
    assert {"trl", "transformers", "peft", "accelerate", "tokenizers", "huggingface-hub", "pydantic"} <= old.keys()
    assert not {"torch", "triton", "numpy"} & old.keys()
    assert "nvidia-ml-py" in site


def test_a_file_that_occurs_twice_is_stored_once_and_unpacks_twice(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    for name in ["site/a.so", "legacy/a.so", "site/empty.py", "legacy/empty.py"]:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(b"" if "empty" in name else os.urandom(100_000))
    (staging / "legacy/a.so").write_bytes((staging / "site/a.so").read_bytes())
    files = gpu_bundle.describe_files(staging)
    (staging / "MANIFEST.json").write_text("{}")
    archive = tmp_path / "bundle.tar.gz"
    gpu_bundle.write_archive(staging, files, archive)
    assert archive.stat().st_size < 150_000
    subprocess.run(["tar", "xzf", str(archive), "-C", str(tmp_path)], check=True)
    for name, entry in files.items():
        unpacked = (tmp_path / "forge-gpu-bundle" / name).read_bytes()
        assert hashlib.sha256(unpacked).hexdigest() == entry["sha256"]


def test_a_bundle_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bundle, "LIMIT_BYTES", 100)
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging/MANIFEST.json").write_bytes(os.urandom(1000))
    with pytest.raises(build_llama_cpp.BuildError, match="more than 100"):
        gpu_bundle.write_archive(tmp_path / "staging", {}, tmp_path / "bundle.tar.gz")
    assert not (tmp_path / "bundle.tar.gz").exists()


def test_only_loadable_gpu_libraries_are_kept(tmp_path: Path) -> None:
    kept = ["bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so", "trl/x.py"]
    dropped = ["bitsandbytes/libbitsandbytes_rocm72.so", "studio/app.py", "dill/tests/x.py", "trl/__pycache__/x.pyc"]
    dropped += ["xformers/_C.so", "torchao/_C_cutlass_90a.abi3.so", "bin/unsloth"]
    for name in kept + dropped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    gpu_bundle.prune(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in gpu_bundle.walk_files(tmp_path)] == sorted(kept)


@pytest.mark.network
def test_the_bundle_of_the_pinned_packages_is_small_complete_and_loads_llama_cpp(tmp_path: Path) -> None:
    archive = tmp_path / "bundle.tar.gz"
    summary = gpu_bundle.build_bundle(archive, build_llama_cpp.cache_directory())
    assert archive.stat().st_size < 60_000_000
    subprocess.run(["tar", "xzf", str(archive), "-C", str(tmp_path)], check=True)
    root = tmp_path / "forge-gpu-bundle"
    files = json.loads((root / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
    assert sum(entry["bytes"] for entry in files.values()) == summary["unpacked_bytes"]
    assert all(
        hashlib.sha256((root / name).read_bytes()).hexdigest() == entry["sha256"] for name, entry in files.items()
    )
    for name in [
        "site/unsloth",
        "site/unsloth_zoo",
        "site/trl",
        "legacy/trl",
        "legacy/transformers",
        "llama.cpp/LICENSE",
    ]:
        assert (root / name).exists()
    code = "import llama_cpp; print(llama_cpp.__file__, llama_cpp.llama_supports_mmap())"
    command = ["bash", "-c", f'source "$0/activate.sh" && "$1" -c "{code}"', str(root), sys.executable]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.split() == [str(root / "site/llama_cpp/__init__.py"), "True"]


# No network


@pytest.mark.parametrize(
    "command",
    [
        ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/9"],
        [sys.executable, "-I", "-c", "import socket; socket.create_connection(('127.0.0.1', 9), 5)"],
        [sys.executable, "-I", "-c", "import socket; socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)"],
        [sys.executable, "-I", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9', timeout=5)"],
        ["env", "-i", sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9), 5)"],
    ],
    ids=["bash", "TCP", "UDP", "HTTP", "without environment"],
)
def test_no_process_that_a_test_starts_has_a_network(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "Permission denied" in done.stderr  # the kernel's refusal, not that nobody listens


@pytest.mark.parametrize("attempt", ["socket.getaddrinfo('example.org', 80)", "urllib.request.urlopen('http://[::1]')"])
def test_a_process_that_looks_for_a_network_can_be_made_to_end_there(attempt: str) -> None:
    code = "import socket, urllib.request\nfrom tests.support.no_network import end_at_a_connection\n"
    code += f"end_at_a_connection()\n{attempt}"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 77


def test_no_test_has_a_network() -> None:
    with pytest.raises((SocketBlockedError, PermissionError)):
        socket.create_connection(("127.0.0.1", 9), 5)
    with socket.socketpair()[0]:
        pass  # between processes of this machine sockets work


# The Makefile and the llama.cpp version


def test_plain_make_lists_every_target() -> None:
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY:")).split()[1:]
    assert [line.split()[1] for line in shown.splitlines()] == phony


def test_set_up_and_export_mean_the_same_llama_cpp() -> None:
    from forge.training.llamacpp.install import VERSION
    from forge.training.system.files import cache_dir

    assert build_llama_cpp.VERSION == VERSION
    assert build_llama_cpp.cache_directory() == cache_dir() / f"llama_cpp_python-{VERSION}"


# Where things are


def test_architectures_tree_names_every_module() -> None:
    tree = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## The tree")[2]
    names = set(re.findall(r"\w+", tree))
    by_folder = ("sections", "charts", "page")  # of harness/report: a line per folder
    modules = [path for package in ("forge", "harness") for path in (ROOT / package).rglob("*.py")]
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in modules
        if path.stem not in names | {"__init__", "conftest"} and path.parent.name not in by_folder
    ]
    assert missing == []


def test_no_test_reads_the_results_that_are_kept() -> None:
    """They may be retired; records that tests read are in tests/data. The README's figures are compared with theirs."""
    kept = re.compile("docs/" + r"results|\"docs\" */ *\"results")
    found = [path for path in (ROOT / "tests").rglob("*.py") if kept.search(path.read_text(encoding="utf-8"))]
    own = Path(__file__)
    assert sorted(found) == sorted([own.with_name("scripts") / "test_gate_stretch.py", own.with_name("test_readme.py")])


def test_no_file_of_the_tests_has_more_than_410_lines() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {path.name: number for path, number in lines.items() if number > 410} == {}


def test_no_test_imports_from_another() -> None:
    """What two of them need is in tests/support, or a fixture of their folder's conftest.py."""
    pattern = re.compile(r"^\s*(?:from|import) +tests\.(?!support\b)", re.MULTILINE)
    found = [path for path in (ROOT / "tests").rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []
