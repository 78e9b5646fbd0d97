"""``python -m harness.report BENCHMARK_JSON -o DIR [--store STORE]``: write DIR/report.md and DIR/report.html.

Exit codes: 0 written, whatever the verdict; 2 wrong arguments; 3 the JSON or the store is missing, broken, or of
another gate; 6 the disk is full or DIR cannot be written. On any of them an earlier report stays as it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from forge.training.system.errors import ForgeError
from forge.training.system.files import atomic_file, disk_errors
from harness.report.build import gather
from harness.report.evidence import read_evidence
from harness.report.page.render import render_html, render_markdown


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = _parser().parse_args(arguments)
    store = given.store or given.benchmark_json.parent / "store"
    try:
        report = gather(read_evidence(given.benchmark_json, store))
        html, markdown = render_html(report), render_markdown(report)  # both, before the first is written
        with disk_errors(given.out):
            given.out.mkdir(parents=True, exist_ok=True)
        _write(given.out, markdown, html)
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{report.status}: {report.headline} {given.out / 'report.html'} and report.md written")
    return 0


def _write(directory: Path, markdown: str, html: str) -> None:
    """Both files or neither: a full disk shows before the first takes its name."""
    with atomic_file(directory / "report.md") as first, atomic_file(directory / "report.html") as second:
        for stream, text in ((first, markdown), (second, html)):
            stream.write(text)
            stream.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.report",
        description="Write report.md and one self-contained report.html from a gate's results.",
    )
    parser.add_argument("benchmark_json", type=Path, metavar="BENCHMARK_JSON", help="what the gate recorded")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="where the report goes")
    parser.add_argument("--store", type=Path, metavar="STORE", help="the runs; default: `store` beside the JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
