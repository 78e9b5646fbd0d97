"""Each GGUF file is proven before it gets its name: it reads, predicts and answers as the adapter that was trained.

Four checks, each by its name in front of what it finds:

- ``tokens``, ``specials``, ``template``: text becomes the ids that training used (:mod:`.reading`).
- ``predictions``: on the user's held-out documents, mean KL of the trained adapter's predictions to the file's, and
  how often the most probable token is the same. The limits are the type's (:mod:`forge.training.config.quantizations`).
- ``answer``: it answers one question, and stops by itself where the adapter does.

Everything that opens a file or a model is a child process with limits of time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from forge.training.config.quantizations import GGUF_TYPES
from forge.training.config.workload import Workload
from forge.training.data.conversation import IGNORED, Encoder
from forge.training.data.examples import Examples, load_examples
from forge.training.data.questions import end_ids, question_ids
from forge.training.data.records import Message
from forge.training.evaluation.divergence import Divergence, Text, write_texts
from forge.training.export.awkward_text import CONVERSATIONS
from forge.training.export.chat import Settings, open_conversation
from forge.training.export.gguf import SECONDS_PER_TOKEN, memory_limit_bytes
from forge.training.export.proven import FileProof
from forge.training.export.reading import compare_reading
from forge.training.llamacpp.parent import Answer, Child, Progress, run_child, time_limit_seconds
from forge.training.models.weights import ModelWeights
from forge.training.system.errors import CheckError, DataError
from forge.training.system.files import read_json_object
from forge.training.train.record import RunRecord

ANSWER_TOKENS = 128  # within which the adapter may end its answer; a file gets twice as many as it took, and these
_SHORT_ANSWER = 32
_TEXT_TOKENS = 512  # of one example
_PREDICTIONS = 2048  # compared in all; a model of more than a billion parameters: half as many
_IMPORTANCE_TOKENS = 16384  # of the training documents; a larger model: a quarter
_LARGE = 1_000_000_000  # parameters
_NUM_DOCUMENTS = 64  # whose tokens are compared
_ROUNDED_REFERENCE_KL = 5e-3  # what a reference that computes in 16 bits may itself be off by
_FINE_BITS = 8.0  # a file of fewer bits that does not stop is flagged, not refused: its answer is another one
_QUESTION = "What can you tell me?"


@dataclass(frozen=True)
class _Asked:
    """The question, and what the adapter answered: ``prompt`` and ``ids`` without the end."""

    text: str
    prompt: list[int]
    ids: list[int]
    ends: bool


class Proof:
    """What files are compared with: the trained adapter on its base. :func:`proof_of` makes one."""

    def __init__(
        self, run: RunRecord, base: ModelWeights, encoder: Encoder, texts: Sequence[Text], source: str
    ) -> None:
        self.workload = Workload.model_validate(run.workload)
        self.base, self.encoder, self.texts, self.source = base, encoder, texts, source
        self.folder = Path()  # of the stored predictions
        self.has_reference = False
        self.reference_dtype = "float32"
        self.merge_kl = 0.0  # of the merged weights that files are made from
        self._torch: Child | None = None
        fact = next((fact.question for fact in self.workload.evaluation.facts), _QUESTION)
        prompt = question_ids(encoder, fact, self.workload.data.system_prompt).tolist()
        self.asked = _Asked(fact, prompt, [], ends=False)
        self.end_ids = _end_ids(encoder, base.directory)

    @contextmanager
    def open_reference(self) -> Iterator[None]:
        """The child process that computes with the adapter and the merged weights, for the time of the block."""
        with Child() as self._torch:
            yield
        self._torch = None

    def measure_reference(self, adapter_dir: Path, folder: Path, progress: Progress) -> Answer:
        """The adapter's predictions on the texts, stored in ``folder``, and its answer, once per export.

        Raises :class:`MachineError` where the model does not fit into memory; files are then proven without it.
        """
        folder.mkdir()
        write_texts(folder, self.texts)
        self.folder = folder
        progress(f"the adapter's own predictions on {self._described()}")
        num_tokens = sum(len(text.ids) for text in self.texts) + len(self.asked.prompt) + ANSWER_TOKENS
        assert self._torch is not None
        answer = self._torch.ask(
            "write_reference",
            {
                "base_dir": str(self.base.directory.absolute()),
                "adapter_dir": str(adapter_dir.absolute()),
                "folder": str(self.folder.absolute()),
                "prompts": [self.asked.prompt],
                "end_ids": self.end_ids,
                "num_tokens": ANSWER_TOKENS,
            },
            doing="compute the adapter's own predictions",
            limit_seconds=self._limit_seconds(num_tokens),
        )
        self.reference_dtype = str(answer.value["dtype"])
        self.has_reference = True
        ids, ends = answer.value["answers"][0], answer.value["ends"][0]
        self.asked = _Asked(self.asked.text, self.asked.prompt, list(ids), bool(ends))
        return answer

    def measure_merge(self, merged_dir: Path) -> tuple[Divergence, Answer]:
        """The merged weights' predictions against the adapter's; both are computed alike."""
        assert self._torch is not None
        answer = self._torch.ask(
            "compare_merged",
            {"merged_dir": str(merged_dir.absolute()), "folder": str(self.folder.absolute())},
            doing="compare the merged weights with the adapter",
            limit_seconds=self._limit_seconds(sum(len(text.ids) for text in self.texts)),
        )
        found = Divergence(**answer.value)
        self.merge_kl = found.mean_kl
        return found, answer

    def measure_file(self, path: Path) -> tuple[Divergence, Answer]:
        """A file's predictions against the adapter's. Raises :class:`CheckError` beginning with ``predictions``."""
        num_bytes = path.stat().st_size
        num_tokens = sum(len(text.ids) for text in self.texts)
        logits_bytes = (self.folder / "logits.f32").stat().st_size
        with _named("predictions"):
            answer = run_child(
                "compare_gguf",
                {"path": str(path.absolute()), "folder": str(self.folder.absolute())},
                doing=f"compare {path} with the adapter",
                limit_seconds=time_limit_seconds(num_bytes) + SECONDS_PER_TOKEN * num_tokens,
                memory_limit_bytes=memory_limit_bytes(num_bytes) + 2 * logits_bytes,
            )
        return Divergence(**answer.value), answer

    def limits(self, kind: str) -> tuple[float, float]:
        """Mean KL above which a file of this type is flagged, and refused."""
        row = GGUF_TYPES[kind]
        allowed = self.merge_kl + (0.0 if self.reference_dtype == "float32" else _ROUNDED_REFERENCE_KL)
        flagged, refused = ((math.sqrt(limit) + math.sqrt(allowed)) ** 2 for limit in (row.flagged_kl, row.refused_kl))
        return flagged, refused

    def prove(
        self,
        path: Path,
        kind: str,
        *,
        measured: Divergence | None = None,
        uses_imatrix: bool = False,
        other_way: Divergence | None = None,
    ) -> tuple[FileProof, int]:
        """All checks of a file of a type, and the most memory that the comparison took, in bytes; 0 if ``measured``.

        Raises :class:`CheckError` naming the check that failed, with what it found.
        """
        talks = [Message("system", s) for s in [self.workload.data.system_prompt] if s is not None]
        documents = [text.ids for text in self.texts][:_NUM_DOCUMENTS]
        reading = compare_reading(path, self.encoder, documents, [[*talks, Message("user", self.asked.text)]])
        for check, lines in reading.faults.items():
            raise CheckError(
                f"{path.name}: {check}: {lines[0]}",
                remedy="correct the base's tokenizer files or its template, then train again: llama.cpp would not read "
                "text as it was trained",
            )
        flags: list[str] = []
        flagged, refused = self.limits(kind)
        found, took = measured, None
        if found is None and self.has_reference:
            found, took = self.measure_file(path)
        if found is None:
            flags.append("its predictions were not compared with the adapter's, which does not fit into memory here")
        elif found.mean_kl > refused or not math.isfinite(found.mean_kl):
            raise CheckError(
                f"{path.name}: predictions: mean KL {found.mean_kl:.2g} nats to the trained adapter on {self.source}, "
                f"same top token {found.same_top_share:.1%}; a good {kind} file stays below {refused:.2g}",
                remedy="the file does not predict what was trained; take a type of more bits, and report this as a bug"
                " if that is refused as well",
            )
        elif found.mean_kl > flagged:
            flags.append(f"mean KL {found.mean_kl:.2g} nats to the adapter; {kind} is usually below {flagged:.2g}")
        answer, stops = self._answer(path)
        if stops is False:
            complaint = f"the adapter ends its answer to {self.asked.text!r} by itself, this file does not"
            if GGUF_TYPES[kind].bits_per_weight >= _FINE_BITS:
                raise CheckError(f"{path.name}: answer: {complaint}", remedy="its end of turn is not the trained one")
            flags.append(complaint)
        question, compared = self.asked.text, (uses_imatrix, other_way)
        proof = FileProof(reading, self.source, found, flagged, refused, question, answer, stops, flags, *compared)
        return proof, took.peak_rss_bytes if took else 0

    def _answer(self, path: Path) -> tuple[str, bool | None]:
        """Its greedy answer to the question, and whether it ended by itself; ``None``: the adapter's does not either.

        Where it goes on, the end is looked for where the adapter ended: two good answers may part at a near tie.
        """
        most = 2 * len(self.asked.ids) + _SHORT_ANSWER if self.asked.ends else _SHORT_ANSWER
        settings = Settings(system=self.workload.data.system_prompt, max_tokens=most, gpu_layers=0)
        with _named("answer"), open_conversation(path, settings) as opened:
            text = opened.say(self.asked.text)
            if not opened.is_cut or not self.asked.ends:
                return text, True if not opened.is_cut else None
        ids, num_bytes = [*self.asked.prompt, *self.asked.ids], path.stat().st_size
        limit = time_limit_seconds(num_bytes) + SECONDS_PER_TOKEN * len(ids)
        with _named("answer"), Child(memory_limit_bytes=memory_limit_bytes(num_bytes) + (8 << 30)) as child:
            arguments = {"path": str(path.absolute()), "lora": None, "context_tokens": len(ids) + 1, "cache": "f32"}
            child.ask("open_logits", arguments, doing=f"load {path}", limit_seconds=limit)
            forced = {"ids": ids, "num_tokens": 1, "end_ids": self.end_ids}
            more = child.ask("continue_greedily", forced, doing=f"ask {path}", limit_seconds=limit).value["ids"]
        return text, not more

    def _limit_seconds(self, num_tokens: int) -> float:
        return time_limit_seconds(4 * self.base.num_bytes) + 2 * SECONDS_PER_TOKEN * num_tokens

    def _described(self) -> str:
        return f"{sum(len(text.rows) for text in self.texts):,} tokens of {self.source}"


@contextmanager
def _named(check: str) -> Iterator[None]:
    """The check's name before whatever a child's failure says."""
    try:
        yield
    except CheckError as error:
        raise CheckError(f"{check}: {error.message}", remedy=error.remedy) from error


def _end_ids(encoder: Encoder, base_dir: Path) -> list[int]:
    """Ids that end a turn: the tokenizer's, and those of the base's generation_config.json."""
    path = base_dir / "generation_config.json"
    given = read_json_object(path).get("eos_token_id") if path.is_file() else None
    return end_ids(encoder.tokenizer, SimpleNamespace(eos_token_id=given))


def proof_of(run: RunRecord, run_dir: Path, base: ModelWeights, encoder: Encoder) -> Proof:
    """The texts that a run's files are compared on: held out, else trained, else Forge's own.

    Raises :class:`DataError` for stored examples that are not the run's.
    """
    most = _PREDICTIONS if base.num_parameters < _LARGE else _PREDICTIONS // 2
    positions = int(base.config.get("max_position_embeddings") or _TEXT_TOKENS)
    examples, source = stored_examples(run, run_dir, "validation"), "held-out documents"
    if examples is None:
        examples, source = stored_examples(run, run_dir, "train"), "training documents (nothing was held out)"
    texts = list(_texts(examples, most, min(_TEXT_TOKENS, positions))) if examples else []
    if not texts:
        texts, source = list(_own_texts(encoder)), "sentences of Forge's own (the run has no examples)"
    return Proof(run, base, encoder, texts, source)


def reference_bytes(base: ModelWeights) -> int:
    """At most so much disk do the stored predictions take."""
    most = _PREDICTIONS if base.num_parameters < _LARGE else _PREDICTIONS // 2
    return 4 * (most + _TEXT_TOKENS) * int(base.config.get("vocab_size") or 0)


def stored_examples(run: RunRecord, run_dir: Path, part: str) -> Examples | None:
    """A run's ``train`` or ``validation`` examples, ``None`` where it keeps none. Raises :class:`DataError`."""
    expected = getattr(run.inputs, f"{part}_examples_sha256")
    directory = run_dir / "examples" / part
    if expected is None or not directory.is_dir():
        return None
    examples = load_examples(directory)
    if examples.sha256 != expected:
        raise DataError(f"{directory} are not the examples of this run (digest differs)")
    return examples


def importance_sequences(run: RunRecord, run_dir: Path, base: ModelWeights) -> list[list[int]]:
    """Ids of the run's training examples, for an importance matrix. Raises :class:`DataError` where it has none."""
    examples = stored_examples(run, run_dir, "train")
    if examples is None:
        raise DataError(
            f"{run_dir} holds no training examples: an importance matrix is made from them",
            remedy="export in the run's own directory, or leave --imatrix out",
        )
    left = _IMPORTANCE_TOKENS if base.num_parameters < _LARGE else _IMPORTANCE_TOKENS // 4
    order = np.random.default_rng(0).permutation(len(examples.input_ids))  # documents of one folder are neighbours
    sequences = []
    for index in order:
        ids = examples.input_ids[index][: min(_TEXT_TOKENS, left)].tolist()
        left -= len(ids)
        sequences.append(ids)
        if left <= 0:
            break
    return sequences


def _texts(examples: Examples, most: int, longest: int) -> Iterator[Text]:
    left = most
    for name, all_ids, all_labels in zip(examples.document_ids, examples.input_ids, examples.labels, strict=True):
        ids, labels = all_ids[:longest], all_labels[:longest]
        rows = np.nonzero(labels[1:] != IGNORED)[0][:left].tolist()
        if rows:
            left -= len(rows)
            yield Text(name, ids.tolist(), rows)
        if left <= 0:
            return


def _own_texts(encoder: Encoder) -> Iterator[Text]:
    for name, talk in CONVERSATIONS.items():
        if talk[0]["role"] == "user":
            text = encoder.render([Message(turn["role"], turn["content"]) for turn in talk], asks=False)
            ids = encoder.ids_and_ends(text, plain=False)[0][:_TEXT_TOKENS].tolist()
            yield Text(name, ids, list(range(len(ids) - 1)))
