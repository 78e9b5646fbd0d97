"""One session of judging an export: a run made and exported once, and what the probes say of it.

The run lies beside the store, in a directory named by everything that can change it, and is used again by the next
session on this machine. The probes' answers are in the store: where all of them are there of one adapter, another
machine judges them and makes nothing. What there is no time for is INCOMPLETE.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from forge.training.backends import Backend
from forge.training.config.workload import load_workload
from forge.training.system.environment import ROOT, describe_gpu
from forge.training.system.errors import DataError, ForgeError
from forge.training.system.files import read_json_object, sha256_json, write_json
from forge.training.train.record import completed_record
from harness.export.claims import CLAIMS
from harness.export.findings import Finding, stated
from harness.measurement.environment import EVALUATOR, environment, interpreter, train_command
from harness.measurement.gpu_monitor import machine_id, wait_until_free
from harness.measurement.key import identify, source_sha256
from harness.measurement.probe import run_probe
from harness.measurement.process import run_process
from harness.measurement.redact import log_tail
from harness.measurement.results import RunSpec, Store
from harness.perf.claims import Status

_ELSEWHERE = (2, 4, 6, 9)  # exit codes: arguments, environment, disk, a lock
KINDS = ("f16", "q8_0", "q4_k_m")
NUM_DOCUMENTS = 32  # held out, for the divergences
MOST_TOKENS = 128  # of each: 152,064 logits a token of every model go through a file
Step = Literal["train", "export", "export at 7B", "evaluate"]
# Limit, and what each is expected to take on a machine of sixteen cores: nothing is begun that would not end in time.
STEP_SECONDS: dict[Step, tuple[float, float]] = {
    "train": (1200.0, 120.0),
    "export": (900.0, 100.0),
    "export at 7B": (900.0, 270.0),
    "evaluate": (600.0, 80.0),
}
PROBE_SECONDS = {
    "merge": (300.0, 40.0),
    "tokens": (300.0, 40.0),
    "provenance": (600.0, 80.0),
    "divergence": (1500.0, 240.0),
}


@dataclass
class Exports:
    """One session. ``spec``: the run whose export is judged; ``large``: the one whose export is only timed.

    ``deadline``: on :func:`time.monotonic`'s clock. ``measures``: whether anything may be made that is not there.
    """

    store: Store
    spec: RunSpec
    large: RunSpec | None = None
    deadline: float | None = None
    measures: bool = True
    announce: Callable[[str], None] = lambda line: None
    _answers: dict[str, dict[str, Any] | ForgeError | None] = field(default_factory=dict)
    _failed: dict[Path, ForgeError] = field(default_factory=dict)  # steps of a run: not tried again for each probe
    _keys: dict[RunSpec, str] = field(default_factory=dict)  # asked for often, and read from documents and weights

    def finding(self, name: str) -> Finding:
        """The verdict on a claim of :data:`CLAIMS`."""
        claim = next(claim for claim in CLAIMS if claim.name == name)
        try:
            answer = self.answer(claim.probe)
        except ForgeError as error:  # a probe that refuses or dies has found something, but not of a machine or a disk
            status: Status = "INCOMPLETE" if error.exit_code in _ELSEWHERE else "FAIL"
            return stated(name, status, f"the probe `{claim.probe}`: {error}")
        if answer is None:
            why = "no time was left for it in this session" if self.measures else "left out of this session"
            return stated(name, "INCOMPLETE", why)
        return claim.judge(answer)

    def answer(self, probe: str) -> dict[str, Any] | None:
        """What a probe says of the run, ``None``: no time. Raises the probe's own error, each time it is asked."""
        if probe not in self._answers:
            try:
                self._answers[probe] = self._ask(probe)
            except ForgeError as error:
                self._answers[probe] = error
        answer = self._answers[probe]
        if isinstance(answer, ForgeError):
            raise answer
        return answer

    def _ask(self, probe: str) -> dict[str, Any] | None:
        answered = self._answered_before()
        if answered is not None:
            return answered[probe]
        run_dir = self.exported(self.spec)
        if run_dir is None or (probe == "provenance" and not self._evaluated(run_dir)):
            return None
        record = completed_record(run_dir)
        key, adapter = self._key(self.spec), str(record.adapter_sha256)
        path = self._probes / f"exported-{key[:12]}-{adapter[:12]}.json"
        note = {"schema_version": 1, "key": key, "machine": machine_id(), "adapter_sha256": adapter}
        note["name"] = record.workload["name"]
        if not path.is_file():
            write_json(path, note)
        return self._run_probe(probe, note, self.deadline if self.measures else 0.0)

    def _run_probe(self, probe: str, note: dict[str, Any], deadline: float | None) -> dict[str, Any] | None:
        """Of the run that the note says was exported."""
        run_dir = self._run_dir(self.spec)
        files = [str(run_dir / "export" / f"{note['name']}.{kind}.gguf") for kind in KINDS]
        more = {
            "divergence": ("--gguf", *files, "--controls", f"--documents={NUM_DOCUMENTS}", f"--tokens={MOST_TOKENS}"),
            "tokens": ("--gguf", files[0]),
            "provenance": ("--remake",),
            "merge": (),
        }[probe]
        return run_probe(
            f"harness.export.probes.{probe}",
            EVALUATOR,
            (str(run_dir), *more, "--expect", str(note["adapter_sha256"])),
            self.store,
            time_limit_seconds=PROBE_SECONDS[probe][0],
            expected_seconds=PROBE_SECONDS[probe][1],
            deadline=deadline,
            announce=self.announce,
        )

    def _answered_before(self) -> dict[str, dict[str, Any]] | None:
        """All probes' answers of one adapter, where the store has them: no two claims are of different ones.

        Training is not repeatable to the bit, so a run made again is another one to every probe.
        """
        for path in sorted(self._probes.glob(f"exported-{self._key(self.spec)[:12]}-*.json")):
            note = read_json_object(path)
            answers = {probe: self._run_probe(probe, note, 0.0) for probe in PROBE_SECONDS}
            found = {probe: answer for probe, answer in answers.items() if answer is not None}
            if len(found) == len(answers):
                return found
        return None

    @property
    def _probes(self) -> Path:
        return self.store.directory / "probes"

    def timing(self) -> dict[str, Any] | None:
        """The large run's export: seconds, bytes written and peak memory of each step; ``None``: no time.

        Its files are deleted: at 7B they take 30 GB.
        """
        assert self.large is not None
        key = self._key(self.large)
        path = self._probes / f"export-{key[:12]}.json"
        if path.is_file():
            return read_json_object(path)
        run_dir = self.exported(self.large)
        if run_dir is None:
            return None
        record = read_json_object(run_dir / "export" / "export.json")
        run = completed_record(run_dir)
        answer = {
            "schema_version": 1,
            "key": key,
            "machine": machine_id(),
            "gpu": (describe_gpu() or {}).get("name"),
            "shape": run.model_shape,
            "steps": record["steps"],
            "needed_disk_bytes": record["needed_disk_bytes"],
            "files": {report["file_type"]: report["num_bytes"] for report in record["files"]},
            "fallbacks": {report["file_type"]: report["fallbacks"] for report in record["files"]},
        }
        write_json(path, answer)
        shutil.rmtree(run_dir)
        return answer

    # ----------------------------------------------------------------------------------------------------------------

    def exported(self, spec: RunSpec) -> Path | None:
        """The directory of a run, trained and exported, the merged weights kept where it is judged; ``None``: no time.

        Raises :class:`ForgeError`, the same each time, where a step failed.
        """
        run_dir = self._run_dir(spec)
        options = () if spec is self.large else ("--lora", "--keep-merged")
        export = [*self._forge("export", run_dir), "--quant", ",".join(KINDS), *options]
        step: Step = "export at 7B" if spec is self.large else "export"
        if not _is_completed(run_dir) and not self._make("train", spec.backend, train_command(spec, run_dir), run_dir):
            return None
        if not (run_dir / "export" / "export.json").is_file() and not self._make(step, EVALUATOR, export, run_dir):
            return None
        return run_dir

    def _evaluated(self, run_dir: Path) -> bool:
        nf4 = load_workload(self.spec.workload, self.spec.overrides).model.quantization == "nf4"
        subjects = f"base,adapter,{'adapter-nf4,' if nf4 else ''}merged"
        command = [*self._forge("evaluate", run_dir), "--subjects", subjects]
        return (run_dir / "evaluation.json").is_file() or self._make("evaluate", EVALUATOR, command, run_dir)

    def _forge(self, command: str, run_dir: Path) -> list[str]:
        return [interpreter(EVALUATOR), "-m", "forge.training", command, str(run_dir), "--force"]

    def _run_dir(self, spec: RunSpec) -> Path:
        return self.store.directory.absolute().parent / "export" / f"{spec.workload}-{self._key(spec)[:12]}"

    def _make(self, step: Step, backend: Backend, command: list[str], run_dir: Path) -> bool:
        """Carry out one command; ``False``: it might not end in time. Raises :class:`ForgeError` where it fails."""
        if run_dir in self._failed:
            raise self._failed[run_dir]
        limit, expected = STEP_SECONDS[step]
        if not self.measures or (self.deadline is not None and time.monotonic() + expected > self.deadline):
            return False
        self.announce(f"export fidelity: {step}")
        with self.store.lock():
            wait_until_free(describe_gpu)
            ended = run_process(command, environment=environment(backend), directory=ROOT, time_limit_seconds=limit)
        if ended.exit_code:
            why = f"did not end within {limit:g} s" if ended.timed_out else f"exit code {ended.exit_code}"
            failure = ForgeError(f"{step} failed: {why}\n{log_tail(ended.output)}")
            failure.exit_code = ended.exit_code if 0 < ended.exit_code < 10 else 1
            self._failed[run_dir] = failure
            raise failure
        return True

    def _key(self, spec: RunSpec) -> str:
        """Of everything that can change the run, its export or, beside a probe's own code, what a probe says of it."""
        if spec not in self._keys:
            code = source_sha256("forge.training.export.export", "forge.training.evaluation.evaluate")
            self._keys[spec] = sha256_json([identify(spec).key, code])
        return self._keys[spec]


def _is_completed(run_dir: Path) -> bool:
    try:
        completed_record(run_dir)
    except DataError:
        return False
    return True
