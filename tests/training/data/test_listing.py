"""Claim: a dataset is what git would publish: git is asked, and where it cannot be, the answer is the same."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from forge.training.data.corpus import build_corpus
from forge.training.data.discovery import discover
from forge.training.system.errors import DataError

IDENTITY = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *IDENTITY, *arguments], check=True, capture_output=True)


def repository(folder: Path, names: dict[str, str]) -> Path:
    for name, content in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    git(folder, "init", "-q")
    return folder


def kept(root: Path) -> set[str]:
    return {candidate.path for candidate in discover(root.resolve(), exclude=lambda path: False).candidates}


def skipped(root: Path) -> dict[str, str]:
    return {each.path: each.reason for each in discover(root.resolve(), exclude=lambda path: False).skipped}


@pytest.fixture(params=["git is there", "git is not installed"])
def has_git(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of knowing; the repositories are made before, by :func:`repository`."""
    return bool(request.param == "git is there")


def without_git(monkeypatch: pytest.MonkeyPatch, has_git: bool) -> None:
    if not has_git:
        monkeypatch.setenv("PATH", "/nowhere")


def test_ignore_files_above_the_named_folder_count_up_to_the_repositorys_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_git: bool
) -> None:
    (tmp_path / ".gitignore").write_text("*\n")  # above the top: of no repository
    files = {".gitignore": "*.tmp\n/book/notes/\n", "book/.gitignore": "!b.tmp\n", "book/a.md": "a", "book/b.tmp": "b"}
    root = repository(tmp_path / "r", files | {"book/c/c.tmp": "c", "book/notes/pay.md": "secret", "book/c/d.md": "d"})
    without_git(monkeypatch, has_git)
    assert kept(root / "book") == {".gitignore", "a.md", "b.tmp", "c/d.md"}
    assert skipped(root / "book") == dict.fromkeys(["c/c.tmp", "notes/"], "ignored by .gitignore")
    assert kept(root / "book" / "c") == {"d.md"}


def test_a_folder_that_git_ignores_has_no_documents_and_the_message_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_git: bool
) -> None:
    root = repository(tmp_path / "r", {".gitignore": "drafts/\n", "drafts/in/a.md": "a", "b.md": "b"})
    without_git(monkeypatch, has_git)
    for name in ("drafts", "drafts/in"):
        assert kept(root / name) == set()
        with pytest.raises(DataError, match="git ignores the folder itself"):
            build_corpus(root / name, tmp_path / "c.jsonl")


def test_the_repositorys_own_exclude_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_git: bool
) -> None:
    root = repository(tmp_path / "r", {"d/a.md": "a", "d/b.md": "b"})
    (root / ".git" / "info" / "exclude").write_text("/d/b*\n")
    without_git(monkeypatch, has_git)
    assert kept(root) == {"d/a.md"}
    assert kept(root / "d") == {"a.md"}


def test_what_is_tracked_counts_although_an_ignore_file_names_it(tmp_path: Path) -> None:
    root = repository(tmp_path / "r", {".gitignore": "*.cfg\nout/\n", "a.cfg": "a", "b.cfg": "b", "out/kept.md": "k"})
    (root / "gone.md").write_text("gone")
    git(root, "add", "-f", "a.cfg", "out/kept.md", "gone.md")
    (root / "gone.md").unlink()
    (root / "out" / "new.md").write_text("n")
    assert kept(root) == {".gitignore", "a.cfg", "out/kept.md"}
    assert skipped(root) == dict.fromkeys(["b.cfg", "out/new.md"], "ignored by .gitignore")


def test_without_git_the_user_is_told_what_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = repository(tmp_path / "r", {"a.md": "a"})
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.md").write_text("a")
    monkeypatch.setenv("PATH", "/nowhere")
    (note,) = build_corpus(root, tmp_path / "c.jsonl").notes
    assert "git is not installed" in note
    assert build_corpus(plain, tmp_path / "d.jsonl").notes == []


def test_a_users_own_excludes_file_counts_where_git_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = repository(tmp_path / "r", {"a.md": "a", "a.md~": "a"})
    (tmp_path / "excludes").write_text("*~\n")
    (tmp_path / "config").write_text(f"[core]\n\texcludesFile = {tmp_path / 'excludes'}\n")
    assert kept(root) == {"a.md", "a.md~"}
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    assert kept(root) == {"a.md"}


def test_a_hooks_environment_does_not_make_another_repository_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = repository(tmp_path / "other", {"x.md": "x"})
    root = repository(tmp_path / "r", {".gitignore": "b.md\n", "a.md": "a", "b.md": "b"})
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    assert kept(root) == {".gitignore", "a.md"}


def test_a_repositorys_config_runs_no_program(tmp_path: Path) -> None:
    root = repository(tmp_path / "r", {"a.md": "a"})
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    git(root, "config", "core.fsmonitor", str(program))
    assert kept(root) == {"a.md"}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("above", [True, False])
def test_submodules_are_read_with_their_own_rules_and_other_repositories_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: bool, has_git: bool
) -> None:
    part = repository(tmp_path / "part", {".gitignore": "*.log\n", "in.md": "i", "in.log": "l", "in.txt": "t"})
    git(part, "add", ".")
    git(part, "commit", "-qm", "part")
    root = repository(tmp_path / "whole" / "r", {".gitignore": "*.txt\n", "a.md": "a"})
    git(root, "submodule", "add", "-q", str(part), "sub")
    (root / "sub" / "in.log").write_text("again")
    repository(root / "clone", {"b.md": "b"})
    git(root / "clone", "add", ".")
    git(root / "clone", "commit", "-qm", "clone")
    without_git(monkeypatch, has_git)
    found, prefix = (root.parent, "r/") if above else (root, "")  # the folder above is of no repository
    expected = {".gitignore", ".gitmodules", "a.md", "sub/.gitignore", "sub/in.md", "sub/in.txt"}
    assert kept(found) == {prefix + name for name in expected}
    assert skipped(found)[f"{prefix}clone/"] == "another git repository"
    shutil.rmtree(root / "sub")
    (root / "sub").mkdir()
    if has_git:
        assert skipped(found)[f"{prefix}sub/"] == "submodule not checked out"


def test_a_repository_of_another_user_is_read_without_git_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = repository(tmp_path / "r", {".gitignore": "b.md\n", "a.md": "a", "b.md": "b"})
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    found = discover(root.resolve(), exclude=lambda path: False)
    assert {candidate.path for candidate in found.candidates} == {".gitignore", "a.md"}
    assert "dubious ownership" in found.notes[0]


def test_names_with_line_ends_and_quotes_are_names(tmp_path: Path) -> None:
    root = repository(tmp_path / "r", {'a "b"\n.md': "a", "é.md": "b", " c.md": "c"})
    (root / os.fsdecode(b"caf\xe9.md")).write_text("d")
    assert kept(root) == {'a "b"\n.md', "é.md", " c.md"}
    assert set(skipped(root).values()) == {"file name is not UTF-8"}


def test_forges_own_documents_are_found_wherever_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge.training.data import discovery

    root = repository(tmp_path / "r", {".gitignore": ".venv/\n", ".venv/embedded/a.md": "a"})
    monkeypatch.setattr(discovery, "__file__", str(root / ".venv" / "discovery.py"))
    assert kept(root / ".venv" / "embedded") == {"a.md"}


def test_an_ignored_output_of_an_earlier_call_is_not_counted(tmp_path: Path) -> None:
    root = repository(tmp_path / "r", {".gitignore": "*.jsonl\n", "a.md": "a"})
    first = build_corpus(root, root / "corpus.jsonl")
    again = build_corpus(root, root / "corpus.jsonl", force=True)
    assert (first.num_files, first.skipped) == (again.num_files, again.skipped) == (2, [])
