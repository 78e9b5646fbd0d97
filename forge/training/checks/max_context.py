"""The longest document that a backend trains on in so much memory.

    forge context CONFIG --backend unsloth [--budget 8] [--set ...] [--plan ...]

One process that from before the model is loaded has a card of that many GiB, or the GPU as it is: the allocator is
capped (`torch.cuda.set_per_process_memory_fraction`) at the budget less what CUDA itself took, and libraries that ask
how much there is are told the same, since some move weights to the host or size buffers by the answer. No memory is
filled up to simulate a smaller card.

The backend's own trainer takes one real step over short documents, so that adapter, optimizer state and kernels are
there, and then single documents of random tokens forwards and backwards: of rising lengths as long as they fit and
the time allows, then, where the line through the last two peaks meets the cap, just below and just above. Lengths
beyond the base's own positions are allowed: memory does not depend on what RoPE is worth there.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forge.training.backends import Backend
from forge.training.planner.short_run import measure_in_short_run
from forge.training.system.card import Card
from forge.training.system.errors import ConfigurationError, MachineError
from forge.training.system.files import read_json_object
from forge.training.system.oom import memory_that_ran_out

GRAIN = 64  # tokens
MOST_TRIES = 12
_GAP = 0.03  # of the length: how far apart the longest that fits and the shortest that does not may end
_LEAST_GAIN = 1.1  # a length that the time allows instead of the predicted one must be so much longer than what fits
_GIB = 1 << 30
Step = Callable[[int], tuple[int, float] | None]
"""Takes a document of so many tokens through a training step: peak bytes and seconds; ``None``: it does not fit."""


class Prober:
    """Takes documents of any length through a trainer's step. Lives inside a training loop."""

    def __init__(self, trainer: Any, model: Any, vocabulary: int) -> None:
        self.trainer, self.model, self.vocabulary = trainer, model, vocabulary
        self.seen = 0
        model.get_input_embeddings().register_forward_hook(self._look)
        configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        bounds = [(config, "max_position_embeddings") for config in configs.values()]
        bounds += [(module, "max_seq_length") for module in model.modules()]  # Unsloth cuts what is longer
        self._bounds = [(owner, name, getattr(owner, name)) for owner, name in bounds if hasattr(owner, name)]

    def step(self, num_tokens: int) -> tuple[int, float] | None:
        """Peak reserved bytes and seconds of one document's step; ``None``: it does not fit.

        Raises :class:`MachineError` where the model was given other than ``num_tokens``.
        """
        import torch

        self.clear()
        for owner, name, bound in self._bounds:
            setattr(owner, name, max(bound, num_tokens))
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        if not self._take(num_tokens):
            self.clear()
            self._take(GRAIN)  # a whole step: a library that counts layers as they pass begins anew
            return None
        if self.seen != num_tokens:
            raise MachineError(f"of {num_tokens} tokens the model was given {self.seen}")
        return torch.cuda.max_memory_reserved(), time.perf_counter() - started

    def _take(self, num_tokens: int) -> bool:
        """Forwards and backwards; whether the memory was enough."""
        import torch

        generator = torch.Generator().manual_seed(num_tokens)
        ids = torch.randint(100, self.vocabulary, (num_tokens,), generator=generator).tolist()
        batch = self.trainer.collate([{"input_ids": ids, "labels": list(ids)}])
        try:
            num_trained = torch.tensor(num_tokens - 1, device=self.trainer.args.device)
            self.trainer.take_step(self.model, batch, num_trained)
            torch.cuda.synchronize()
        except RuntimeError as error:
            if memory_that_ran_out(error) != "GPU":
                raise
            return False
        finally:
            self.model.zero_grad(set_to_none=True)
        return True

    def _look(self, _module: Any, _inputs: Any, embedded: Any) -> None:
        self.seen = embedded.shape[0] * embedded.shape[1]

    def clear(self) -> None:
        """Give back what no tensor holds."""
        import torch

        gc.collect()
        torch.cuda.empty_cache()


def measure(step: Step, lengths: list[int], seconds: float) -> tuple[list[tuple[int, int, float]], int | None]:
    """(tokens, peak bytes, seconds) of each of the rising ``lengths`` that fits, and the first that does not, if any.

    From the third on none is begun that, at the square of the pace before it, might take longer than ``seconds``.
    """
    measured: list[tuple[int, int, float]] = []
    for length in lengths:
        if len(measured) >= 2 and measured[-1][2] * (length / measured[-1][0]) ** 2 > seconds:
            break
        peak_and_seconds = step(length)
        if peak_and_seconds is None:
            return measured, length
        measured.append((length, *peak_and_seconds))
    return measured, None


def predict(points: list[tuple[int, int, float]], cap: int) -> float:
    """The length whose peak is ``cap`` bytes, on the line through the last two ``points``, the nearest to it.

    A peak is no single line: up to a tile's length the MLPs are whole, and short documents fill no chunk of the loss.
    """
    (t0, b0, _), (t1, b1, _) = points[-2:]
    return t0 + (cap - b0) * (t1 - t0) / max(1, b1 - b0)


def bracket(step: Step, predicted: float, seconds: float, result: dict[str, Any], *, pace: tuple[int, float]) -> None:
    """Search around the prediction until one length fits and one longer by :data:`_GAP`, or by a grain, does not.

    ``result`` holds what is known before, ``tokens_fits`` and ``tokens_fails``, and receives what is found. In one
    direction the stride doubles from try to try; once a try ended otherwise than the one before, the middle is next.

    ``pace``: a length and its seconds. A longer one takes at most the square of that, as attention does, and is not
    begun where that is more than is left: the probe's limit would take all its answers with it. The longest that the
    time allows is tried instead.
    """
    started = time.perf_counter()
    stride = max(GRAIN, _whole(predicted * _GAP))
    tokens, is_between = _whole(predicted - stride / 2), False
    before: bool | None = None  # whether the try before fitted
    for _ in range(MOST_TRIES):
        if _is_bracketed(result) or result["tokens_fails"] == GRAIN:
            break
        fits, fails = result["tokens_fits"] or 0, result["tokens_fails"] or math.inf
        middle = max(fits + GRAIN, _whole((fits + fails) / 2)) if fails < math.inf else math.inf
        if is_between:
            tokens = int(middle)
        elif tokens <= fits:
            tokens = int(min(fits + stride, middle))
        elif tokens >= fails:
            tokens = int(max(fails - stride, middle))
        left = seconds - (time.perf_counter() - started)
        needed = pace[1] * max(1.0, tokens / pace[0]) ** 2
        if needed > left:
            allowed = _whole(pace[0] * math.sqrt(max(0.0, left) / pace[1]))
            if allowed < _LEAST_GAIN * max(fits, GRAIN):
                result["why"] = (
                    f"stopped: a step of {tokens:,} tokens may take {needed:,.0f} s and {left:.0f} s were left"
                )
                return
            tokens = allowed
        begun = time.perf_counter()
        peak_and_seconds = step(tokens)
        fits_now = peak_and_seconds is not None
        peak_bytes = peak_and_seconds[0] if peak_and_seconds else None
        result["tries"].append({"tokens": tokens, "fits": fits_now, "peak_bytes": peak_bytes})
        result["tokens_fits" if fits_now else "tokens_fails"] = tokens
        if fits_now:
            pace = tokens, 1.3 * (time.perf_counter() - begun)  # no two steps take the same
        is_between |= before not in (None, fits_now)
        before = fits_now
        tokens += stride if fits_now else -stride
        stride *= 2
    if not _is_bracketed(result):
        result["why"] = f"{len(result['tries'])} tries did not bracket it"


def _is_bracketed(result: dict[str, Any]) -> bool:
    fits, fails = result["tokens_fits"], result["tokens_fails"]
    return bool(fits and fails) and fails - fits <= max(GRAIN, _GAP * fails)


def _whole(tokens: float) -> int:
    """In grains, one at least."""
    return max(1, int(tokens) // GRAIN) * GRAIN


def longest_within(prober: Prober, card: Card, lengths: list[int], seconds: float) -> dict[str, Any]:
    """Peaks at ``lengths`` and the longest length that fits on ``card``, with the shortest seen not to.

    ``seconds``: what may be spent.
    """
    import torch

    prober.clear()
    started = time.perf_counter()
    card.limit()
    embedding = prober.model.get_input_embeddings().weight
    result: dict[str, Any] = {
        "loaded_bytes": torch.cuda.memory_allocated(),
        "is_embedding_on_host": embedding.device.type == "cpu",
    }
    measured, fails = measure(prober.step, lengths, seconds / 2)
    prober.clear()
    card.limit()  # long documents have kernels of their own
    points = [point for point in measured if point[1] <= card.cap_bytes]
    if len(points) < len(measured):
        fails = measured[len(points)][0]
    result |= {"cap_bytes": card.cap_bytes, "points": [list(point) for point in points], "tries": []}
    result |= {"tokens_fits": points[-1][0] if points else None, "tokens_fails": fails}
    if not points:
        return result | {"why": f"not even {lengths[0]} tokens fit"}
    predicted = predict(points, card.cap_bytes) if len(points) > 1 else points[0][0]
    result["predicted_tokens"] = int(predicted)
    if not card.is_real:
        return result | {"why": f"not confirmed: this GPU has {card.total_bytes / _GIB:.1f} GiB in all"}
    longest, _, longest_seconds = points[-1]
    left = seconds - (time.perf_counter() - started)
    bracket(prober.step, predicted, left, result, pace=(longest, longest_seconds))
    return result


def _rising(lengths: Sequence[str | int]) -> list[int]:
    try:
        tokens = [int(value) for value in lengths]
    except ValueError as error:
        raise ConfigurationError(f"--lengths takes numbers: {error}") from error
    if len(tokens) < 2 or tokens != sorted({*tokens}) or tokens[0] <= 0:
        raise ConfigurationError("--lengths takes two or more rising lengths")
    return tokens


def measure_context(
    workload_name: str,
    overrides: list[str],
    backend: Backend,
    plan_overrides: list[str],
    *,
    budget_gib: float | None,
    lengths: Sequence[str | int],
    seconds: float,
) -> dict[str, Any]:
    """What :func:`longest_within` finds on a card of ``budget_gib``, by default the GPU, with the plan.

    ``lengths``: two or more rising numbers of tokens to predict from. ``seconds``: without the load. Raises
    :class:`ConfigurationError` for a wrong argument and :class:`MachineError` without a GPU.
    """
    tokens = _rising(lengths)
    if budget_gib is not None and not 0 < budget_gib < math.inf:
        raise ConfigurationError("--budget takes an amount above 0")
    result: dict[str, Any] = {}

    def look(trainer: Any, model: Any, base: Path, card: Card | None) -> None:
        assert card is not None
        vocabulary = int(read_json_object(base / "config.json")["vocab_size"])
        prober = Prober(trainer, model, vocabulary * 9 // 10)  # below the specials
        result.update(longest_within(prober, card, tokens, seconds))

    budget_bytes = int(budget_gib * _GIB) if budget_gib is not None else None
    run = measure_in_short_run(
        workload_name, overrides, backend, plan_overrides, budget_bytes, look, needs_gpu="context"
    )
    assert run.card is not None
    if run.ran_out:
        result = {"cap_bytes": run.card.cap_bytes, "points": [], "tries": []}
        result["why"] = "the weights and a first step of short documents do not fit"
    return {"backend": backend, "plan": run.plan.model_dump(), "budget_gib": run.card.budget_bytes / _GIB, **result}


def describe_context(answer: dict[str, Any]) -> str:
    """One line about what :func:`measure_context` answer."""
    card = f"{answer['backend']} on {answer['budget_gib']:.1f} GiB"
    if not answer.get("tokens_fits"):
        return f"{card}: {answer.get('why', 'nothing was measured')}"
    least = f"; {answer['tokens_fails']:,} do not" if answer.get("tokens_fails") else f"; {answer.get('why', '')}"
    return f"{card}: documents of {answer['tokens_fits']:,} tokens fit{least}"
