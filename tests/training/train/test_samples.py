"""The sample answer: what a whole generation says, and nothing of the run is changed by it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.training.backends.job import TrainingJob
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload
from forge.training.data.conversation import Encoder
from forge.training.data.examples import encode_records
from forge.training.data.records import read_both
from forge.training.models.tokenizers import load_tokenizer
from forge.training.system.errors import DataError
from tests.support import run_command as command
from tests.support.tiny_model import shared_adapter, shared_base
from tests.support.tiny_run import EVALUATE_EVERY, NUM_STEPS, adapter, arguments, lines

FACT = {"question": "How many ships were there in 1911?", "answer": "48"}


@pytest.fixture
def job_of(tmp_path: Path) -> Callable[..., TrainingJob]:
    """A job on the shared base whose first held-out record has a prompt of 40 words."""

    def make(*, facts: tuple[dict[str, str], ...] = (), long: int = 1, **training: Any) -> TrainingJob:
        prompts = ["count " * 40 * long + "ships", "Recite `b.md`"]
        rows = [{"instruction": prompt, "input": "", "output": "It counts ships."} for prompt in prompts]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        workload = Workload.model_validate(
            {
                "name": "w",
                "data": {"train": str(path), "max_length": 4096, "system_prompt": "You keep a lighthouse."},
                "training": {"evaluate_every_steps": 2} | training,
                "evaluation": {"facts": facts},
            }
        )
        records, _ = read_both(path, None)
        examples = encode_records(records, Encoder(load_tokenizer(shared_base())), workload.data)
        return TrainingJob(workload, Plan(), "trl", shared_base(), tmp_path, examples, examples)

    return make


def test_the_first_fact_is_asked_else_the_first_held_out_prompt_that_is_short_enough(
    job_of: Callable[..., TrainingJob],
) -> None:
    from forge.training.train.samples import choose_question

    asked = choose_question(job_of(facts=(FACT, {"question": "b", "answer": "b"})))
    assert asked is not None
    assert asked.text == FACT["question"]
    asked = choose_question(job_of())
    assert asked is not None
    assert asked.text == "count " * 40 + "ships"  # the user's words, without the template's or the system prompt
    assert len(asked.input_ids) < len(job_of().train.input_ids[0])
    asked = choose_question(job_of(long=30))
    assert asked is not None
    assert asked.text == "Recite `b.md`"
    assert choose_question(job_of(facts=(FACT,), sample_answers=False)) is None
    assert choose_question(job_of(facts=(FACT,), evaluate_every_steps=None)) is None


def test_without_a_question_that_fits_none_is_asked_and_why_is_said(job_of: Callable[..., TrainingJob]) -> None:
    from forge.training.train.samples import choose_question

    job = job_of()
    for ids in job.train.input_ids, job.train.labels:
        ids[:] = [np.concatenate([np.full(600, ids[0][0]), row]).astype(np.int32) for row in ids]
    with pytest.raises(DataError, match="no question of at most 512 tokens"):
        choose_question(job)


@pytest.fixture(scope="module")
def model() -> Any:
    """The shared adapter with dropout on the shared base, in the midst of training: with gradients."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(shared_base(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, shared_adapter(), is_trainable=True)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.3)
    model.train()
    next(m for m in model.modules() if type(m).__name__ == "Qwen2MLP").eval()  # not all of one mode
    ids = torch.arange(20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return model


def test_a_sample_is_what_generate_says_greedily(model: Any, job_of: Callable[..., TrainingJob]) -> None:
    from forge.training.evaluation.answers import greedy_answer
    from forge.training.evaluation.neutral_model import NeutralModel
    from forge.training.train.samples import choose_question, sample_answer

    question = choose_question(job_of(facts=(FACT,)))
    assert question is not None
    answer = sample_answer(model, question, lambda: False)
    assert answer
    neutral = NeutralModel(model.eval(), "cpu")
    assert greedy_answer(neutral, question.tokenizer, question.input_ids, question.num_new) == answer
    model.train()


def test_a_sample_leaves_random_states_modes_and_gradients_as_they_were(
    model: Any, job_of: Callable[..., TrainingJob]
) -> None:
    import torch

    from forge.training.train.samples import choose_question, sample_answer

    question = choose_question(job_of(facts=(FACT,)))
    assert question is not None

    def state() -> tuple[Any, ...]:
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert gradients
        modes = [module.training for module in model.modules()]
        return torch.get_rng_state(), torch.stack([g.sum() for g in gradients]), modes, random.getstate()

    def draw(*_: Any) -> None:
        """As a model whose forward pass draws numbers."""
        torch.rand(3), random.random(), np.random.rand(3)

    hook = model.register_forward_pre_hook(draw)
    before, of_numpy = state(), np.random.get_state()[1].copy()
    sample_answer(model, question, lambda: False)
    after = state()
    hook.remove()
    assert (before[0] == after[0]).all()
    assert (before[1] == after[1]).all()
    assert before[2:] == after[2:]
    assert (np.random.get_state()[1] == of_numpy).all()


def test_a_stop_does_not_wait_for_the_answer(model: Any, job_of: Callable[..., TrainingJob]) -> None:
    from forge.training.train.samples import choose_question, sample_answer

    question = choose_question(job_of(facts=(FACT,)))
    assert question is not None
    asked = iter([False, False, True])
    assert sample_answer(model, question, lambda: next(asked)) is None


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run_dir) if "answer" in line]


def test_a_run_keeps_a_sample_of_each_evaluation_and_is_the_same_to_the_bit_without(
    folder: Path, reference: dict[str, Any]
) -> None:
    kept = samples(folder / "reference")
    assert [line["step"] for line in kept] == list(range(EVALUATE_EVERY, NUM_STEPS + 1, EVALUATE_EVERY))
    assert len({line["question"] for line in kept}) == 1
    off = ("--set", "training.sample_answers=false")
    done = command.run(arguments(folder, folder / "unasked", *off), folder / "logs" / "unasked")
    assert done.returncode == 0, done.stderr
    assert samples(folder / "unasked") == []
    assert "answered:" not in done.stderr
    assert adapter(folder / "unasked") == adapter(folder / "reference")


def test_a_sample_that_fails_ends_the_samples_and_not_the_run(folder: Path, reference: dict[str, Any]) -> None:
    done = command.run(
        arguments(folder, folder / "unanswered"), folder / "logs" / "unanswered", fault="tests.support.faults:no_sample"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no sample answers from here on: OutOfMemoryError") == 1
    assert adapter(folder / "unanswered") == adapter(folder / "reference")
