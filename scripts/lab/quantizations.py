#!/usr/bin/env python3
"""Export a run to many GGUF types and keep what each lost and cost: ``scripts/lab/quantizations.py RUN OUT.json``.

``forge export`` makes, proves and measures each file, with an importance matrix and without one; here its records are
put together. A type that is refused is recorded with the reason, and the others are made without it. The files are
deleted, OUT.json is written after every export, and its table is printed. Exit code 8 where a type was refused.

``--base DIR``: where the run's base is now. ``--types q8_0,q4_k_m``: only these. ``--at-once N``: types per export;
each export computes the adapter's predictions and the importance matrix again, and one that fails loses its files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from forge.training.config.quantizations import GGUF_TYPES, gguf_types
from forge.training.export.disk_space import check_quantizations
from forge.training.models.weights import read_weights
from forge.training.system.environment import describe_environment
from forge.training.system.errors import CheckError, ConfigurationError, ForgeError
from forge.training.system.files import refuse_existing, write_json
from forge.training.train.record import RunRecord, completed_record

FORGE = (sys.executable, "-m", "forge.training")
_SAMPLE_SECONDS = 0.25
_KEPT = ("mean_kl", "standard_error", "largest_kl", "same_top_share")


class TreeMemory(threading.Thread):
    """The most resident memory that a process and its descendants took together, in bytes, seen every quarter second.

    Pages that two of them share count twice; the pages of a mapped file count.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak_bytes, self._ended = pid, 0, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, _tree_bytes(self.pid))

    def end(self) -> int:
        """Stop looking."""
        self._ended.set()
        self.join()
        return self.peak_bytes


def _tree_bytes(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        members = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for member in members:
        try:
            total += member.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


def export(run_dir: Path, types: Sequence[str], folder: Path, base: Path | None, imatrix: str) -> dict[str, Any]:
    """One ``forge export``: ``document``, what it printed as JSON, its ``exit_code`` and ``cost``, time and memory."""
    command = [*FORGE, "export", str(run_dir), "--add", ",".join(types), "--imatrix", imatrix, "--out", str(folder)]
    command += ["--allow-fallback", "--json", *(["--base", str(base)] if base else [])]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        memory = TreeMemory(process.pid)
        memory.start()
        try:
            printed = process.communicate()[0]
        except BaseException:
            process.terminate()
            raise
        finally:
            peak_bytes = memory.end()
    try:
        document = json.loads(printed)
    except ValueError as error:
        raise ForgeError.of_child(process.returncode, f"forge export printed no JSON: {printed[:80]!r}") from error
    cost = {"seconds": round(time.monotonic() - started, 1), "peak_tree_rss_bytes": peak_bytes}
    return {"document": document, "exit_code": process.returncode, "cost": cost}


def refused_type(error: str, types: Sequence[str]) -> str | None:
    """Of which type a failed export speaks: the last one that its first line names."""
    words = re.split(r"[^a-z0-9_]+", error.partition("\n")[0])
    return next((word for word in reversed(words) if word in types), None)


def describe_file(report: dict[str, Any], steps: Sequence[dict[str, Any]], num_parameters: int) -> dict[str, Any]:
    """What the record keeps of a file. ``seconds``: of all steps of its type, the comparison of both ways included."""
    proof, kind = report["proof"], report["file_type"]
    own = [step for step in steps if kind in step["name"].split()]
    made = next(step for step in own if step["name"].startswith(("convert", "quantise")))
    kept, other = proof["predictions"], proof["other_way"]
    with_imatrix, without = (kept, other) if proof["uses_imatrix"] else (other, kept)
    return {
        "verdict": "flagged" if proof["flags"] else "good",
        "flags": proof["flags"],
        "num_bytes": report["num_bytes"],
        "bits_per_weight": round(8 * report["num_bytes"] / num_parameters, 3),
        "tensor_types": report["tensor_types"],
        "num_fallbacks": len(report["fallbacks"]),
        "uses_imatrix": proof["uses_imatrix"],
        "without_imatrix": without and {name: without[name] for name in _KEPT},
        "with_imatrix": with_imatrix and {name: with_imatrix[name] for name in _KEPT},
        "flagged_above": proof["flagged_limit"],
        "refused_above": proof["refused_limit"],
        "stops": proof["stops"],
        "make_seconds": made["seconds"],
        "seconds": round(sum(step["seconds"] for step in own), 1),
        "peak_rss_bytes": max(step["peak_rss_bytes"] for step in own),
    }


def describe_refusal(error: str) -> dict[str, Any]:
    """What the record keeps of a refused type; ``mean_kl`` and limit where its predictions are the reason."""
    found = re.search(r"mean KL (\S+) nats .* stays below (\S+)", error)
    figures = {"mean_kl": float(found[1]), "refused_above": float(found[2])} if found else {}
    return {"verdict": "refused", "error": error, **figures}


def measure(run_dir: Path, out: Path, types: Sequence[str], at_once: int, base: Path | None, imatrix: str) -> Path:
    """Export everything and write the record to ``out``. Raises :class:`ForgeError` where no type can be blamed."""
    run = completed_record(run_dir)
    num_parameters = read_weights(base or Path(run.base_path)).num_parameters
    record = _header(run, num_parameters)
    left = list(types)
    with tempfile.TemporaryDirectory(dir=run_dir.parent, prefix=f".{run_dir.name}-quantizations-") as scratch:
        while left:
            batch = left[:at_once]
            done = export(run_dir, batch, Path(scratch) / "export", base, imatrix)
            document, cost = done["document"], done["cost"]
            if done["exit_code"]:
                message = str(document.get("error"))
                kind = refused_type(message, batch) if done["exit_code"] == CheckError.exit_code else None
                if kind is None:
                    raise ForgeError.of_child(done["exit_code"], message, remedy=document.get("remedy"))
                record["types"][kind] = describe_refusal(message.partition("\n")[0])
                record["exports"].append({"types": batch, "refused": kind, **cost})
                left.remove(kind)
            else:
                files = {report["file_type"]: report for report in document["files"]}
                for kind in batch:
                    record["types"][kind] = describe_file(files[kind], document["steps"], num_parameters)
                largest = max(step["peak_rss_bytes"] for step in document["steps"])
                steps = [step for step in document["steps"] if not set(step["name"].split()) & set(batch)]
                record["exports"].append({"types": batch, **cost, "peak_rss_bytes": largest, "common_steps": steps})
                proof = files[batch[-1]]["proof"]
                counts = {key: (proof["predictions"] or {}).get(key) for key in ("num_predictions", "num_documents")}
                record["compared_on"] = {"text": proof["text"], **counts}
                record["merge"] = {name: found["mean_kl"] for name, found in _merges(document)}
                record["imatrix"] = document["imatrix"]
                record["quantized_from"] = document["quantized_from"]
                record["notes"] = document["notes"]
                left = left[len(batch) :]
            record["load_average"].append(os.getloadavg()[0])
            write_json(out, record)
    return out


def _merges(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, found) for name, found in document["merge_proof"].items() if isinstance(found, dict)]


def _header(run: RunRecord, num_parameters: int) -> dict[str, Any]:
    """``load_average``: of the machine's last minute, before and after each export."""
    shape = run.model_shape or {}
    return {
        "run": {
            "name": run.workload["name"],
            "base": run.workload["model"]["path"] if "/" not in str(run.workload["model"]["path"]) else None,
            "architecture": (shape.get("architectures") or [None])[0],
            "num_parameters": num_parameters,
            "backend": run.backend,
            "num_steps": run.num_steps,
            "base_sha256": run.inputs.base_sha256,
            "adapter_sha256": run.adapter_sha256,
        },
        "environment": describe_environment(with_torch=False),
        "load_average": [os.getloadavg()[0]],
        "exports": [],
        "types": {},
    }


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table, the largest files first."""
    columns = ("type", "MB", "bits", "KL", "KL with imatrix", "same top token", "flagged, refused above", "s", "GB")
    lines = [columns, ("---", *["---:"] * (len(columns) - 1))]
    made = {kind: row for kind, row in record["types"].items() if row["verdict"] != "refused"}
    for kind, row in sorted(made.items(), key=lambda item: -item[1]["num_bytes"]):
        ways = [row["without_imatrix"], row["with_imatrix"]]
        kept = ways[int(row["uses_imatrix"])]
        lines.append(
            (
                kind + (" (flagged)" if row["verdict"] == "flagged" else ""),
                f"{row['num_bytes'] / 1e6:.1f}",
                f"{row['bits_per_weight']:.1f}" + (f" ({row['num_fallbacks']})" if row["num_fallbacks"] else ""),
                *(_kl(way, is_kept=way is kept) for way in ways),
                f"{kept['same_top_share']:.1%}" if kept else "",
                f"{row['flagged_above']:.1g}, {row['refused_above']:.1g}",
                f"{row['seconds']:.0f}",
                f"{row['peak_rss_bytes'] / 1e9:.2f}",
            )
        )
    for kind, row in record["types"].items():
        if row["verdict"] == "refused":
            limit = f"{row['refused_above']:.1g}" if "refused_above" in row else ""
            nearer = f"{row['mean_kl']:.2g}" if "mean_kl" in row else row["error"]
            lines.append((f"{kind} (refused)", "", "", nearer, "", "", limit, "", ""))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _kl(way: dict[str, Any] | None, *, is_kept: bool) -> str:
    if way is None:
        return ""
    text = f"{way['mean_kl']:.1e}"
    return f"**{text}**" if is_kept else text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="What each GGUF type of a run loses and costs.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a completed run's directory")
    parser.add_argument("out", type=Path, metavar="OUT.json", help="the record to write")
    parser.add_argument("--base", type=Path, metavar="DIR", help="where the run's base is now")
    parser.add_argument("--types", help="with commas; default: all that can be made")
    parser.add_argument("--at-once", type=int, default=len(GGUF_TYPES), metavar="N", help="types per export")
    parser.add_argument("--imatrix", choices=("auto", "none"), default="auto", help="none: no importance matrix")
    given = parser.parse_args(arguments)
    try:
        refuse_existing(given.out, False)
        uses = given.imatrix == "auto"
        types = gguf_types(given.types or ",".join(t for t in GGUF_TYPES if uses or not GGUF_TYPES[t].needs_imatrix))
        check_quantizations(types, imatrix=uses)
        if given.at_once < 1:
            raise ConfigurationError("--at-once must be at least 1")
        measure(given.run.absolute(), given.out, types, given.at_once, given.base, given.imatrix)
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    record = json.loads(given.out.read_text(encoding="utf-8"))
    print(table(record))
    return CheckError.exit_code if any(row["verdict"] == "refused" for row in record["types"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
