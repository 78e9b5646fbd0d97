"""What is read: nothing that hangs, escapes or is not text."""

from __future__ import annotations

import ctypes
import os
import socket
import tempfile
from pathlib import Path

import pytest

from forge.training.data.discovery import Candidate, Skipped, discover, read_text


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def walk(root: Path) -> tuple[set[str], dict[str, str]]:
    """Paths of the candidates, and the reason of each skipped path."""
    found = discover(root.resolve(), exclude=lambda path: False)
    return {c.path for c in found.candidates}, {s.path: s.reason for s in found.skipped}


def reason(path: Path, **limits: int) -> str:
    text = read_text(Candidate("x", str(path), os.lstat(path).st_size), max_bytes=limits.get("max_bytes", 1 << 20))
    assert isinstance(text, Skipped)
    return text.reason


def test_folders_of_tools_and_environments_are_not_entered(tmp_path: Path) -> None:
    files = [
        ".git/config",
        "node_modules/x/a.md",
        "src/__pycache__/a.txt",
        "env/pyvenv.cfg",
        "env/lib/a.py",
        "src/a.py",
    ]
    root = write(tmp_path, {**dict.fromkeys(files, "a"), "runs/x/workload.yaml": "a", "runs/x/.lock": "1"})
    kept, skipped = walk(root)
    assert kept == {"src/a.py"}
    assert set(skipped) == {"node_modules/", "src/__pycache__/", "env/", "runs/x/"}
    assert set(skipped.values()) == {"tool folder"}


def test_links_are_never_followed_and_those_that_leave_the_root_are_named(tmp_path: Path) -> None:
    root = write(tmp_path / "r", {"a.md": "a", "d/b.md": "b"})
    write(tmp_path, {"secret/passwd": "outside"})
    for name, target in {
        "out": "../secret",
        "d/out.md": "../../secret/passwd",
        "in.md": "a.md",
        "d/up": "..",
        "self": "self",
        "gone": "nowhere",
        "sibling": "../r-other",
    }.items():
        (root / name).symlink_to(target)
    write(tmp_path / "r-other", {"x.md": "x"})
    kept, skipped = walk(root)
    assert kept == {"a.md", "d/b.md"}
    leaves = {name for name, why in skipped.items() if why == "link that leaves the root"}
    assert leaves == {"out", "d/out.md", "sibling"}
    assert {name for name, why in skipped.items() if why == "link"} == {"in.md", "d/up", "self", "gone"}


def test_a_root_that_is_a_link_is_meant(tmp_path: Path) -> None:
    write(tmp_path / "r", {"a.md": "a"})
    (tmp_path / "link").symlink_to("r")
    assert walk(tmp_path / "link")[0] == {"a.md"}


@pytest.mark.timeout(20)
def test_a_fifo_and_a_socket_do_not_hang_the_walk(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.md")
    os.mkfifo(tmp_path / ".gitignore")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s.md"))
        assert walk(tmp_path) == (set(), dict.fromkeys([".gitignore", "pipe.md", "s.md"], "special file"))
    assert reason(tmp_path / "pipe.md") == "special file"  # exchanged after the walk


def test_a_file_exchanged_for_a_link_after_the_walk_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path, {"secret": "outside"})
    (tmp_path / "a.md").symlink_to("secret")
    assert reason(tmp_path / "a.md") == "unreadable"


def test_a_folder_exchanged_for_a_link_after_the_walk_leads_nowhere(tmp_path: Path) -> None:
    root = write(tmp_path / "r", {"d/a.md": "inside"})
    write(tmp_path, {"outside/a.md": "outside"})
    (found,) = discover(root, exclude=lambda path: False).candidates
    (root / "d").rename(tmp_path / "moved")
    (root / "d").symlink_to("../outside")
    text = read_text(found, max_bytes=99)
    assert isinstance(text, Skipped)
    assert text.reason == "exchanged while it was read"


def test_files_and_folders_that_may_not_be_read_are_named_and_passed_over() -> None:
    with tempfile.TemporaryDirectory() as name:  # not below pytest's own folder, which only its owner may enter
        os.chmod(name, 0o755)
        root = write(Path(name), {"a.md": "a", "closed.md": "b", "shut/c.md": "c"})
        os.chmod(root / "closed.md", 0)
        os.chmod(root / "shut", 0)
        libc, user = ctypes.CDLL(None), os.geteuid()
        libc.setfsuid(user or 65534)  # root may read everything: this thread gives it up for the while
        try:
            found = discover(root.resolve(), exclude=lambda path: False)
            read = [*found.skipped, *(read_text(f, max_bytes=99) for f in found.candidates)]
        finally:
            libc.setfsuid(user)
    assert "a" in read
    reasons = {s.path: (s.reason, s.detail) for s in read if isinstance(s, Skipped)}
    assert reasons == {"closed.md": ("unreadable", "Permission denied"), "shut/": ("unreadable", "Permission denied")}


@pytest.mark.parametrize(
    "name",
    [".env", ".env.local", "prod.env", "ID_RSA", "id_ed25519", ".netrc", "x.tfstate", ".git-credentials"],
)
def test_files_that_exist_to_hold_credentials_are_skipped_by_name(tmp_path: Path, name: str) -> None:
    others = ["id_rsa.pub", "environment.md", ".env.example", "sample.env", "chapter.asc", "server.pem", "keynote.key"]
    root = write(tmp_path, dict.fromkeys([name, *others], "harmless"))
    assert walk(root) == (set(others), {name: "credentials file"})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf \r\n\t", "empty"),
        (b"a\0b", "binary"),
        (b"\x89PNG\r\n\x1a\n\0\0", "binary"),
        (b"caf\xe9", "not UTF-8"),
        ("text".encode("utf-16"), "not UTF-8"),
        (b"\xed\xa0\x80", "not UTF-8"),
        (b"x" * 2000, "too large"),
    ],
)
def test_what_is_not_text_is_skipped_with_its_reason(tmp_path: Path, content: bytes, expected: str) -> None:
    write(tmp_path, {"a.md": content})
    assert reason(tmp_path / "a.md", max_bytes=1000) == expected


def test_a_huge_sparse_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.md", "wb") as stream:
        stream.truncate(2 << 30)
    assert reason(tmp_path / "a.md") == "too large"


def test_a_file_that_grew_after_the_walk_is_still_too_large(tmp_path: Path) -> None:
    write(tmp_path, {"a.md": b"x" * 2000})
    found = read_text(Candidate("a.md", str(tmp_path / "a.md"), 10), max_bytes=1000)
    assert isinstance(found, Skipped)


def test_text_keeps_everything_but_its_bom_and_crlf(tmp_path: Path) -> None:
    write(tmp_path, {"a.md": "\ufeff one\r\n\ttwo\u2028\r three \ufeff\n\n".encode()})
    assert (
        read_text(Candidate("a.md", str(tmp_path / "a.md"), 9), max_bytes=99) == " one\n\ttwo\u2028\r three \ufeff\n\n"
    )


def test_a_name_that_is_not_utf8_is_skipped_and_can_be_printed(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.md", "w") as stream:
        stream.write("a")
    kept, skipped = walk(tmp_path)
    assert not kept
    assert list(skipped.values()) == ["file name is not UTF-8"]
    assert next(iter(skipped)).isascii()


def test_what_cannot_be_read_is_a_reason_and_not_an_end(tmp_path: Path) -> None:
    write(tmp_path, {"a.md": "a"})
    assert isinstance(read_text(Candidate("b.md", str(tmp_path / "b.md"), 1), max_bytes=9), Skipped)
    assert walk(tmp_path / "gone") == (set(), {"": "unreadable"})
