"""Measures on this machine, in a process of its own: how much memory and time micro-batches take, and the best layouts.

    python -m forge.training.planner.probe REQUEST.json ANSWER.json

First a few micro-batches fit the models of memory and speed (memory.py, speed.py), then the layouts that should be
fastest take the run's largest micro-batch and a middling one: what does not fit is known, and how fast it is.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from forge.training.backends import load_plan
from forge.training.config.plan import Plan
from forge.training.config.workload import load_workload
from forge.training.planner.layouts import Layout, Work, judged, layouts, num_tokens
from forge.training.planner.memory import MemoryModel, Probed
from forge.training.planner.short_run import measure_in_short_run
from forge.training.planner.sizes import Sizes
from forge.training.planner.speed import SpeedModel
from forge.training.system.card import Card
from forge.training.system.environment import available_ram_bytes
from forge.training.system.files import read_json_object, write_json
from forge.training.system.oom import memory_that_ran_out

NUM_MEASURED = 3
MOST_TRIES = 6
_LEAST_TOKENS = 32


class Machine:
    """Takes micro-batches of random tokens through a trainer and measures them. Lives inside a training loop."""

    def __init__(self, trainer: Any, model: Any, vocabulary: int, card: Card | None) -> None:
        self.trainer, self.model, self.vocabulary, self.card = trainer, model, vocabulary, card
        self.layers = trainer.layers
        self._backward = trainer.accelerator.backward
        self._forward_bytes = 0
        trainer.accelerator.backward = self._between
        self.static_bytes = self.used_bytes()

    def _between(self, *args: Any, **kwargs: Any) -> Any:
        self._forward_bytes = self.peak_bytes()
        self.reset_peak()
        return self._backward(*args, **kwargs)

    def used_bytes(self) -> int:
        """Of memory now: the GPU's that is allocated, else this process's that is resident."""
        import torch

        self.clear()
        return int(torch.cuda.memory_allocated()) if self.card is not None else _status_bytes("VmRSS")

    def peak_bytes(self) -> int:
        """Since :meth:`reset_peak`."""
        import torch

        return int(torch.cuda.max_memory_allocated()) if self.card is not None else _status_bytes("VmHWM")

    def reset_peak(self) -> None:
        """Begin to look for a peak."""
        import torch

        if self.card is not None:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def clear(self) -> None:
        """Give back what no tensor holds."""
        import torch

        gc.collect()
        if self.card is not None:
            torch.cuda.empty_cache()
        else:
            with suppress(OSError, AttributeError):  # glibc keeps what was freed
                ctypes.CDLL(None).malloc_trim(0)

    def lay_out(self, plan: Plan) -> None:
        """What follows is laid out by ``plan``."""
        if plan.kernels == "forge":
            self.trainer.layers = self.layers
            recomputes = plan.gradient_checkpointing != "none"
            self.layers.configure(
                tile_tokens=plan.mlp_tile_tokens,
                keep_gib=(plan.kept_activations_gib or 0.0) if recomputes else None,
                offload=plan.gradient_checkpointing == "offload",
                dequantize_once=plan.dequantize_once,
            )
            return
        self.trainer.layers = None
        if plan.gradient_checkpointing == "none":
            self.model.gradient_checkpointing_disable()
        else:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()

    def take(self, batch: Sequence[int], *, warm: bool) -> tuple[int, int, float] | None:
        """Peak bytes of forward and backward, and seconds, of documents of these lengths; ``None``: it does not fit.

        ``warm``: once before, unmeasured, so that kernels, plans and pinned buffers are there.
        """
        import torch

        for _ in range(2 if warm else 1):
            self.clear()
            self.reset_peak()
            started = time.perf_counter()
            try:
                self._step(batch)
                if self.card is not None:
                    torch.cuda.synchronize()
            except (RuntimeError, MemoryError) as error:
                if memory_that_ran_out(error) is None:
                    raise
                self.model.zero_grad(set_to_none=True)
                return None
            seconds = time.perf_counter() - started
            backward = self.peak_bytes()
            self.model.zero_grad(set_to_none=True)
        return self._forward_bytes, backward, seconds

    def _step(self, batch: Sequence[int]) -> None:
        import torch

        rows = []
        for i, length in enumerate(batch):
            generator = torch.Generator().manual_seed(1000 * i + length)
            ids = torch.randint(self.vocabulary // 100, self.vocabulary, (length,), generator=generator).tolist()
            rows.append({"input_ids": ids, "labels": list(ids)})
        counted = torch.tensor(sum(length - 1 for length in batch), device=self.trainer.args.device)
        self.trainer.take_step(self.model, self.trainer.collate(rows), counted)


def _status_bytes(key: str) -> int:
    """One of Linux's figures of this process: VmRSS, resident now, or VmHWM, the most since it was reset."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{key}:"))


def plan_here(
    machine: Machine,
    sizes: Sizes,
    work: Work,
    start: Plan,
    fixed: Sequence[str],
    seconds: float,
    budget_bytes: int | None = None,
) -> dict[str, Any]:
    """The layouts that were measured, the best first, with the models that chose them.

    ``seconds``: after so many no further layout is begun. ``budget_bytes``: of a CPU's memory.
    """
    began = time.perf_counter()
    budget = machine.card.cap_bytes if machine.card is not None else budget_bytes or _free_of_a_cpu(machine)
    memory = MemoryModel.assumed(sizes, machine.static_bytes, start, is_on_host=machine.card is None)
    speed = SpeedModel(sizes)
    probes: list[Probed] = []
    candidates: list[Layout] = []
    if machine.layers is not None and start.kernels == "forge":
        probes = _fit(machine, start, memory, work, budget)
        if len(probes) >= 3:
            memory, speed = memory.fitted(probes), speed.fitted(probes)
        candidates = _distinct(layouts(work, start, fixed, memory, speed, budget))
    if machine.card is None or machine.layers is None:
        others = _of_the_stack(work, start, fixed, memory, speed)
        candidates = [layout for pair in zip_longest(candidates, others) for layout in pair if layout is not None]
    rows: list[dict[str, Any]] = []
    for layout in candidates:
        enough = sum(row["fits"] for row in rows if row["plan"]["kernels"] == layout.plan.kernels) >= NUM_MEASURED
        if enough or len(rows) >= 2 * MOST_TRIES or (rows and time.perf_counter() - began > seconds):
            continue
        rows.append(_measured(machine, layout, work, memory, speed, budget))
    rows.sort(key=lambda row: (not row["fits"], -(row["documents_per_second"] or 0.0)))
    return {
        "rows": rows,
        "is_cpu": machine.card is None,
        "budget_bytes": budget,
        "static_bytes": machine.static_bytes,
        "memory": memory.describe(),
        "speed": speed.describe(),
        "probes": [vars(probe) for probe in probes],
        "seconds": time.perf_counter() - began,
    }


def _free_of_a_cpu(machine: Machine) -> int:
    return (available_ram_bytes() or 0) + machine.static_bytes


def _fit(machine: Machine, start: Plan, memory: MemoryModel, work: Work, budget: int) -> list[Probed]:
    """Micro-batches through layers that recompute: three sizes, one of them tiled too."""
    longest = max(max(step) for step in work.steps)
    most = max(_LEAST_TOKENS * 8, min(16384, max(sum(step) for step in work.steps)))
    probes = []
    for total, tile in ((most // 8, None), (most // 2, None), (most // 2, most // 8), (most, most // 8)):
        batch = [longest] * (total // longest) + [total % longest] * bool(total % longest > 1)
        tokens = sum(batch)
        plan = start.model_copy(
            update={
                "gradient_checkpointing": "full" if memory.is_on_host else "offload",
                "kept_activations_gib": 0.0,
                "mlp_tile_tokens": tile,
                "dequantize_once": False,
                "padding": "none",
            }
        )
        if memory.peak_bytes(plan, [tokens]) > budget:
            continue
        machine.lay_out(plan)
        measured = machine.take(batch, warm=True)
        if measured is None:
            continue
        squares = sum(n * n for n in batch)
        probes.append(Probed(tokens, squares, 0, tile, not memory.is_on_host, *measured))
    return probes


def _distinct(found: list[Layout]) -> list[Layout]:
    """The fastest of each kind, the fastest kind first."""
    kept: list[Layout] = []
    for layout in found:
        if all(layout.differs(other) for other in kept):
            kept.append(layout)
    return kept


def _of_the_stack(
    work: Work, start: Plan, fixed: Sequence[str], memory: MemoryModel, speed: SpeedModel
) -> list[Layout]:
    """The backend's own layers: as many documents at a time as divide a step, recomputed or not, likely ones first."""
    size = max(len(step) for step in work.steps)
    found = []
    for checkpointing in ("none", "full"):
        for micro_batch in (n for n in range(size, 0, -1) if size % n == 0):
            changed = {"kernels": "stack", "micro_batch": micro_batch, "gradient_checkpointing": checkpointing}
            changed |= {"micro_batch_tokens": None, "kept_activations_gib": None, "dequantize_once": False}
            if any(key in fixed and getattr(start, key) != value for key, value in changed.items()):
                continue
            found.append(judged(start.model_copy(update=changed), work, memory, speed))
    return found


def _measured(
    machine: Machine, layout: Layout, work: Work, memory: MemoryModel, speed: SpeedModel, budget: int
) -> dict[str, Any]:
    """One layout with its largest and a middling micro-batch taken."""
    plan = layout.plan
    machine.lay_out(plan)
    batches = sorted(work.micro_batches(plan), key=lambda batch: num_tokens(batch, plan))
    chosen = {batches[-1], batches[len(batches) // 2]}
    row: dict[str, Any] = {"plan": plan.model_dump(), "documents_per_second": None, "peak_bytes": None}
    row["predicted_peak_bytes"] = layout.peak_bytes if plan.kernels == "forge" else None
    row["predicted_documents_per_second"] = work.num_documents / layout.seconds
    predicted = taken = 0.0
    peak = 0
    for batch in sorted(chosen, key=sum, reverse=True):
        measured = machine.take(batch, warm=machine.card is not None)
        if measured is None:
            return row | {"fits": False}
        peak = max(peak, *measured[:2])
        taken += measured[2]
        total = num_tokens(batch, plan)
        predicted += speed.seconds(
            total,
            sum(n * n for n in batch),
            memory.num_kept(plan, total),
            plan.mlp_tile_tokens,
            plan.gradient_checkpointing == "offload",
            plan.dequantize_once,
        )
    row |= {"fits": peak <= budget, "peak_bytes": peak}
    return row | {"documents_per_second": work.num_documents / (layout.seconds * taken / predicted)}


def main(request_path: str, answer_path: str) -> None:
    """Measure what ``request_path`` asks and write the answer."""
    request = read_json_object(Path(request_path))
    name, overrides, backend = request["workload"], request["overrides"], request["backend"]
    plan_overrides = request["plan"]
    workload = load_workload(name, overrides)
    start = load_plan(workload, backend, plan_overrides)
    work = Work(tuple(tuple(step) for step in request["steps"]))
    answer: dict[str, Any] = {}

    def look(trainer: Any, model: Any, base: Path, card: Card | None) -> None:
        config = read_json_object(base / "config.json")
        machine = Machine(trainer, model, int(config["vocab_size"]) * 9 // 10, card)  # below the specials
        sizes = Sizes.of(workload, config)
        answer.update(
            plan_here(machine, sizes, work, start, request["fixed"], request["seconds"], request["budget_bytes"])
        )

    run = measure_in_short_run(name, overrides, backend, plan_overrides, request["budget_bytes"], look)
    write_json(Path(answer_path), {**answer, "ran_out": run.ran_out})


if __name__ == "__main__":
    main(*sys.argv[1:])
