"""Claim: ignore files say to Forge what they say to git, whatever is written in them."""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
import warnings
from pathlib import Path

import pytest

from forge.training.data.gitignore import is_covered, read_rules
from forge.training.data.listing import list_files

NAMES = [
    *("a", "b", "ab", "abc", "a.md", "b.txt", "a.log", ".a", "x1", "1", "A", "aXb", "z~", "a b", "a ", "a\tb", "é"),
    *("-", "]", "[a]", "!a", "#a", "*", "?", "\\a", "b\\", "^"),
]
PIECES = [
    *("a", "b", "ab", "abc", "1", "x", "X", "A", "é", ".md", ".txt", "#", "!", "-", "^", " ", "\t", "/", "/", "/"),
    *("*", "**", "***", "?", "*.", "**/", "a**/", "\\", "\\\\", "\\a", "\\ ", "\\/"),
    *("[", "]", "[ab]", "[!a]", "[^a]", "[a-c]", "[]a]", "[!]]", "[a-", "[c-a]", "[\\]]", "[--0]", "[a-c-z]", "[/]"),
    *("[[:digit:]]", "[[:alpha:]]", "[[:upper:]]b", "[[:foo:]]", "[[:alpha:]-z]", "[a[:digit:]", "[[:]"),
]
GLUED = re.compile(r"[^/*]\*\*")


def resembling(choose: random.Random, name: str) -> str:
    """A pattern that often matches the name."""
    return "".join(choose.choice([c, c, c, "?", "*", f"[{c}]", "[!q]", f"\\{c}", "[[:alpha:]]", "[ -z]"]) for c in name)


def pattern(choose: random.Random, names: list[str]) -> str:
    if choose.random() < 0.5:
        parts = [resembling(choose, choose.choice(names)), choose.choice(["*", "**", "a*", *NAMES])]
        text = choose.choice(["", "", "", "**/", "*/"]) + "/".join(parts[: choose.choice([1, 1, 2])])
    else:
        text = "".join(choose.choices(PIECES, k=choose.randint(1, 6)))
    begin = choose.choices(["", "!", "/", "!/"], [6, 3, 1, 1])[0]
    end = choose.choices(["", "/", " ", "  ", "\\ ", " \\ ", "\\\\ ", "\t", "\r"], [16, 4, 1, 1, 1, 1, 1, 1, 1])[0]
    return begin + text + end


def grow(folder: Path, choose: random.Random, depth: int, without: re.Pattern[str] | None) -> None:
    """A random tree with ignore files at all its levels."""
    folder.mkdir()
    names = choose.sample(NAMES, choose.randint(1, 6))
    for name in names:
        if depth and choose.random() < 0.5:
            grow(folder / name, choose, depth - 1, without)
        else:
            (folder / name).touch()
    lines = [pattern(choose, names) for _ in range(choose.randint(1, 5))]
    kept = [line for line in lines if without is None or not without.search(line)]
    (folder / ".gitignore").write_bytes(
        choose.choice(["", "", "\ufeff"]).encode() + "\n".join(kept).encode() + choose.choice([b"", b"\n"])
    )


def git_lists(tree: Path, elsewhere: Path) -> set[str]:
    """What git lists of a folder whose repository is elsewhere, so that Forge cannot ask it."""
    if not elsewhere.exists():
        subprocess.run(["git", "init", "-q", str(elsewhere)], check=True)
    command = [
        "git",
        f"--git-dir={elsewhere}/.git",
        f"--work-tree={tree}",
        "ls-files",
        "-co",
        "--exclude-standard",
        "-z",
    ]
    listed = subprocess.run(command, check=True, capture_output=True, cwd=tree).stdout
    return {os.fsdecode(name) for name in listed.split(b"\0") if name}


def own_lists(tree: Path) -> set[str]:
    listing = list_files(tree, stays_out=lambda folder: False)
    assert listing.notes == []
    return set(listing.files)


@pytest.fixture(scope="module")
def glued(tmp_path_factory: pytest.TempPathFactory) -> re.Pattern[str] | None:
    """Patterns about which releases of git differ, where this one is not of those that Forge follows."""
    tree = tmp_path_factory.mktemp("glued") / "tree"
    (tree / "ax").mkdir(parents=True)
    (tree / "ab").touch()
    (tree / ".gitignore").write_text("/a**/b\n")
    return GLUED if "ab" in git_lists(tree, tree.with_name("git")) else None


@pytest.mark.parametrize(
    ("first", "num"), [(0, 400), pytest.param(10_000, 6000, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_on_random_trees_and_patterns_there_is_no_difference_to_git(
    tmp_path: Path, glued: re.Pattern[str] | None, first: int, num: int
) -> None:
    """Each of the trees is a folder of one large one, with files of its own that hide and take in again."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for seed in range(first, first + num):
        grow(tree / str(seed), random.Random(seed), 2, glued)
    with warnings.catch_warnings(action="error"):
        own = own_lists(tree)
    git = git_lists(tree, tmp_path / "git")
    assert sorted(own - git) == []
    assert sorted(git - own) == []
    everything = sum(len(files) for _, _, files in os.walk(tree))
    assert min(len(git), everything - len(git)) > 1.5 * num  # neither side says yes or no to everything


RE_INCLUDED = {
    "a folder taken in again does not take in what is in it": ("/*\n!/keep/\n/keep/*\n!/keep/a.md\n", {"keep/a.md"}),
    "nothing below a hidden folder comes back": ("keep/\n!keep/a.md\n", {"other/a.md", "other/private.txt"}),
    "names hidden everywhere stay hidden in it": ("keep\n!/keep\n*.txt\n", {"keep/a.md", "other/a.md"}),
    "all folders, but no file": ("*\n!*/\n", set()),
    "all folders and one kind": ("*\n!*/\n!*.md\n", {"keep/a.md", "other/a.md"}),
    "stars between": ("**/private.*\n", {"keep/a.md", "other/a.md"}),
    "a class": ("[[:alpha:]]*/[^a]*\n", {"keep/a.md", "other/a.md"}),
}


@pytest.mark.parametrize("case", RE_INCLUDED)
def test_a_folder_taken_in_again_keeps_its_private_files_private(tmp_path: Path, case: str) -> None:
    content, expected = RE_INCLUDED[case]
    tree = tmp_path / "tree"
    for folder in ("keep", "other"):
        (tree / folder).mkdir(parents=True)
        for name in ("a.md", "private.txt"):
            (tree / folder / name).touch()
    (tree / ".gitignore").write_text(content)
    assert own_lists(tree) - {".gitignore"} == expected
    assert git_lists(tree, tmp_path / "git") - {".gitignore"} == expected


def test_every_class_holds_the_bytes_that_it_holds_for_git(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for byte in range(1, 256):
        if byte != ord("/"):
            Path(os.fsdecode(bytes(tree) + b"/x" + bytes([byte]))).touch()
    for name in (
        "alnum",
        "alpha",
        "blank",
        "cntrl",
        "digit",
        "graph",
        "lower",
        "print",
        "punct",
        "space",
        "upper",
        "xdigit",
    ):
        (tree / ".gitignore").write_text(f"?[[:{name}:]]\n")
        listed = own_lists(tree)
        assert listed == git_lists(tree, tmp_path / "git")
        assert 100 < len(listed) < 255


def test_a_link_or_a_pipe_is_no_ignore_file(tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("*.md\n")
    for name in ("linked", "piped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.md").touch()
    (tmp_path / "linked" / ".gitignore").symlink_to("../rules")
    os.mkfifo(tmp_path / "piped" / ".gitignore")
    assert {"linked/a.md", "piped/a.md"} <= own_lists(tmp_path)


@pytest.mark.parametrize("glob", ["*a" * 30 + "b", "/" + "**/a/" * 30 + "b", "*?" * 40 + "b"])
def test_no_pattern_takes_exponential_time(glob: str) -> None:
    rules = [read_rules(glob.encode())]
    started = time.process_time()
    assert not is_covered(b"a" * 200, rules)
    assert not is_covered(b"a/" * 200 + b"c", rules)
    assert time.process_time() - started < 2
