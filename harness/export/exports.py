"""A run made and exported once, what the probes answer about it, and the verdicts on that.

The run is beside the store, in a directory named by everything that can change it, and is used again by the next
session on this machine. The probes' answers are in the store: where all of them are there of one adapter, another
machine judges them and makes nothing.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge.training.backends import Backend
from forge.training.config.workload import load_workload
from forge.training.system.environment import ROOT, describe_gpu
from forge.training.system.errors import DataError, ForgeError
from forge.training.system.files import read_json_object, sha256_json, write_json
from forge.training.train.record import completed_record
from harness.export import suite
from harness.export.claims import KINDS, claim_of
from harness.measurement.environment import EVALUATOR, environment, interpreter, train_command
from harness.measurement.gpu_monitor import machine_id, wait_until_free
from harness.measurement.key import identify, source_sha256
from harness.measurement.process import run_process
from harness.measurement.results import RunSpec
from harness.session import Session
from harness.verdict import Verdict


@dataclass
class Exports:
    """``spec``: the run whose export is judged. ``large``: the run whose export is only timed."""

    session: Session
    spec: RunSpec
    large: RunSpec | None = None
    _failed: dict[Path, ForgeError] = field(default_factory=dict)  # steps of a run: not repeated for each probe
    _keys: dict[RunSpec, str] = field(default_factory=dict)  # used often, and read from documents and weights

    @property
    def entry(self) -> dict[str, str]:
        """What every entry of the judged run has beside its verdict."""
        return {"record_kind": "export", "workload": self.spec.workload, "backend": self.spec.backend}

    def verdict(self, name: str) -> Verdict:
        """The verdict on a claim of :data:`harness.export.claims.CLAIMS`."""
        claim = claim_of(name)
        return self.session.verdict(claim, lambda: self.answer(claim.probe))

    def answer(self, probe: str) -> dict[str, Any] | None:
        """What a probe answers about the run, as answers.py describes it; ``None``: not measured.

        Raises :class:`ForgeError`, the same each time, where the probe or a step before it failed.
        """
        if stored := self._stored_answers():
            return stored[probe]
        run_dir = self.exported(self.spec)
        if run_dir is None or (probe == "provenance" and not self._evaluated(run_dir)):
            return None
        record = completed_record(run_dir)
        key, adapter = self._key(self.spec), str(record.adapter_sha256)
        note = {"schema_version": 1, "key": key, "machine": machine_id(), "adapter_sha256": adapter}
        note["name"] = record.workload["name"]
        path = self.session.store.probe_path(f"exported-{key[:12]}-{adapter[:12]}")
        if not path.is_file():
            write_json(path, note)
        return self._ask(self.session, probe, note)

    def _ask(self, session: Session, probe: str, note: dict[str, Any]) -> dict[str, Any] | None:
        """What the probe answers about the run that ``note`` says was exported."""
        run_dir = self._run_dir(self.spec)
        files = [str(run_dir / "export" / f"{note['name']}.{kind}.gguf") for kind in KINDS]
        counts = (f"--documents={suite.NUM_DOCUMENTS}", f"--tokens={suite.MOST_TOKENS}")
        options = {
            "divergence": ("--gguf", *files, "--controls", *counts),
            "tokens": ("--gguf", files[0]),
            "provenance": ("--remake",),
            "merge": (),
        }[probe]
        return session.probe(
            f"harness.export.probes.{probe}",
            EVALUATOR,
            (str(run_dir), *options, "--expect", str(note["adapter_sha256"])),
            expected_seconds=suite.PROBES[probe].expected,
            limit_seconds=suite.PROBES[probe].limit,
        )

    def _stored_answers(self) -> dict[str, dict[str, Any]] | None:
        """All probes' answers about one adapter, where the store has them: no two claims are about different ones.

        Training is not repeatable to the bit, so a run made again is another one to every probe.
        """
        reads = Session(self.session.store, self.session.train, measures=False)
        for path in self.session.store.probe_paths(f"exported-{self._key(self.spec)[:12]}-*"):
            note = read_json_object(path)
            answers = {probe: self._ask(reads, probe, note) for probe in suite.PROBES}
            complete = {probe: answer for probe, answer in answers.items() if answer is not None}
            if len(complete) == len(answers):
                return complete
        return None

    def timing(self) -> dict[str, Any] | None:
        """The large run's export, timed step by step; ``None``: not measured.

        ``steps`` and ``needed_disk_bytes`` are those of export.json; ``files`` and ``fallbacks`` are by type: bytes,
        and the tensors that are of another type. The files are deleted: at 7B they take 30 GB.
        """
        assert self.large is not None
        key = self._key(self.large)
        path = self.session.store.probe_path(f"export-{key[:12]}")
        if not path.is_file():
            run_dir = self.exported(self.large)
            if run_dir is None:
                return None
            record = read_json_object(run_dir / "export" / "export.json")
            answer = {
                "schema_version": 1,
                "key": key,
                "machine": machine_id(),
                "gpu": (describe_gpu() or {}).get("name"),
                "shape": completed_record(run_dir).model_shape,
                "steps": record["steps"],
                "needed_disk_bytes": record["needed_disk_bytes"],
                "files": {report["file_type"]: report["num_bytes"] for report in record["files"]},
                "fallbacks": {report["file_type"]: report["fallbacks"] for report in record["files"]},
            }
            write_json(path, answer)
            shutil.rmtree(run_dir)
        return read_json_object(path)

    def exported(self, spec: RunSpec) -> Path | None:
        """The directory of a run, trained and exported, the merged weights kept where it is judged.

        ``None``: not made. Raises :class:`ForgeError`, the same each time, where a step failed.
        """
        run_dir = self._run_dir(spec)
        step, options = ("export at 7B", ()) if spec is self.large else ("export", ("--lora", "--keep-merged"))
        is_trained = False
        with suppress(DataError):
            is_trained = completed_record(run_dir) is not None
        if not is_trained and not self._make("train", train_command(spec, run_dir), run_dir, spec.backend):
            return None
        export = _forge("export", run_dir, "--quant", ",".join(KINDS), *options)
        is_exported = (run_dir / "export" / "export.json").is_file()
        return run_dir if is_exported or self._make(step, export, run_dir) else None

    def _evaluated(self, run_dir: Path) -> bool:
        nf4 = load_workload(self.spec.workload, self.spec.overrides).model.quantization == "nf4"
        evaluate = _forge("evaluate", run_dir, "--subjects", f"base,adapter,{'adapter-nf4,' if nf4 else ''}merged")
        return (run_dir / "evaluation.json").is_file() or self._make("evaluate", evaluate, run_dir)

    def _make(self, step: str, command: list[str], run_dir: Path, backend: Backend = EVALUATOR) -> bool:
        """Carry out one command; ``False``: it might not end in time. Raises :class:`ForgeError` where it fails."""
        if run_dir in self._failed:
            raise self._failed[run_dir]
        limit, expected = suite.STEPS[step]
        until = self.session.until
        if until is not None and time.monotonic() + expected > until:
            return False
        self.session.announce(f"export fidelity: {step}")
        with self.session.store.lock():
            wait_until_free(describe_gpu)
            ended = run_process(command, environment=environment(backend), directory=ROOT, time_limit_seconds=limit)
        if ended.exit_code:
            self._failed[run_dir] = ended.failure(step, limit)
            raise self._failed[run_dir]
        return True

    def _run_dir(self, spec: RunSpec) -> Path:
        return self.session.store.beside("export").absolute() / f"{spec.workload}-{self._key(spec)[:12]}"

    def _key(self, spec: RunSpec) -> str:
        """Of everything that can change the run, its export or, beside a probe's own code, what a probe says of it."""
        if spec not in self._keys:
            code = source_sha256("forge.training.export.export", "forge.training.evaluation.evaluate")
            self._keys[spec] = sha256_json([identify(spec).key, code])
        return self._keys[spec]


def _forge(command: str, run_dir: Path, *options: str) -> list[str]:
    return [interpreter(EVALUATOR), "-m", "forge.training", command, str(run_dir), "--force", *options]
