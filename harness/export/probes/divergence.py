"""What an export loses, step by step, on the text that the run held out.

    python -m harness.export.probes.divergence RUN --gguf FILE... [--documents N] [--tokens N] [--controls]

The reference is transformers in float32: the base, the adapter on the original base, the merged weights. Each GGUF file
is compared with it by llama.cpp in a child process. For every pair: the mean of KL(reference || subject) in nats over
the predictions of trained tokens, with a standard error over documents (a document's tokens are not independent), and
the share of predictions whose most probable token is the same. For every model: the loss, as one chain from base to the
smallest file, each difference paired over documents. For the first file: greedy answers, compared token by token with
those of the merged weights. The keys of the JSON are in harness/export/answers.py.

llama.cpp rounds where transformers does not, whatever is in the file: activations to float16 before a product with
float16 weights, and by default keys and values. The files are compared with a float32 cache. ``--controls`` adds three
models that separate the file's error from the arithmetic's: the merged weights as a float32 file (nothing is rounded;
what is left is the error of the converter and of llama.cpp's graphs), the first file with llama.cpp's own float16
cache, and base and adapter as GGUF files of their own.

A trained base is needed: random weights make near-uniform predictions whose KL means nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from forge.training.config.workload import Workload
from forge.training.evaluation.answers import document_prompts, question_ids
from forge.training.evaluation.likelihood import group_documents, sum_nats
from forge.training.evaluation.neutral_model import Placement, load_model, refuse_unsloth, release_memory, with_adapter
from forge.training.export.gguf import convert_lora_to_gguf, convert_to_gguf, verify_gguf
from forge.training.models.digests import base_sha256
from forge.training.models.tokenizers import load_tokenizer
from forge.training.system.errors import ConfigurationError, DataError, ForgeError
from forge.training.system.files import read_json_object
from forge.training.train.record import RunRecord, completed_record
from harness.export.answers import DivergenceAnswer, FourBit, GreedyText
from harness.export.probes.models_under_test import (
    GgufModel,
    Reference,
    Text,
    add_run,
    expected_run,
    held_out_examples,
    held_out_texts,
    merged_model,
    stated_merge,
)
from harness.export.probes.sums import Tally, describe_chain, describe_pair
from harness.measurement.probe_main import probe_main

MOST_TOKENS = 512  # of a document: its logits of 152,064 entries are then 300 MB per model
NUM_PROMPTS = 8
EXACT, CACHED, LORA = "f32", "with an f16 cache", "base and LoRA"  # the controls
_CHUNK_ROWS = 256  # of float64 probabilities at once


def measure_divergence(
    run_dir: Path,
    ggufs: Sequence[Path],
    *,
    num_documents: int | None = None,
    most_tokens: int = MOST_TOKENS,
    controls: bool = False,
) -> DivergenceAnswer:
    """The figures described above.

    Raises :class:`DataError` where run, base, merged weights or examples are not what the records say,
    :class:`CheckError` where llama.cpp refuses a file or dies of it.
    """
    refuse_unsloth()
    run = completed_record(run_dir)
    base_dir = Path(run.base_path)
    if base_sha256(base_dir) != run.inputs.base_sha256:
        raise DataError(f"{base_dir} is not the base that was trained on", remedy="put the run's base back")
    stated = {stated_merge(path) for path in ggufs} - {None}
    if len(stated) > 1:
        raise ConfigurationError("the files are of exports of different weights", remedy="name those of one export")
    workload = Workload.model_validate(run.workload)
    tokenizer = load_tokenizer(base_dir)
    examples = held_out_examples(run, run_dir)
    texts = held_out_texts(examples, tokenizer, num_documents, most_tokens)
    reports = {path: verify_gguf(path) for path in ggufs}
    names = [report.file_type for report in reports.values()]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"two files of one type: {', '.join(names)}", remedy="name one file of each")
    num_greedy_tokens = workload.evaluation.max_new_tokens
    documents = group_documents(examples, tokenizer, num_documents)
    prompts = [
        *(question_ids(tokenizer, fact.question, workload.data.system_prompt) for fact in workload.evaluation.facts),
        *(
            prompt.input_ids
            for prompt in document_prompts(
                examples, documents, tokenizer, num_prompts=NUM_PROMPTS, max_new_tokens=num_greedy_tokens
            )
            if len(prompt.input_ids) <= most_tokens
        ),
    ]
    context = max([len(text.ids) for text in texts] + [len(ids) + num_greedy_tokens for ids in prompts])
    tally = Tally()
    with ExitStack() as stack:
        merged_dir = stack.enter_context(merged_model(run, run_dir, next(iter(stated), None)))
        files = {report.file_type: stack.enter_context(GgufModel(path, context)) for path, report in reports.items()}
        if controls:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="forge-controls-")))
            models = _controls(scratch, run_dir, base_dir, merged_dir, ggufs[0], context)
            files |= {name: stack.enter_context(model) for name, model in models.items()}
        merged, adapted = Reference(merged_dir), Reference(base_dir, run_dir / "adapter")
        for text in texts:
            _compare(text, merged, adapted, files, tally)
        greedy = [_greedy(ids.tolist(), num_greedy_tokens, merged, files[names[0]], tokenizer) for ids in prompts]
        stored_dtype = read_json_object(merged_dir / "config.json").get("torch_dtype")
    del merged, adapted
    four_bit = _four_bit(run, run_dir, texts, tally)
    return {
        "run": {"adapter_sha256": run.adapter_sha256, "merged_sha256": next(iter(stated), None)},
        "base": {"sha256": run.inputs.base_sha256, "shape": run.model_shape, "dtype": stored_dtype},
        "held_out": {
            "num_documents": len(tally.tokens),
            "num_tokens": sum(tally.tokens.values()),
            "examples_sha256": examples.sha256,
            "most_tokens_a_document": most_tokens,
        },
        "files": {report.file_type: report.to_json() for report in reports.values()},
        "pairs": [describe_pair(tally, name) for name in tally.largest],
        "chain": describe_chain(tally, ["base", "adapter", "merged", *names]),
        "four_bit": four_bit,
        "greedy": {"subject": names[0], "num_tokens": num_greedy_tokens, "answers": greedy},
        "documents": [
            {"document": name, "num_tokens": count, "sums": {key: rows[name] for key, rows in tally.sums.items()}}
            for name, count in tally.tokens.items()
        ],
    }


def _controls(
    scratch: Path, run_dir: Path, base_dir: Path, merged_dir: Path, first: Path, context: int
) -> dict[str, GgufModel]:
    convert_to_gguf(merged_dir, scratch / "merged.gguf", "f32")
    convert_to_gguf(base_dir, scratch / "base.gguf")
    convert_lora_to_gguf(run_dir / "adapter", base_dir, scratch / "adapter.gguf")
    return {
        EXACT: GgufModel(scratch / "merged.gguf", context),
        CACHED: GgufModel(first, context, cache="f16"),
        LORA: GgufModel(scratch / "base.gguf", context, lora=scratch / "adapter.gguf"),
    }


def _compare(text: Text, merged: Reference, adapted: Reference, files: dict[str, GgufModel], tally: Tally) -> None:
    """Add one text's losses and divergences to the tally."""
    import torch

    logits = {
        "base": adapted.logits(text, with_adapter=False),
        "adapter": adapted.logits(text),
        "merged": merged.logits(text),
        **{name: model.logits(text) for name, model in files.items()},
    }
    pairs = [("adapter", "base"), ("adapter", "merged"), *(("merged", name) for name in files)]
    if LORA in files:
        pairs.append(("adapter", LORA))
    width = min(values.shape[1] for values in logits.values())  # rows of padding beyond the vocabulary
    tally.tokens[text.document] = tally.tokens.get(text.document, 0) + len(text.rows)
    targets = torch.from_numpy(text.targets)
    for begin in range(0, len(text.rows), _CHUNK_ROWS):
        rows = slice(begin, begin + _CHUNK_ROWS)
        logs = {name: values[rows, :width].double().log_softmax(-1) for name, values in logits.items()}
        for name, log in logs.items():
            tally.add(name, text.document, -float(log.gather(1, targets[rows, None]).sum()))
        for reference, subject in pairs:
            name = f"{reference} || {subject}"
            kl = (logs[reference].exp() * (logs[reference] - logs[subject])).sum(-1)
            same = logs[reference].argmax(-1) == logs[subject].argmax(-1)
            tally.add(name, text.document, float(kl.sum()))
            tally.add(f"top of {name}", text.document, float(same.sum()))
            tally.largest[name] = max(tally.largest.get(name, 0.0), float(kl.max()))


def _greedy(ids: list[int], num_tokens: int, merged: Reference, model: GgufModel, tokenizer: Any) -> GreedyText:
    """Both answers, and where they differ the lead that the merged weights gave their own token."""
    configured = merged.causal.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    ends = {int(end) for end in (tokenizer.eos_token_id, *configured) if end}
    wanted, leads = merged.continue_greedily(ids, num_tokens, ends)
    written = model.continue_greedily(ids, num_tokens, ends)
    parts_at = next((i for i, (a, b) in enumerate(zip(wanted, written, strict=False)) if a != b), None)
    if parts_at is None and len(wanted) != len(written):
        parts_at = min(len(wanted), len(written))
    return {
        "merged": tokenizer.decode(wanted),
        "found": tokenizer.decode(written),
        "is_equal": wanted == written,
        "num_tokens": len(wanted),
        "parts_at": parts_at,
        "lead_nats": None if parts_at is None else leads[parts_at],
        "smallest_lead_nats": min(leads, default=None),
    }


def _four_bit(run: RunRecord, run_dir: Path, texts: list[Text], tally: Tally) -> FourBit | None:
    """How far the loss moves from the 4-bit base that was trained on to the original one, or ``why`` that is not known.

    It is measured last and nothing else needs it: an error costs this figure only.
    """
    import torch

    if (run.workload.get("model") or {}).get("quantization") != "nf4":
        return None
    if not torch.cuda.is_available():
        return {"why": "the 4-bit base needs a CUDA GPU"}
    release_memory()
    placement = Placement("cuda", "bfloat16", {"": 0})
    try:
        model = load_model(Path(run.base_path), placement, nf4_dtype=str(run.workload["model"]["dtype"]))
        model = with_adapter(model, run_dir / "adapter", placement)
        for text in texts:
            tally.add("adapter-nf4", text.document, sum_nats(model, text.ids, text.labels))
    except (ForgeError, RuntimeError, ValueError, ImportError) as failure:
        return {"why": f"{type(failure).__name__}: {failure}"}
    shift, error = tally.mean("adapter", "adapter-nf4")
    return {
        "nats_per_token": tally.mean("adapter-nf4")[0],
        "shift_nats_per_token": shift,
        "standard_error_nats_per_token": error,
    }


def main() -> int:
    """Print the answer as JSON."""
    parser = argparse.ArgumentParser(prog="harness.export.probes.divergence", description=__doc__.splitlines()[0])
    add_run(parser)
    parser.add_argument("--gguf", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--documents", type=int, help="how many of the held-out documents; default: all")
    parser.add_argument("--tokens", type=int, default=MOST_TOKENS, help=f"of each document; default {MOST_TOKENS}")
    parser.add_argument("--controls", action="store_true", help="also what tells a file from llama.cpp's arithmetic")

    def answer(options: argparse.Namespace) -> DivergenceAnswer:
        if min(options.tokens, options.documents or 1) < 1 or options.documents == 0:
            raise ConfigurationError("--documents and --tokens take numbers above 0")
        return measure_divergence(
            expected_run(options),
            options.gguf,
            num_documents=options.documents,
            most_tokens=options.tokens,
            controls=options.controls,
        )

    return probe_main(parser, answer)


if __name__ == "__main__":
    sys.exit(main())
