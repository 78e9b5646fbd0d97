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
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from forge.training.config.workload import Workload
from forge.training.data.conversation import load_encoder
from forge.training.data.questions import question_ids
from forge.training.evaluation.answers import document_prompts
from forge.training.evaluation.likelihood import group_documents, sum_nats
from forge.training.evaluation.neutral_model import Placement, load_model, refuse_unsloth, release_memory, with_adapter
from forge.training.evaluation.record import DocumentResult, compare
from forge.training.export.gguf import convert_lora_to_gguf, convert_to_gguf, verify_gguf
from forge.training.models.digests import base_sha256
from forge.training.system.errors import ConfigurationError, DataError, ForgeError
from forge.training.system.files import read_json_object
from forge.training.train.record import RunRecord, completed_record
from harness.export.answers import DivergenceAnswer, GreedyText, Pair, Step
from harness.export.probes import models_under_test as models
from harness.export.probes.models_under_test import GgufModel, Reference, Text, open_gguf
from harness.measurement.probe_main import probe_main

MOST_TOKENS = 512  # of a document: its logits of 152,064 entries are then 300 MB per model
NUM_PROMPTS = 8
EXACT, CACHED, LORA = "f32", "with an f16 cache", "base and LoRA"  # the controls
_CHUNK_ROWS = 256  # of float64 probabilities at once


@dataclass
class Tally:
    """Sums by document, in the order of the documents, by model or pair. ``largest``: of one prediction, by pair."""

    rows: dict[str, DocumentResult] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)

    def begin(self, document: str, num_tokens: int) -> None:
        """Count tokens that a document has, or has beside those already counted."""
        new = DocumentResult(document=document, num_tokens=0, num_bytes=0, nats={"": 0.0})
        self.rows.setdefault(document, new).num_tokens += num_tokens

    def add(self, name: str, document: str, amount: float) -> None:
        """Add to a document's sum under a name."""
        sums = self.rows[document].nats
        sums[name] = sums.get(name, 0.0) + amount

    def mean(self, name: str, less: str = "") -> tuple[float, float | None]:
        """Mean per token and its standard error over documents; with ``less``, of the paired difference."""
        paired = compare(list(self.rows.values()), name, less)
        return paired.difference_nats_per_token, paired.standard_error_nats_per_token

    def pair(self, name: str) -> Pair:
        """What was added under ``reference || subject`` and ``top of reference || subject``."""
        reference, _, subject = name.partition(" || ")
        mean, error = self.mean(name)
        return {
            "reference": reference,
            "subject": subject,
            "mean_kl_nats": mean,
            "standard_error_nats": error,
            "largest_kl_nats": self.largest[name],
            "same_top_share": self.mean(f"top of {name}")[0],
        }

    def step(self, before: str | None, subject: str) -> Step:
        """A subject's loss and its paired change from the one before."""
        change, error = self.mean(subject, before) if before else (None, None)
        return {
            "subject": subject,
            "nats_per_token": self.mean(subject)[0],
            "change_nats_per_token": change,
            "standard_error_nats_per_token": error,
        }


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
    stated = {models.stated_merge(path) for path in ggufs} - {None}
    if len(stated) > 1:
        raise ConfigurationError("the files are of exports of different weights", remedy="name those of one export")
    merged_sha256 = next(iter(stated), None)
    workload = Workload.model_validate(run.workload)
    encoder = load_encoder(base_dir, run.inputs.template_date)
    tokenizer = encoder.tokenizer
    examples = models.held_out_examples(run, run_dir)
    documents = group_documents(examples, tokenizer, num_documents)
    texts = models.held_out_texts(examples, documents, most_tokens)
    reports = [verify_gguf(path) for path in ggufs]
    names = [report.file_type for report in reports]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"two files of one type: {', '.join(names)}", remedy="name one file of each")
    num_answer_tokens = workload.evaluation.max_new_tokens
    system_prompt = workload.data.system_prompt
    asked = document_prompts(examples, documents, encoder, num_prompts=NUM_PROMPTS, max_new_tokens=num_answer_tokens)
    prompts = [
        *(question_ids(encoder, fact.question, system_prompt) for fact in workload.evaluation.facts),
        *(prompt.input_ids for prompt in asked if len(prompt.input_ids) <= most_tokens),
    ]
    context = max([len(text.ids) for text in texts] + [len(ids) + num_answer_tokens for ids in prompts])
    tally = Tally()
    with ExitStack() as stack:
        merged_dir = stack.enter_context(models.merged_model(run, run_dir, merged_sha256))
        files = {name: stack.enter_context(open_gguf(path, context)) for name, path in zip(names, ggufs, strict=True)}
        if controls:
            files |= _controls(stack, run_dir, base_dir, merged_dir, ggufs[0], context)
        merged, adapted = Reference(merged_dir), Reference(base_dir, run_dir / "adapter")
        for text in texts:
            _compare(text, merged, adapted, files, tally)
        greedy = [_greedy(ids.tolist(), num_answer_tokens, merged, files[names[0]], tokenizer) for ids in prompts]
        stored_dtype = read_json_object(merged_dir / "config.json").get("torch_dtype")
    del merged, adapted
    four_bit = _four_bit(run, run_dir, texts, tally)
    chain = ["base", "adapter", "merged", *names]
    return {
        "run": {"adapter_sha256": run.adapter_sha256, "merged_sha256": merged_sha256},
        "base": {"sha256": run.inputs.base_sha256, "shape": run.model_shape, "dtype": stored_dtype},
        "held_out": {
            "num_documents": len(tally.rows),
            "num_tokens": sum(row.num_tokens for row in tally.rows.values()),
            "examples_sha256": examples.sha256,
            "most_tokens_a_document": most_tokens,
        },
        "files": {report.file_type: asdict(report) for report in reports},
        "pairs": [tally.pair(name) for name in tally.largest],
        "chain": [tally.step(before, subject) for before, subject in zip([None, *chain], chain, strict=False)],
        "four_bit": four_bit,
        "greedy": {"subject": names[0], "num_tokens": num_answer_tokens, "answers": greedy},
        "documents": [
            {"document": row.document, "num_tokens": row.num_tokens, "sums": {k: v for k, v in row.nats.items() if k}}
            for row in tally.rows.values()
        ],
    }


def _controls(
    stack: ExitStack, run_dir: Path, base_dir: Path, merged_dir: Path, first: Path, context: int
) -> dict[str, GgufModel]:
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="forge-controls-")))
    convert_to_gguf(merged_dir, scratch / "merged.gguf", "f32")
    convert_to_gguf(base_dir, scratch / "base.gguf")
    convert_lora_to_gguf(run_dir / "adapter", base_dir, scratch / "adapter.gguf")
    return {
        EXACT: stack.enter_context(open_gguf(scratch / "merged.gguf", context)),
        CACHED: stack.enter_context(open_gguf(first, context, cache="f16")),
        LORA: stack.enter_context(open_gguf(scratch / "base.gguf", context, lora=scratch / "adapter.gguf")),
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
    tally.begin(text.document, len(text.rows))
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
    parts_at = next((i for i, (ours, theirs) in enumerate(zip_longest(wanted, written)) if ours != theirs), None)
    return {
        "merged": tokenizer.decode(wanted),
        "found": tokenizer.decode(written),
        "is_equal": wanted == written,
        "num_tokens": len(wanted),
        "parts_at": parts_at,
        "lead_nats": None if parts_at is None else leads[parts_at],
        "smallest_lead_nats": min(leads, default=None),
    }


def _four_bit(run: RunRecord, run_dir: Path, texts: list[Text], tally: Tally) -> dict[str, Any] | None:
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
        "nats_per_token": tally.mean("adapter-nf4")[0],  # of the adapter on the 4-bit base
        "shift_nats_per_token": shift,
        "standard_error_nats_per_token": error,
    }


def main() -> int:
    """Print the answer as JSON."""
    parser = argparse.ArgumentParser(prog="harness.export.probes.divergence", description=__doc__.splitlines()[0])
    models.add_run(parser)
    parser.add_argument("--gguf", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--documents", type=int, help="how many of the held-out documents; default: all")
    parser.add_argument("--tokens", type=int, default=MOST_TOKENS, help=f"of each document; default {MOST_TOKENS}")
    parser.add_argument("--controls", action="store_true", help="also what tells a file from llama.cpp's arithmetic")

    def answer(options: argparse.Namespace) -> DivergenceAnswer:
        if min(options.tokens, options.documents or 1) < 1 or options.documents == 0:
            raise ConfigurationError("--documents and --tokens take numbers above 0")
        return measure_divergence(
            models.expected_run(options),
            options.gguf,
            num_documents=options.documents,
            most_tokens=options.tokens,
            controls=options.controls,
        )

    return probe_main(parser, answer)


if __name__ == "__main__":
    sys.exit(main())
