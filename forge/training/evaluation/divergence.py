"""How far a model's predictions are from a reference's, on the same texts: mean KL and same most probable token.

The reference's logits are computed once and stored; merged weights and every GGUF file are compared with them. The
functions at the end are tasks of a child process, which holds the models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forge.training.system.errors import CheckError, DataError

TEXTS, LOGITS = "texts.json", "logits.f32"
_CHUNK_ROWS = 32  # of float64: 152,064 columns are 39 MB


@dataclass(frozen=True)
class Text:
    """A sequence of ids. ``rows``: the positions whose next token is predicted and counted."""

    document: str
    ids: list[int]
    rows: list[int]


@dataclass
class Divergence:
    """Of one model from the reference, in nats per prediction. ``same_top_share``: of its most probable tokens."""

    mean_kl: float
    largest_kl: float
    standard_error: float | None
    same_top_share: float
    num_predictions: int
    num_documents: int


@dataclass
class _Sums:
    by_document: dict[str, list[float]] = field(default_factory=dict)
    largest: float = 0.0
    num_same: int = 0

    def add(self, document: str, kl: np.ndarray, same: int) -> None:
        sums = self.by_document.setdefault(document, [0.0, 0.0])
        sums[0], sums[1] = sums[0] + float(kl.sum()), sums[1] + len(kl)
        self.largest, self.num_same = max(self.largest, float(kl.max())), self.num_same + same

    def result(self) -> Divergence:
        """The error is over documents: a document's tokens are not independent."""
        sums = np.asarray(list(self.by_document.values()))
        total, count = sums.sum(axis=0)
        mean, num = total / count, len(sums)
        spread = None
        if num > 1:
            residuals = sums[:, 0] - mean * sums[:, 1]
            spread = float(np.sqrt(num / (num - 1) * np.square(residuals).sum()) / count)
        return Divergence(float(mean), self.largest, spread, self.num_same / count, int(count), num)


def write_texts(folder: Path, texts: Sequence[Text]) -> None:
    """What is compared, for the children that compare it."""
    rows = [{"document": t.document, "ids": t.ids, "rows": t.rows} for t in texts]
    (folder / TEXTS).write_text(json.dumps(rows), encoding="utf-8")


def compare(folder: Path, logits_of: Callable[[Text], np.ndarray]) -> Divergence:
    """KL(reference || model) over the texts of a folder. ``logits_of``: float32 of shape (rows, vocabulary).

    Raises :class:`CheckError` where the model's logits are not finite.
    """
    texts = [Text(**row) for row in json.loads((folder / TEXTS).read_text(encoding="utf-8"))]
    stored = np.memmap(folder / LOGITS, dtype="<f4", mode="r").reshape(sum(len(t.rows) for t in texts), -1)
    sums, at = _Sums(), 0
    for text in texts:
        found = logits_of(text)
        width = min(stored.shape[1], found.shape[1])  # rows of padding beyond the vocabulary
        if not np.isfinite(found[:, :width]).all():
            raise CheckError(f"its logits on {text.document!r} are not finite numbers")
        for begin in range(0, len(text.rows), _CHUNK_ROWS):
            rows = slice(begin, min(begin + _CHUNK_ROWS, len(text.rows)))
            wanted = _log_softmax(stored[at + rows.start : at + rows.stop, :width])
            given = _log_softmax(found[rows, :width])
            kl = (np.exp(wanted) * (wanted - given)).sum(axis=1)
            sums.add(text.document, kl, int((wanted.argmax(axis=1) == given.argmax(axis=1)).sum()))
        at += len(text.rows)
    return sums.result()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, dtype=np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def write_reference(
    base_dir: str, adapter_dir: str, folder: str, prompts: list[list[int]], end_ids: list[int], num_tokens: int
) -> dict[str, Any]:
    """Store the adapter's logits on the texts of ``folder``, in float32 where it fits, and answer ``prompts`` greedily.

    ``answers``: the ids of each answer, without the end; ``ends``: whether it ended by itself within ``num_tokens``.
    """
    from forge.training.evaluation.neutral_model import load_model, refuse_unsloth, release_memory, with_adapter
    from forge.training.models.weights import read_weights

    refuse_unsloth()
    place = Path(folder)
    texts = [Text(**row) for row in json.loads((place / TEXTS).read_text(encoding="utf-8"))]
    placement = _placement(read_weights(Path(base_dir)), max(len(t.ids) for t in texts))
    model = with_adapter(load_model(Path(base_dir), placement), Path(adapter_dir), placement)
    with open(place / LOGITS, "wb") as out:
        for text in texts:
            _logits(model, text).tofile(out)
    produced = [_continue(model, prompt, num_tokens, end_ids) for prompt in prompts]
    del model
    release_memory()
    return {
        "dtype": placement.dtype,
        "device": placement.device,
        "answers": [ids for ids, _ in produced],
        "ends": [ended for _, ended in produced],
    }


def compare_merged(merged_dir: str, folder: str) -> Divergence:
    """Merged weights, computed in the reference's precision, against the stored reference."""
    from forge.training.evaluation.neutral_model import load_model
    from forge.training.models.weights import read_weights

    texts = json.loads((Path(folder) / TEXTS).read_text(encoding="utf-8"))
    placement = _placement(read_weights(Path(merged_dir)), max(len(t["ids"]) for t in texts))
    model = load_model(Path(merged_dir), placement)
    return compare(Path(folder), lambda text: _logits(model, text))


def compare_gguf(path: str, folder: str) -> Divergence:
    """A GGUF file in llama.cpp, with a float32 cache, against the stored reference."""
    from forge.training.llamacpp import answers

    texts = json.loads((Path(folder) / TEXTS).read_text(encoding="utf-8"))
    answers.open_logits(path, None, max(len(t["ids"]) for t in texts), "f32")
    try:
        return compare(Path(folder), lambda text: answers.logits(text.ids, text.rows))
    finally:
        answers.close()


def _placement(base: Any, longest: int) -> Any:
    """Float32 on a GPU that holds it, else what an evaluation would choose."""
    import torch

    from forge.training.evaluation.neutral_model import Placement, choose_placement

    if torch.cuda.is_available() and 4 * base.num_parameters * 1.3 < torch.cuda.mem_get_info()[0]:
        return Placement("cuda", "float32", {"": 0})
    return choose_placement(base, longest)


def _logits(model: Any, text: Text) -> np.ndarray:
    import torch

    with torch.inference_mode():
        ids = torch.tensor([text.ids], device=model.device)
        rows = torch.tensor(text.rows, device=model.device)
        logits = model.causal(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0]
        return np.ascontiguousarray(logits.float().cpu().numpy(), dtype="<f4")


def _continue(model: Any, ids: list[int], num_tokens: int, end_ids: list[int]) -> tuple[list[int], bool]:
    """The greedy continuation without its end, and whether it ended."""
    import torch

    produced: list[int] = []
    with torch.inference_mode():
        for token in _greedy(model, torch.tensor([ids], device=model.device)):
            if token in end_ids:
                return produced, True
            produced.append(token)
            if len(produced) == num_tokens:
                return produced, False
    raise DataError("the model answers nothing")  # the generator has no end


def _greedy(model: Any, step: Any) -> Iterator[int]:
    import torch

    cache = None
    while True:
        out = model.causal(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
        yield token
        step = torch.tensor([[token]], device=step.device)
