"""A sample answer while a run trains: one fixed question, answered greedily by the model as it is at that step.

It must change nothing. Forward passes of the kind that an evaluation makes, no ``generate()``, which backends rewrite
and which has caches and settings of its own; the random state and every module's mode are put back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from forge.training.backends.job import TrainingJob
from forge.training.config.workload import Workload
from forge.training.data.conversation import Encoder, load_encoder
from forge.training.data.examples import Examples
from forge.training.data.questions import answer_begin, asked_text, assistant_opening, end_ids, question_ids
from forge.training.system.errors import DataError

MAX_NEW_TOKENS = 48
_LONGEST_PROMPT = 512  # tokens: the logits of all of them are in memory at once


@dataclass(frozen=True)
class Question:
    """``input_ids`` int32 of shape (length,), up to where the answer begins, which has at most ``num_new`` tokens."""

    text: str
    input_ids: np.ndarray
    num_new: int
    tokenizer: Any


def choose_question(job: TrainingJob) -> Question | None:
    """The first of ``evaluation.facts``, else the first held-out record's prompt. ``None``: nothing is to be asked.

    Raises :class:`DataError` where every prompt is too long, and what the chat template refuses.
    """
    workload = job.workload
    if not (workload.training.sample_answers and workload.training.evaluate_every_steps and job.validation):
        return None
    encoder, system = load_encoder(job.base_dir, job.template_date), workload.data.system_prompt
    for text, ids in _prompts(job.validation, workload, encoder):
        num_new = min(MAX_NEW_TOKENS, workload.data.max_length - len(ids))
        if len(ids) <= _LONGEST_PROMPT and num_new > 0:
            return Question(text or asked_text(encoder, ids, system), ids, num_new, encoder.tokenizer)
    longest = min(_LONGEST_PROMPT, workload.data.max_length - 1)
    raise DataError(f"no question of at most {longest} tokens", remedy="give a shorter one in evaluation.facts")


def _prompts(validation: Examples, workload: Workload, encoder: Encoder) -> Iterator[tuple[str | None, np.ndarray]]:
    """Facts with their text, then what is held out up to its first answer."""
    for fact in workload.evaluation.facts:
        yield fact.question, question_ids(encoder, fact.question, workload.data.system_prompt)
    opening = assistant_opening(encoder)
    for ids, labels in zip(validation.input_ids, validation.labels, strict=True):
        begin = answer_begin(ids, labels, opening)
        if begin is not None:
            yield None, ids[:begin]


def sample_answer(model: Any, question: Question, is_stop_requested: Callable[[], bool]) -> str | None:
    """The answer, greedy; ``None`` if a stop came first."""
    tokenizer = question.tokenizer
    ends = end_ids(tokenizer, getattr(model, "generation_config", None))
    device = next(model.parameters()).device
    ids = torch.from_numpy(question.input_ids.astype(np.int64))[None].to(device)
    num_asked = ids.shape[1]
    with _nothing_changed(model), torch.no_grad():
        for _ in range(question.num_new):
            if is_stop_requested():
                return None
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            chosen = int(logits[0, -1].argmax())
            if chosen in ends:
                break
            ids = torch.cat([ids, torch.tensor([[chosen]], device=device)], dim=1)
    return str(tokenizer.decode(ids[0, num_asked:].tolist(), skip_special_tokens=True))


@contextmanager
def _nothing_changed(model: Any) -> Iterator[None]:
    """Evaluation mode within; afterwards each module's own mode and all random states as they were."""
    training = [module for module in model.modules() if module.training]
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True
            random.setstate(of_python)
            np.random.set_state(of_numpy)
