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
    *("-", "]", "[a]", "!a", "#a", "*", "?", "\\a", "^"),
]
PIECES = [
    *("a", "b", "ab", "abc", "1", "x", "X", "A", "é", ".md", ".txt", "#", "!", "-", "^", " ", "\t", "/", "/", "/"),
    *(
        "*",
        "**",
        "***",
        "?",
        "*.",
        "\\",
        "\\a",
        "\\ ",
        "\\/",
        "[",
        "]",
        "[ab]",
        "[!a]",
        "[^a]",
        "[a-c]",
        "[]a]",
        "[!]]",
    ),
    *("[a-", "[\\]]", "[--0]", "[/]", "[[:digit:]]", "[[:alpha:]]", "[[:upper:]]b", "[[:punct:]]", "[[:space:]]"),
    *("[[:foo:]]", "[[:alpha:]-z]", "[a[:digit:]", "[[:]", "[c-a]"),
]
GLUED = re.compile(r"[^/*]\*\*")


def pattern(choose: random.Random) -> str:
    if choose.random() < 0.35:
        parts = choose.choices([*NAMES, "*", "**", "a*", "*b"], k=choose.randint(1, 3))
        text = "/".join(parts)
    else:
        text = "".join(choose.choices(PIECES, k=choose.randint(1, 6)))
    begin = choose.choices(["", "!", "/", "!/"], [5, 3, 1, 1])[0]
    end = choose.choices(["", "/", " ", "  ", "\\ ", " \\ ", "\t", "\r"], [12, 4, 1, 1, 1, 1, 1, 1])[0]
    return begin + text + end


def ignore_file(choose: random.Random, allowed: re.Pattern[str] | None) -> bytes:
    lines = [pattern(choose) for _ in range(choose.randint(1, 5))]
    kept = [line for line in lines if allowed is None or not allowed.search(line)]
    return choose.choice(["", "", "\ufeff"]).encode() + "\n".join(kept).encode() + choose.choice([b"", b"\n"])


def grow(folder: Path, choose: random.Random, depth: int, without: re.Pattern[str] | None) -> None:
    """A random tree with ignore files at all its levels."""
    folder.mkdir()
    for name in choose.sample(NAMES, choose.randint(1, 6)):
        if depth and choose.random() < 0.5:
            grow(folder / name, choose, depth - 1, without)
        else:
            (folder / name).touch()
    if depth == 3 or choose.random() < 0.45:
        (folder / ".gitignore").write_bytes(ignore_file(choose, without))


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
        grow(tree / str(seed), random.Random(seed), 3, glued)
    with warnings.catch_warnings(action="error"):
        own = own_lists(tree)
    git = git_lists(tree, tmp_path / "git")
    assert sorted(own - git) == []
    assert sorted(git - own) == []
    everything = sum(len(files) for _, _, files in os.walk(tree))
    assert min(len(git), everything - len(git)) > 3 * num  # neither side says yes or no to everything


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
    names = [
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
    ]
    characters = [bytes([byte]) for byte in range(1, 256) if byte not in b"/"]
    for name in names:
        (tree / name).mkdir()
        (tree / name / ".gitignore").write_text(f"?[[:{name}:]]\n")
        for character in characters:
            Path(os.fsdecode(bytes(tree / name) + b"/x" + character)).touch()
    assert own_lists(tree) == git_lists(tree, tmp_path / "git")


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
