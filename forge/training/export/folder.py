"""An export's folder: which of its files are an export's own, of what they were made, and how new ones get in.

A file is an export's own if ``export.json`` or ``SHA256SUMS`` of its folder lists it. Nothing else is ever replaced or
deleted. New files are made beside the folder and moved in at the end, ``SHA256SUMS`` last.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from forge.training.export.card import ExportRecord
from forge.training.models.digests import remember_sha256, remembered_sha256
from forge.training.system.errors import DataError, DiskError
from forge.training.system.files import flush, read_json_object, staged_directory

RECORD, SUMS = "export.json", "SHA256SUMS"
TEXTS = ("Modelfile", "README.md")
_BOTH_WAYS = "pass --force to replace it, or name another folder with --out"


@dataclass(frozen=True)
class ExportFolder:
    """A folder as it is before an export. ``own``: names of an export's files, also of those that are gone."""

    path: Path
    own: frozenset[str]

    @classmethod
    def look(cls, path: Path) -> ExportFolder:
        """Raises :class:`DiskError` for what is no folder, or one with files and without an export."""
        if not path.is_dir():
            if path.is_symlink() or path.exists():
                raise DiskError(f"{path} exists already and is not a folder", remedy="name a folder with --out")
            return cls(path, frozenset())
        if os.path.ismount(path):  # nothing can be renamed into it from beside it
            raise DiskError(f"{path} is a mount point", remedy=f"name a folder in it: --out {path / 'export'}")
        own = frozenset(_listed_names(path))
        foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in own)
        if foreign and not own:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise DiskError(
                f"{path} exists already and holds no export, but {foreign[0]}{more}",
                remedy="name another folder with --out: an export deletes nothing that it did not make",
            )
        return cls(path, own)

    @property
    def place(self) -> Path:
        """The folder itself where ``path`` is a link, so that what is made beside it is on the same disk."""
        return Path(os.path.realpath(self.path))

    def refuse_taken(self, names: Iterable[str]) -> None:
        """Raise :class:`DiskError` if a file that is not an export's own has one of these names."""
        taken = [name for name in names if name not in self.own and os.path.lexists(self.path / name)]
        if taken:
            raise DiskError(
                f"{self.path / taken[0]} exists already and is not of this export ({RECORD} does not list it)",
                remedy="move it away, or name another folder with --out",
            )

    def stored(self) -> ExportRecord | None:
        """The record of the export that is there, its files unchanged; those that were deleted are left out.

        ``None`` where there is none. Raises :class:`DataError` for a record that is not readable and for a file that
        is not what the record says.
        """
        if not self.own:
            return None
        content = read_json_object(self.path / RECORD) if (self.path / RECORD).is_file() else {}
        try:
            record = TypeAdapter(ExportRecord).validate_python({**content, "out_dir": str(self.path)})
        except ValidationError as error:
            raise DataError(f"{self.path / RECORD} is not readable as an export's record", remedy=_BOTH_WAYS) from error
        there = {report.name for report in record.all_files() if (self.path / report.name).is_file()}
        for report in record.all_files():
            if report.name in there and remembered_sha256(self.path / report.name) != report.sha256:
                raise DataError(
                    f"{self.path / report.name} was changed since: {RECORD} names other content", remedy=_BOTH_WAYS
                )
        record.files[:] = [report for report in record.files if report.name in there]
        if record.adapter_file is not None and record.adapter_file.name not in there:
            return ExportRecord(**{**vars(record), "adapter_file": None})
        return record

    def edited_texts(self) -> list[str]:
        """Which of :data:`TEXTS` are there and are not as the export wrote them: their user's own by now."""
        sums = _read_sums(self.path)
        there = [name for name in TEXTS if name in sums and (self.path / name).is_file()]
        return [name for name in there if remembered_sha256(self.path / name) != sums[name]]

    @contextmanager
    def staged(self, dropped: Iterable[str]) -> Iterator[Path]:
        """A folder whose files become this one's when the block ends well; own files of ``dropped`` names go then."""
        going = sorted(self.own.intersection(dropped))
        with staged_directory(self.place, move_in=partial(self._move_in, going)) as staging:
            yield staging

    def _move_in(self, dropped: list[str], staging: Path) -> None:
        names = sorted(entry.name for entry in staging.iterdir())
        # the record comes first, so that whatever happens in between every file is some record's; the sums come last
        for name in sorted(names, key=lambda name: (name == SUMS, name != RECORD)):
            if name == SUMS:
                flush(self.path)
                for gone in dropped:
                    if gone not in names:
                        (self.path / gone).unlink(missing_ok=True)
            os.replace(staging / name, self.path / name)


def refuse_other_inputs(record: ExportRecord, **now: str | None) -> None:
    """Raise :class:`DataError` with old -> new where an export was made from other things than these."""
    before: dict[str, Any] = {**record.merge, **asdict(record)}
    changed = [
        f"  {name.replace('_', ' ')}: {before.get(name)} -> {value}"
        for name, value in now.items()
        if before.get(name) is not None and before.get(name) != value
    ]
    if changed:
        raise DataError(
            f"{record.out_dir} holds an export that was made from something else:\n" + "\n".join(changed),
            remedy=_BOTH_WAYS,
        )


def remember_digests(record: ExportRecord, folder: Path) -> None:
    """Note the digests of files that were just made, so that the next export need not read them again."""
    for report in record.all_files():
        remember_sha256(folder / report.name, report.sha256)


def listed_files(record: dict[str, Any]) -> set[str]:
    """Names of the files that the content of an ``export.json`` lists, the adapter's too; no name that is a path."""
    files = record.get("files")
    reports = [*(files if isinstance(files, list) else []), record.get("adapter_file")]
    names = {str(report.get("name")) for report in reports if isinstance(report, dict)}
    return {name for name in names if _is_plain(name)}


def _listed_names(folder: Path) -> set[str]:
    """Names that ``export.json`` and ``SHA256SUMS`` of a folder list, their own included."""
    names = set(_read_sums(folder))
    if names:
        names.add(SUMS)
    if (folder / RECORD).is_file():
        try:
            content = read_json_object(folder / RECORD)
        except DataError:
            return names
        if listed := listed_files(content):
            names |= {RECORD, *listed}
    return names


def _read_sums(folder: Path) -> dict[str, str]:
    """Digest by name. Empty for a file that is none of ours: sums without an ``export.json`` among them."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines) if _is_plain(name)}
    return sums if RECORD in sums else {}


def _is_plain(name: str) -> bool:
    return bool(name) and name == os.path.basename(name) and name not in (".", "..")
