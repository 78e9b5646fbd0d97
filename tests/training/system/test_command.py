"""Running a command: with --json stdout is one JSON document, whatever happens and whoever prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge.training.system.environment import ROOT
from forge.training.system.errors import ForgeError

NOISE = "print('noise'); os.system('echo noise'); os.write(1, b'noise'); "
FAILURES = {
    "raise CheckError('no\\x1b[31m\\nline two', remedy='mend it')": (8, "no\x1b[31m\nline two"),
    "raise ZeroDivisionError('by zero')": (1, "ZeroDivisionError: by zero"),
    "raise OSError(28, 'No space left on device', '/some/file')": (6, "cannot write /some/file: no space left"),
    "raise KeyboardInterrupt": (130, "interrupted"),
    "raise SystemExit(5)": (5, "exit code 5"),
    "raise typer.Exit(7)": (7, "exit code 7"),
    "raise RecursionError": (1, "RecursionError"),
    "raise MemoryError": (1, "MemoryError"),
    "print_json({'rows': 1}); raise typer.Exit(3)": (3, None),
    "print_json({'path': os.fsdecode(b'caf\\xe9')}); raise typer.Exit(3)": (3, None),
    "raise DataError(os.fsdecode(b'caf\\xe9') + ' is bad')": (3, "caf\udce9 is bad"),
}


def run(body: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    code = (
        "import os, sys, typer\n"
        "from forge.training.system.command import carry_out, print_json\n"
        "from forge.training.system.errors import CheckError, DataError\n"
        "app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)\n"
        "@app.command()\n"
        "def go(as_json: bool = typer.Option(False, '--json')) -> None:\n"
        f"    {NOISE}{body}\n"
        "sys.exit(carry_out(app, sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, env=environment, timeout=60, check=False
    )


@pytest.mark.parametrize("body", FAILURES)
def test_every_failure_is_one_json_document_on_stdout_and_one_message_on_stderr(body: str) -> None:
    code, message = FAILURES[body]
    done = run(body, "--json")
    assert done.returncode == code, done.stderr
    document = json.loads(done.stdout.decode("utf-8"))
    assert done.stderr.count(b"noise") == 3
    if message is None:
        assert document in ({"rows": 1}, {"path": "caf\udce9"})
        return
    assert document["exit_code"] == code
    assert document["error"].startswith(message)
    assert b"\x1b" not in done.stderr
    assert (b"Traceback" in done.stderr) == (code == 1)  # a bug's place is told; a user's mistake has none


def test_wrong_usage_is_a_json_document_too() -> None:
    done = run("pass", "--json", "--no-such-option")
    assert done.returncode == 2
    assert "--no-such-option" in json.loads(done.stdout)["error"]


def test_without_json_stdout_is_the_commands_own() -> None:
    done = run("raise CheckError('no', remedy='mend it')")
    assert done.returncode == 8
    assert done.stdout.count(b"noise") == 3
    assert done.stderr == b"error: no\n  -> mend it\n"


def test_success_is_the_result_alone() -> None:
    done = run("print_json({'rows': 2})", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"rows": 2})


def test_every_error_has_an_exit_code_of_the_documented_ones() -> None:
    documented = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    kinds = [kind for kind in ForgeError.__subclasses__() if kind.__name__ != "Interrupted"]
    codes = [kind.exit_code for kind in kinds]
    assert sorted(codes) == list(range(2, 10))
    assert all(f"| {code} |" in documented for code in (0, 1, *codes))


@pytest.mark.parametrize(
    "settings", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252:strict"}, {"LC_ALL": "C"}]
)
@pytest.mark.parametrize("utf8", ["0", "1"])
def test_a_console_that_cannot_show_a_letter_costs_that_letter(
    settings: dict[str, str], utf8: str, tmp_path: Path
) -> None:
    program = (
        "import sys, typer\n"
        "from forge.training.cli import logs, results\n"
        "from forge.training.system.command import carry_out\n"
        "from forge.training.system.errors import CheckError\n"
        "def app(**_):\n"
        "    typer.echo('caf\\xe9 \\u2713')\n"
        "    sys.stdout.write('\\u2192\\n')\n"
        "    results().print('\\U0001f40c', 'snail')\n"
        "    logs().print('\\u2026 loading')\n"
        "    raise CheckError('no \\u2192 way')\n"
        "sys.exit(carry_out(app, ['go']))\n"
    )
    (tmp_path / "program.py").write_text(program)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_", "LANG"))}
    environment = {**kept, "PYTHONPATH": str(ROOT), "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0", **settings}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, env=environment, timeout=25, check=False
    )
    assert (done.returncode, b"Traceback" in done.stderr) == (8, False), done.stderr
    assert b"snail" in done.stdout
    assert b"loading" in done.stderr
    assert b"way" in done.stderr


def run_as_module(program: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run by ``-m`` as Forge is: only there does the interpreter end itself by SIGINT after all."""
    (folder / "stopped_program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    command = [sys.executable, "-m", "stopped_program"]
    return subprocess.run(command, capture_output=True, env=environment, timeout=25, check=False)


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
@pytest.mark.parametrize("where", ["os.kill(os.getpid(), {})", "exec('os.kill(os.getpid(), {})')"])
@pytest.mark.parametrize("met", ["raise", "raise ImportError('half of a module')", "raise SystemExit(1)"])
def test_a_signal_ends_a_command_with_its_code_wherever_it_is_met(
    met: str, where: str, number: int, code: int, tmp_path: Path
) -> None:
    """Outside the command line's own net, turned into something else by a library, and out of executed text."""
    program = (
        "import os, sys\n"
        "from forge.training.system.command import carry_out\n"
        "def app(**_):\n"
        "    try:\n"
        f"        {where.format(number)}\n"
        "    except KeyboardInterrupt:\n"
        f"        {met}\n"
        "sys.exit(carry_out(app, ['go']))\n"
    )
    done = run_as_module(program, tmp_path)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert done.stderr.startswith(b"error: stopped by SIG")


def test_a_signal_waits_for_an_extension_module_that_is_being_loaded(tmp_path: Path) -> None:
    """An exception in its initialisation aborts the process (C++), or comes out as an ImportError."""
    program = (
        "import os, sys, time\n"
        "from importlib.machinery import ExtensionFileLoader\n"
        "from forge.training.system.command import carry_out\n"
        "class Loader(ExtensionFileLoader):\n"
        "    def exec_module(self, module):\n"
        "        os.kill(os.getpid(), 15)\n"
        "        time.sleep(0.2)\n"
        "        print('loaded', flush=True)\n"
        "def app(**_):\n"
        "    Loader('none', 'none.so').exec_module(None)\n"
        "    time.sleep(30)\n"
        "    print('went on')\n"
        "sys.exit(carry_out(app, ['go']))\n"
    )
    done = run_as_module(program, tmp_path)
    assert (done.returncode, done.stdout) == (143, b"loaded\n"), done.stderr
