"""The longest document that a backend trains on in so much memory.

    python -m forge.training.probes.context WORKLOAD --backend unsloth --budgets 8,24 [--set ...] [--plan ...]

One process: the backend's own trainer takes one real step, so that adapter, optimizer state and kernels
are there, and then single documents of random tokens forwards and backwards, as long as they fit and the time
allows. The peaks of the two measured lengths nearest to a budget give a line; the line gives the length that the
budget should hold; a run just below it and one just above confirm it, under a cap on the allocator
(`torch.cuda.set_per_process_memory_fraction`) that is the budget less what CUDA itself took. No memory is
filled up to simulate a smaller card, and libraries that ask how much is free are told what the budget
leaves. Lengths beyond the base's own positions are allowed: memory does not depend on what RoPE is worth there.

Budgets rise, and a length is measured when a budget's line needs it: staging buffers and position tables that a
library keeps at the size of the longest document so far are then hardly longer than the budget's own. What is left
of that, and what a library would move to the host when it loads on a smaller card, makes an answer too short, never
too long.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from forge.training.ending import translated
from forge.training.errors import ConfigurationError, ForgeError, GpuMemoryError, MachineError
from forge.training.files import read_json_object
from forge.training.plan import BACKEND_NAMES, Backend, load_plan
from forge.training.probes.bracket import GRAIN, Points, bracket, predict
from forge.training.session import base_directory
from forge.training.workload import Workload, load_workload

_GIB = 1 << 30


class _Done(Exception):
    """The probe has what it wants of the training loop."""


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
        batch = self.trainer.data_collator([{"input_ids": ids, "labels": list(ids)}])
        device = next(self.model.parameters()).device
        try:
            self.trainer.take_step(self.model, batch, torch.tensor(num_tokens - 1, device=device))
            torch.cuda.synchronize()
        except RuntimeError as error:
            if not isinstance(translated(error, self.trainer.job, self.trainer.stop), GpuMemoryError):
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


def longest_within(prober: Prober, points: Points, budget_bytes: int, seconds: float) -> dict[str, Any]:
    """The longest length that fits in ``budget_bytes``, and the shortest seen not to.

    ``points``: what this budget's line needs is measured first. ``seconds``: what may be spent.
    """
    import torch

    prober.clear()
    started = time.perf_counter()
    free, total = torch.cuda.mem_get_info()
    overhead = total - free - torch.cuda.memory_reserved()  # the CUDA context and what others hold
    cap = budget_bytes - overhead
    floor = torch.cuda.memory_allocated()
    result: dict[str, Any] = {"budget_gib": budget_bytes / _GIB, "cap_bytes": cap, "tokens_fits": None}
    result |= {"tokens_fails": None, "predicted_tokens": None, "tries": []}
    points.measure_beyond(prober, cap, most_seconds=seconds / 2)
    if cap <= floor:
        return result | {"why": f"weights and CUDA context alone take {(floor + overhead) / _GIB:.1f} GiB"}
    predicted = predict([(tokens, peak) for tokens, peak, _ in points.measured], cap)
    result["predicted_tokens"] = max(0, int(predicted))
    if predicted < GRAIN:
        return result | {"why": f"not even {GRAIN} tokens fit"}
    if budget_bytes > total:
        return result | {"why": f"not confirmed: this GPU has {total / _GIB:.1f} GiB in all"}
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    real = torch.cuda.mem_get_info

    def capped(device: Any = None) -> tuple[int, int]:
        here = max(0, cap - torch.cuda.memory_reserved())
        return min(here, real(device)[0]), budget_bytes

    torch.cuda.mem_get_info = capped
    try:
        left = seconds - (time.perf_counter() - started)
        longest, _, longest_seconds = points.measured[-1]
        bracket(prober, predicted, left, result, pace=(longest, longest_seconds))
    finally:
        torch.cuda.mem_get_info = real
        torch.cuda.set_per_process_memory_fraction(1.0)
    return result


def measure_context(
    workload: Workload,
    backend: Backend,
    plan_overrides: list[str],
    *,
    budgets_gib: list[float],
    lengths: list[int],
    seconds: float,
) -> dict[str, Any]:
    """Peaks at ``lengths`` and the longest length in each budget. ``seconds``: for all budgets together."""
    plan = load_plan(workload, backend, plan_overrides)
    base = base_directory(workload)
    from forge.training.backends import load_backend

    module = load_backend(backend)
    module.prepare(plan)
    import torch
    from transformers import TrainerCallback

    from forge.training.data.inputs import prepare_inputs
    from forge.training.job import TrainingJob

    if not torch.cuda.is_available():
        raise MachineError("context is measured on a CUDA GPU and this machine shows none")
    found: dict[str, Any] = {"backend": backend, "plan": plan.model_dump(), "budgets": []}
    points = Points(lengths)
    with tempfile.TemporaryDirectory() as name:
        inputs = prepare_inputs(workload, base, Path(name) / "run")
        vocabulary = int(read_json_object(base / "config.json")["vocab_size"])
        trainer = module.build(TrainingJob(workload, plan, backend, base, Path(name) / "run", inputs.train, None))

        class Probe(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
                prober = Prober(trainer, model, vocabulary * 9 // 10)  # below the specials
                deadline = time.perf_counter() + seconds
                for gib in sorted(budgets_gib):
                    left = deadline - time.perf_counter()
                    found["budgets"].append(longest_within(prober, points, int(gib * _GIB), left))
                found["points"] = [list(point) for point in points.measured]
                raise _Done

        trainer.add_callback(Probe())
        with suppress(_Done):
            trainer.train()
    return found


def main() -> int:
    """Print the measurement as JSON; errors as everywhere in Forge."""
    parser = argparse.ArgumentParser(
        prog="forge.training.probes.context", description="The longest document that fits."
    )
    parser.add_argument("workload")
    parser.add_argument("--backend", choices=BACKEND_NAMES, required=True)
    parser.add_argument("--budgets", default="8,24,80", help="GiB, separated by commas")
    parser.add_argument("--lengths", default="512,2048,8192,32768,131072", help="rising lengths to predict from")
    parser.add_argument("--seconds", type=float, default=240.0, help="what all budgets together may take")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--plan", action="append", default=[], dest="plan_overrides", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    try:
        budgets = [float(value) for value in arguments.budgets.split(",")]
        lengths = [int(value) for value in arguments.lengths.split(",")]
        if len(lengths) < 2 or lengths != sorted({*lengths}) or min(*lengths, *budgets) <= 0:
            raise ConfigurationError("--lengths takes two or more rising lengths, --budgets amounts above 0")
        workload = load_workload(arguments.workload, [*arguments.overrides, "training.max_steps=2"])
        found = measure_context(
            workload,
            arguments.backend,
            arguments.plan_overrides,
            budgets_gib=budgets,
            lengths=lengths,
            seconds=arguments.seconds,
        )
        print(json.dumps(found))
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ValueError as error:
        print(f"error: --budgets and --lengths take numbers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
