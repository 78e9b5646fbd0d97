"""Is every artefact of a run what its records say, back to the corpus?

    python -m harness.export.probes.provenance RUN [--remake] [--expect SHA256]

Every SHA-256 that run.json, evaluation.json, export.json and SHA256SUMS state is compared with the digest of its file,
computed now. The steps that can be repeated exactly are repeated: corpus to examples, base and adapter to
merged weights (where none were kept) and, with ``--remake``, merged weights to f16 file to quantised files. Training
cannot be repeated exactly: run.json names what went in and what came out. The keys of the JSON are in
harness/export/answers.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forge.training.config.quantizations import QUANTIZED
from forge.training.config.workload import Workload
from forge.training.data.conversation import load_encoder
from forge.training.data.examples import encode_records, load_examples, sample_examples
from forge.training.data.records import read_records
from forge.training.export.gguf import convert_to_gguf, quantize
from forge.training.export.modelfile import parse_modelfile
from forge.training.models.digests import base_sha256, tokenizer_sha256
from forge.training.system.files import read_json_object, sha256_file
from forge.training.train.record import RunRecord, completed_record
from harness.export.answers import Link, ProvenanceAnswer
from harness.export.probes.models_under_test import add_run, expected_run, merged_model
from harness.measurement.probe_main import probe_main


def trace_provenance(run_dir: Path, *, remake: bool = False) -> ProvenanceAnswer:
    """All links, from corpus to Modelfile. Raises :class:`DataError` where a record itself cannot be read."""
    run = completed_record(run_dir)
    export = read_json_object(run_dir / "export" / "export.json")
    links = [*_training(run, run_dir), *_export(run, run_dir, export)]
    with merged_model(run, run_dir, None) as merged_dir:
        links.append(_link("merged weights", "export.json", export["merged_sha256"], base_sha256(merged_dir)))
        if remake:
            links += _remade(merged_dir, run_dir, export)
    return {
        "run": {"adapter_sha256": run.adapter_sha256},
        "links": links,
        "llama_cpp_commit": export.get("llama_cpp_commit"),
    }


def _link(artefact: str, stated_in: str, stated: str | None, found: str | None) -> Link:
    holds = stated is not None and stated == found
    return {"artefact": artefact, "stated_in": stated_in, "stated": stated, "found": found, "holds": holds}


def _digest(path: Path | None) -> str | None:
    return sha256_file(path) if path is not None and path.is_file() else None


def _training(run: RunRecord, run_dir: Path) -> Iterator[Link]:
    """Corpus -> examples, base, tokenizer -> adapter, as run.json states them."""
    workload = Workload.model_validate(run.workload)
    inputs, base_dir = run.inputs, Path(run.base_path)
    train, validation = _corpus_files(workload, run_dir)
    encoder = load_encoder(base_dir, inputs.template_date)
    for name, path, corpus, examples in (
        ("train", train, inputs.corpus_sha256, inputs.train_examples_sha256),
        ("validation", validation, inputs.validation_corpus_sha256, inputs.validation_examples_sha256),
    ):
        if path is None and corpus is None:
            continue
        yield _link(f"corpus, {name}", "run.json", corpus, _digest(path))
        stored = load_examples(run_dir / "examples" / name).sha256
        yield _link(f"examples, {name}", "run.json", examples, stored)
        made = None
        if path is not None and path.is_file():
            encoded = encode_records(read_records(path, workload.data.columns), encoder, workload.data)
            if name == "train" and workload.data.sample is not None:
                encoded = sample_examples(encoded, workload.data.sample)
            made = encoded.sha256
        yield _link(f"examples, {name}, made again from the corpus", "run.json", examples, made)
    yield _link("base", "run.json", inputs.base_sha256, base_sha256(base_dir))
    yield _link("tokenizer", "run.json", inputs.tokenizer_sha256, tokenizer_sha256(base_dir))
    adapter = _digest(run_dir / "adapter" / "adapter_model.safetensors")
    yield _link("adapter", "run.json", run.adapter_sha256, adapter)


def _corpus_files(workload: Workload, run_dir: Path) -> tuple[Path, Path | None]:
    """Where a run's corpus is; as ``data.inputs.corpus_paths``, which would build it."""
    if workload.data.train is not None:
        return Path(workload.data.train), Path(workload.data.validation) if workload.data.validation else None
    if workload.data.validation_share:
        return run_dir / "corpus.train.jsonl", run_dir / "corpus.validation.jsonl"
    return run_dir / "corpus.jsonl", None


def _export(run: RunRecord, run_dir: Path, export: dict[str, Any]) -> Iterator[Link]:
    """Base, adapter -> merged -> files -> Modelfile, as export.json, evaluation.json and SHA256SUMS state them."""
    export_dir = run_dir / "export"
    yield _link("base of the export", "export.json", export["base_sha256"], run.inputs.base_sha256)
    yield _link("adapter of the export", "export.json", export["adapter_sha256"], run.adapter_sha256)
    yield _link("merged weights of the merge", "export.json", export["merged_sha256"], export["merge"]["merged_sha256"])
    for report in filter(None, [*export["files"], export["adapter_file"]]):
        yield _link(report["name"], "export.json", report["sha256"], _digest(export_dir / report["name"]))
    sums = {}
    if (export_dir / "SHA256SUMS").is_file():
        lines = (export_dir / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    present = {path.name for path in export_dir.iterdir() if path.is_file()} - {"SHA256SUMS"}
    for name in sorted(present | set(sums)):
        yield _link(name, "SHA256SUMS", sums.get(name), _digest(export_dir / name))
    modelfile = export_dir / "Modelfile"
    if modelfile.is_file():
        commands = parse_modelfile(modelfile.read_text(encoding="utf-8"))
        model = next(command.value for command in commands if command.name == "model").removeprefix("./")
        yield _link(f"FROM {model} of the Modelfile", "SHA256SUMS", sums.get(model), _digest(export_dir / model))
    if (run_dir / "evaluation.json").is_file():
        evaluated = read_json_object(run_dir / "evaluation.json")
        yield _link("base that was evaluated", "evaluation.json", evaluated["base_sha256"], run.inputs.base_sha256)
        yield _link("adapter that was evaluated", "evaluation.json", evaluated["adapter_sha256"], run.adapter_sha256)
        if merged := evaluated.get("merged_sha256"):
            yield _link("merged weights that were evaluated", "evaluation.json", merged, export["merged_sha256"])


def _remade(merged_dir: Path, run_dir: Path, export: dict[str, Any]) -> Iterator[Link]:
    """The files again from the merged weights: converter and quantiser write the same bytes each time."""
    with tempfile.TemporaryDirectory(prefix="forge-remade-", dir=run_dir) as scratch:
        source = Path(scratch) / "f16.gguf"
        convert_to_gguf(merged_dir, source, "f16", model_name=export["model"])
        for report in export["files"]:
            name = report["file_type"]
            target = source if name == "f16" else Path(scratch) / f"{name}.gguf"
            if name in QUANTIZED:
                quantize(source, target, name)
            if target.is_file():
                yield _link(f"{name} file, made again", "export.json", report["sha256"], sha256_file(target))


def main() -> int:
    """Print the answer as JSON."""
    parser = argparse.ArgumentParser(prog="harness.export.probes.provenance", description=__doc__.splitlines()[0])
    add_run(parser)
    parser.add_argument("--remake", action="store_true", help="also convert and quantise again")
    return probe_main(parser, lambda options: trace_provenance(expected_run(options), remake=options.remake))


if __name__ == "__main__":
    sys.exit(main())
