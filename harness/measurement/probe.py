"""Probes as stored measurements: each a process of its own, and none measured twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from forge.training.backends import Backend
from forge.training.system.environment import ROOT, describe_gpu
from forge.training.system.files import read_json_object, sha256_json, write_json
from harness.measurement.environment import environment, interpreter
from harness.measurement.gpu_monitor import machine_id, wait_until_free
from harness.measurement.key import code_sha256, identify, package_versions, resume_sha256, source_sha256
from harness.measurement.process import run_process
from harness.measurement.redact import portable_setting
from harness.measurement.results import RunSpec, Store


def run_probe(
    module: str,
    backend: Backend,
    arguments: tuple[str, ...],
    store: Store,
    *,
    time_limit_seconds: float,
    deadline: float | None = None,
    announce: Callable[[str], None] = lambda line: None,
    expected_seconds: float | None = None,
    is_alone: bool = True,
    resumes: bool = False,
    work: RunSpec | None = None,
) -> dict[str, Any] | None:
    """What ``python -m MODULE ARGUMENTS`` prints last, from the store where it has it.

    ``None``: it might not end before ``deadline``, taking ``expected_seconds`` (by default its limit).
    ``is_alone``: whether it waits for the GPU to be free; others may be beside a probe that measures no time and
    no memory (the store's lock is then held around all of them). ``resumes``: its runs resume from checkpoints, and
    what is executed for that belongs to its key. ``work``: what it trains, so that workload, documents and plan belong
    to its key, not only their names. Raises :class:`ForgeError` with the probe's own exit code and the end of its
    log where it fails; a failure is not stored.
    """
    name = module.rpartition(".")[2]
    parts = {
        "probe": name,
        "source": source_sha256(module),  # with "code": all of the project's that it executes
        "code": code_sha256(),
        "packages": package_versions(backend),
        "arguments": [portable_setting(argument) for argument in arguments],
        "gpu": (describe_gpu() or {}).get("name"),
    }
    if resumes:
        parts["resume_code"] = resume_sha256()
    if work is not None:
        known = identify(work).parts
        parts["work"] = {"workload": known["workload"], "plan": known["plan"]}
    key = sha256_json(parts)
    path = store.probe_path(f"{name}-{backend}-{key[:12]}")
    if path.is_file():
        return read_json_object(path)
    needed = time_limit_seconds if expected_seconds is None else expected_seconds
    if deadline is not None and time.monotonic() + needed > deadline:
        return None
    announce(f"{name} probe, {backend}")
    with store.lock():
        if is_alone:
            wait_until_free(describe_gpu)
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        ended = run_process(
            [interpreter(backend), "-m", module, *arguments],
            environment=environment(backend),
            directory=ROOT,
            time_limit_seconds=time_limit_seconds,
        )
        try:
            lines = ended.output.decode("utf-8", "replace").strip().splitlines()
            answer = json.loads(lines[-1]) if ended.exit_code == 0 and lines else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ended.failure(f"the {name} probe of {backend}", time_limit_seconds)
        stored = {
            "schema_version": 1,
            "key": key,
            "key_parts": parts,
            "started_at": started_at,
            "wall_seconds": ended.wall_seconds,
            "machine": machine_id(),
            **answer,
        }
        write_json(path, stored)
        return stored
