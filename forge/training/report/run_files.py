"""What a run's directory holds about the run, read for its page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from forge.training.config.workload import Workload
from forge.training.evaluation.record import Evaluation
from forge.training.system.errors import DataError
from forge.training.system.files import read_json_object
from forge.training.train.record import RunRecord, read_record
from forge.training.train.step_log import StepLog, read_step_log


@dataclass(frozen=True)
class GgufAnswer:
    """``found``: whether it contains what the config expects; ``None`` where that is not known."""

    model: str
    question: str
    answer: str
    found: bool | None = None


@dataclass(frozen=True)
class RunFiles:
    """``config`` is whole, defaults included; ``export`` is export.json. ``notes``: what is left out, and why."""

    name: str
    run_dir: Path
    record: RunRecord
    config: dict[str, Any]
    log: StepLog
    evaluation: Evaluation | None = None
    export: dict[str, Any] | None = None
    gguf_answers: tuple[GgufAnswer, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class _Reader:
    run_dir: Path
    record: RunRecord
    notes: list[str] = field(default_factory=list)

    def _object(self, path: Path) -> dict[str, Any] | None:
        """The file's JSON object, ``None`` if it is absent or none; the latter is noted."""
        if not path.is_file():
            return None
        try:
            return read_json_object(path)
        except DataError as error:
            self.notes.append(f"{path.name} is left out: {error.message}")
            return None

    def _of_this_adapter(self, path: Path) -> dict[str, Any] | None:
        content = self._object(path)
        if content is None or content.get("adapter_sha256") == self.record.adapter_sha256:
            return content
        self.notes.append(f"{path.name} is left out: it is of another adapter than this run's")
        return None

    def evaluation(self) -> Evaluation | None:
        content = self._of_this_adapter(self.run_dir / "evaluation.json")
        try:
            return None if content is None else Evaluation.model_validate(content)
        except ValidationError:
            self.notes.append("evaluation.json is left out: this Forge cannot read it")
            return None

    def export(self, export_dir: Path) -> dict[str, Any] | None:
        content = self._of_this_adapter(export_dir / "export.json")
        files = content.get("files") if content is not None else None
        if content is not None and not (isinstance(files, list) and all(isinstance(row, dict) for row in files)):
            self.notes.append("export.json is left out: it lists no files")
            return None
        return content

    def answers(self, export: dict[str, Any] | None) -> tuple[GgufAnswer, ...]:
        """What the exported files answered: the export's own answers, and those of `forge run`."""
        if export is None:
            return ()
        outcome = self._object(self.run_dir / "outcome.json") or {}
        names = {str(row.get("name")) for row in export["files"]}
        rows = [*(export.get("answers") or ()), *(outcome.get("answers") or ())]
        texts = ("model", "question", "answer")
        whole = [r for r in rows if isinstance(r, dict) and all(isinstance(r.get(name), str) for name in texts)]
        made = (GgufAnswer(r["model"], r["question"], r["answer"], r.get("found")) for r in whole)
        return tuple(dict.fromkeys(answer for answer in made if answer.model in names))


def read_run_files(run_dir: Path, export_dir: Path | None = None) -> RunFiles:
    """Read them. Raises :class:`DataError` where there is no run; what else cannot be read is left out and noted."""
    record = read_record(run_dir)
    try:
        config = Workload.model_validate(record.workload).model_dump(mode="json")
    except ValidationError as invalid:
        raise DataError(f"{run_dir}/run.json holds no config that this Forge knows") from invalid
    reader = _Reader(run_dir, record)
    evaluation, export = reader.evaluation(), reader.export(export_dir or run_dir / "export")
    return RunFiles(
        name=str(config["name"]),
        run_dir=run_dir,
        record=record,
        config=config,
        log=read_step_log(run_dir),
        evaluation=evaluation,
        export=export,
        gguf_answers=reader.answers(export),
        notes=tuple(reader.notes),
    )
