"""What the probes measure an export on: the run's held-out text, its models in float32 and its GGUF files.

Everything is computed on the CPU: a GPU's float32 products may be TF32, and llama.cpp is built for CPUs here.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forge.training.adapter.merge import RECORD, merge_adapter
from forge.training.data.conversation import IGNORED
from forge.training.data.examples import Examples, load_examples
from forge.training.evaluation.likelihood import Document
from forge.training.evaluation.neutral_model import Placement, load_model
from forge.training.export.gguf import check_header, memory_limit_bytes
from forge.training.llamacpp.parent import Child, time_limit_seconds
from forge.training.models.weights import read_weights
from forge.training.system.errors import ConfigurationError, DataError
from forge.training.system.files import read_json_object, sha256_file, sha256_json
from forge.training.train.record import RunRecord, completed_record

FLOAT32 = Placement("cpu", "float32", None)
_SECONDS_PER_TOKEN = 5.0  # a 7B model in 16 bits on two cores


def add_run(parser: argparse.ArgumentParser) -> None:
    """The arguments of all probes of this suite: the run directory, and the digest of the adapter expected in it."""
    parser.add_argument("run", type=Path)
    parser.add_argument("--expect", metavar="SHA256", help="refuse a run with another adapter")


def expected_run(arguments: argparse.Namespace) -> Path:
    """The run directory, if its adapter is the one that was expected.

    Raises :class:`ConfigurationError` (exit code 2) for another one: the wrong run was named, and nothing is known
    about the export that was meant.
    """
    run: Path = arguments.run
    adapter_sha256 = completed_record(run).adapter_sha256
    if arguments.expect not in (None, adapter_sha256):
        raise ConfigurationError(
            f"{run} has the adapter {str(adapter_sha256)[:12]}, expected was {arguments.expect[:12]}",
            remedy="name the run that was meant, or leave out --expect",
        )
    return run


@dataclass(frozen=True)
class Text:
    """An example of a held-out document. ``rows``: positions whose next token is trained; ``targets``: those tokens."""

    document: str
    ids: np.ndarray  # int32 of shape (length,)
    labels: np.ndarray  # int32 of shape (length,)
    rows: np.ndarray  # int64 of shape (trained,)
    targets: np.ndarray  # int64 of shape (trained,)


def held_out_examples(run: RunRecord, run_dir: Path) -> Examples:
    """The examples that a run held out. Raises :class:`DataError` where there are none, or others."""
    expected = run.inputs.validation_examples_sha256
    if expected is None:
        raise DataError(
            f"{run_dir} held nothing out: there is no text to compare on",
            remedy="train with data.validation or data.validation_share",
        )
    examples = load_examples(run_dir / "examples" / "validation")
    if examples.sha256 != expected:
        raise DataError(f"{run_dir / 'examples' / 'validation'} are not the examples of this run (digest differs)")
    return examples


def held_out_texts(examples: Examples, documents: Sequence[Document], most_tokens: int) -> list[Text]:
    """The documents' examples, each document cut after ``most_tokens``. Those without a trained token are left out."""
    texts = []
    for document in documents:
        left = most_tokens
        for index in document.examples:
            ids, labels = examples.input_ids[index][:left], examples.labels[index][:left]
            left -= len(ids)
            rows = np.nonzero(labels[1:] != IGNORED)[0]
            if len(rows):
                texts.append(Text(document.name, ids, labels, rows, labels[1:][rows].astype(np.int64)))
    return texts


class Reference:
    """A transformers model in float32; an adapter can be switched on and off."""

    def __init__(self, directory: Path, adapter_dir: Path | None = None) -> None:
        self.causal = load_model(directory, FLOAT32).causal
        self._layers: list[Any] = []
        if adapter_dir is not None:
            from peft import PeftModel
            from peft.tuners.tuners_utils import BaseTunerLayer

            adapted = PeftModel.from_pretrained(self.causal, str(adapter_dir), is_trainable=False)
            self.causal = adapted.get_base_model().eval()
            self._layers = [layer for layer in self.causal.modules() if isinstance(layer, BaseTunerLayer)]

    def logits(self, text: Text, *, with_adapter: bool = True) -> Any:
        """Float32 of shape (trained, vocabulary)."""
        import torch

        for layer in self._layers:
            layer.enable_adapters(with_adapter)
        with torch.inference_mode():
            ids = torch.from_numpy(text.ids.astype(np.int64))[None]
            return self.causal(input_ids=ids, use_cache=False, logits_to_keep=torch.from_numpy(text.rows)).logits[0]

    def continue_greedily(
        self, ids: Sequence[int], num_tokens: int, end_ids: set[int]
    ) -> tuple[list[int], list[float]]:
        """The greedy continuation's ids without the end, as :meth:`GgufModel.continue_greedily` gives them.

        Also, for each token and the end, by how much its logit exceeds the second choice's.
        """
        import torch

        produced: list[int] = []
        leads: list[float] = []
        step, cache = torch.tensor([list(ids)]), None
        with torch.inference_mode():
            while len(produced) < num_tokens:
                out = self.causal(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                best = out.logits[0, -1].topk(2)
                leads.append(float(best.values[0] - best.values[1]))
                token = int(best.indices[0])
                if token in end_ids:
                    break
                produced.append(token)
                step = torch.tensor([[token]])
        return produced, leads


@contextmanager
def merged_model(run: RunRecord, run_dir: Path, stated_sha256: str | None) -> Iterator[Path]:
    """The merged weights' directory: ``run_dir/merged`` if it was kept, else a temporary one, merged now.

    Raises :class:`DataError` if their digest is not ``stated_sha256``, the weights that the GGUF files were made from.
    """
    with tempfile.TemporaryDirectory(prefix="forge-merged-") as scratch:
        directory = run_dir / "merged"
        if (directory / RECORD).is_file():
            shards = read_weights(directory).shards
            merged_sha256 = sha256_json({shard.path.name: sha256_file(shard.path) for shard in shards})
        else:
            directory = Path(scratch) / "merged"
            base_dir, expected = Path(run.base_path), run.inputs.base_sha256
            merged = merge_adapter(base_dir, run_dir / "adapter", directory, expected_base_sha256=expected)
            merged_sha256 = merged.merged_sha256
        if stated_sha256 is not None and merged_sha256 != stated_sha256:
            raise DataError(
                f"the merged weights of {run_dir} have SHA-256 {merged_sha256[:12]},"
                f" export.json says {stated_sha256[:12]}",
                remedy="export again, with --keep-merged if it was done on another machine",
            )
        yield directory


def stated_merge(gguf: Path) -> str | None:
    """The digest of the merged weights by the export.json beside a GGUF file; ``None`` where there is none."""
    record = gguf.parent / "export.json"
    return str(read_json_object(record)["merged_sha256"]) if record.is_file() else None


@contextmanager
def open_gguf(path: Path, context_tokens: int, *, lora: Path | None = None, cache: str = "f32") -> Iterator[GgufModel]:
    """A GGUF file, loaded in a child process because llama.cpp may crash.

    ``lora``: an adapter as a GGUF file. ``cache``: the type of keys and values. Raises :class:`CheckError`.
    """
    check_header(path)
    memory_bytes = memory_limit_bytes(path.stat().st_size) + (64 << 30)
    with Child(memory_limit_bytes=memory_bytes) as child, tempfile.NamedTemporaryFile(prefix="forge-logits-") as file:
        model = GgufModel(path, child, file.name)
        lora_path = str(lora.absolute()) if lora else None
        model.ask(
            "open_logits", 0, path=str(path.absolute()), lora=lora_path, context_tokens=context_tokens, cache=cache
        )
        yield model


@dataclass(frozen=True)
class GgufModel:
    """A loaded GGUF file. ``target``: where the child writes logits."""

    path: Path
    child: Child
    target: str

    def logits(self, text: Text) -> Any:
        """Float32 of shape (trained, vocabulary), a torch tensor."""
        import torch

        self.ask("write_logits", len(text.ids), ids=text.ids.tolist(), rows=text.rows.tolist(), target=self.target)
        return torch.from_numpy(np.fromfile(self.target, dtype="<f4").reshape(len(text.rows), -1))

    def continue_greedily(self, ids: Sequence[int], num_tokens: int, end_ids: set[int]) -> list[int]:
        """The greedy continuation's ids without the end."""
        length = len(ids) + num_tokens
        answer = self.ask("continue_greedily", length, ids=list(ids), num_tokens=num_tokens, end_ids=sorted(end_ids))
        return list(answer["ids"])

    def ask(self, task: str, length: int, /, **arguments: Any) -> dict[str, Any]:
        """What the child answers. ``length``: of the sequence that it evaluates, in tokens."""
        limit = time_limit_seconds(self.path.stat().st_size) + _SECONDS_PER_TOKEN * length
        return self.child.ask(task, arguments, doing=f"evaluate {self.path}", limit_seconds=limit).value
