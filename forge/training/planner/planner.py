"""The fastest plan for a run's exact work on this machine, or within a budget of it; computed for a card elsewhere."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from forge.training.backends import Backend, load_backend, load_plan
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload, load_workload
from forge.training.data.batching import step_order
from forge.training.data.inputs import prepare_inputs
from forge.training.models.digests import model_shape
from forge.training.planner.layouts import Work, layouts
from forge.training.planner.memory import CONTEXT_BYTES, MemoryModel
from forge.training.planner.sizes import Sizes
from forge.training.planner.speed import SpeedModel
from forge.training.system.environment import describe_environment
from forge.training.system.errors import ConfigurationError, DataError, ForgeError, GpuMemoryError, MachineError
from forge.training.system.files import cache_dir, read_json_object, sha256_file, sha256_json, write_json
from forge.training.train.run import base_directory

if TYPE_CHECKING:
    from rich.console import Console

_GIB = 1 << 30
MEASURED_SECONDS = 90.0  # after the load: no further layout is begun then
_SHOWN = 6
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:GiB|GB|G)?", re.IGNORECASE)


def parse_gib(text: str, option: str) -> float:
    """A card's memory as people write it: ``8``, ``8GiB``, ``8 GB``; GiB all of them, as cards are sold.

    Raises :class:`ConfigurationError`.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not 0 < float(match[1]) < math.inf:
        raise ConfigurationError(f"{option} is {text!r:.40}, which is no amount of memory", remedy=f"{option} 8GiB")
    return float(match[1])


@dataclass(frozen=True)
class Planned:
    """A plan and what it was chosen from. Sizes in bytes.

    ``rows``: every layout that was judged, the chosen one first: its plan, predicted and measured peak, documents per
    second (forward and backward of the run's micro-batches), whether it fits. ``how``: measured on this machine, or
    computed for a card that is not here.
    """

    backend: Backend
    plan: dict[str, Any]
    changes: list[str]  # KEY=VALUE of --plan, against the config's own plan
    rows: list[dict[str, Any]]
    how: Literal["measured", "computed"]
    budget_bytes: int | None  # of the card; None: all of it
    limit_bytes: int  # of that for tensors
    seconds: float
    models: dict[str, Any] = field(default_factory=dict)
    key: str = ""  # of the cache

    def ran_out(self, smaller: str) -> None:
        """Remember ``smaller`` (KEY=VALUE), which a run needed after all: the same question is answered with it."""
        changed = replace(self, changes=[*self.changes, smaller])
        write_json(_cached(self.key), asdict(changed))


def plan_run(
    workload_name: str,
    overrides: Sequence[str],
    backend: Backend,
    fixed: Sequence[str],
    *,
    budget_gib: float | None = None,
    card_gib: float | None = None,
    announce: Callable[[str], None] = lambda _: None,
    again: bool = False,
) -> Planned:
    """The fastest layout of a config's run. Asked again it answers from the cache, unless ``again``.

    ``fixed``: ``KEY=VALUE`` of the plan that stay as they are. ``budget_gib``: of this GPU (or of a CPU's memory);
    ``card_gib``: of a card that is not here, for which peaks are computed and not measured. Raises
    :class:`GpuMemoryError` (on a CPU :class:`MachineError`) where nothing fits, and what inputs and backend raise.
    """
    if budget_gib is not None and card_gib is not None:
        raise ConfigurationError("--budget is of this machine, --card of another", remedy="give one of them")
    workload = load_workload(workload_name, list(overrides))
    if backend == "legacy":
        raise ConfigurationError("the legacy pipeline has one layout", remedy="--backend unsloth or trl")
    gib = card_gib if card_gib is not None else budget_gib
    start = [*_starting_point(workload, backend, fixed, gib), *fixed]
    own = load_plan(workload, backend)
    plan = load_plan(workload, backend, start)
    load_backend(backend).refuse(workload, plan)
    base = base_directory(workload)
    work = _work_of(workload, base)
    fixed_keys = [text.partition("=")[0].strip() for text in fixed]
    budget_bytes = None if gib is None else int(gib * _GIB)
    key = _key(workload, backend, base, work, start, budget_bytes, card_gib)
    if _cached(key).is_file() and not again:
        return Planned(**read_json_object(_cached(key)))
    if card_gib is not None:
        answer = _computed(workload, base, work, plan, fixed_keys, int(card_gib * _GIB))
    else:
        announce("measuring layouts on this machine: a minute or two, once for this work")
        answer = _measured(workload_name, overrides, backend, start, fixed_keys, work, budget_bytes)
    planned = _chosen(backend, own, answer, budget_bytes, "measured" if card_gib is None else "computed")
    planned = replace(planned, key=key)
    write_json(_cached(key), asdict(planned))
    return planned


def _cached(key: str) -> Path:
    return cache_dir() / "plans" / f"{key}.json"


def _starting_point(workload: Workload, backend: Backend, fixed: Sequence[str], gib: float | None) -> Iterator[str]:
    """What the planner sets before it chooses: Forge's layers, and the head's chunk by the memory there is."""
    has_gpu_kernels = load_backend(backend).NEEDS_GPU
    yield "kernels=forge"
    if has_gpu_kernels:
        yield f"loss_chunk_gib={min(1.0, max(0.0625, 2.0 ** math.floor(math.log2((gib or 80.0) / 32)))):g}"
    if workload.model.quantization == "nf4":
        yield "attention=mixed"


def _work_of(workload: Workload, base: Path) -> Work:
    with tempfile.TemporaryDirectory() as made:
        examples = prepare_inputs(workload, base, Path(made)).train
    lengths = np.array([len(ids) for ids in examples.input_ids], dtype=np.int64)
    return Work(tuple(tuple(int(n) for n in lengths[step]) for step in step_order(workload, len(lengths))))


def _key(
    workload: Workload,
    backend: Backend,
    base: Path,
    work: Work,
    start: Sequence[str],
    budget_bytes: int | None,
    card_gib: float | None,
) -> str:
    """A digest of all that the answer depends on."""
    environment = describe_environment(with_torch=False)
    gpu = environment["gpu"] or {}
    folder = Path(__file__).parents[1]
    sources = sorted(path for name in ("kernels", "planner", "backends") for path in (folder / name).glob("*.py"))
    parts = {
        "shape": model_shape(base),
        "model": [workload.model.quantization, workload.model.dtype],
        "lora": workload.lora.model_dump(mode="json"),
        "optimizer": workload.optimizer.name,
        "backend": backend,
        "start": list(start),
        "steps": work.steps,
        "budget": [budget_bytes, card_gib],
        "machine": [environment["cpu"], environment["ram_bytes"], gpu.get("name"), gpu.get("memory_total_bytes")],
        "packages": environment["packages"],
        "forge": [sha256_file(path) for path in sources],
    }
    return sha256_json(parts)[:24]


def _measured(
    workload_name: str,
    overrides: Sequence[str],
    backend: Backend,
    start: Sequence[str],
    fixed_keys: Sequence[str],
    work: Work,
    budget_bytes: int | None,
) -> dict[str, Any]:
    """The answer of a process of its own: it leaves no memory behind, and Unsloth rewrites its process."""
    with tempfile.TemporaryDirectory() as made:
        request, answer = Path(made) / "request.json", Path(made) / "answer.json"
        asked: dict[str, Any] = {
            "workload": workload_name,
            "overrides": list(overrides),
            "backend": backend,
            "plan": list(start),
        }
        asked |= {"fixed": list(fixed_keys), "steps": work.steps, "budget_bytes": budget_bytes}
        write_json(request, asked | {"seconds": MEASURED_SECONDS})
        command = [sys.executable, "-m", "forge.training.planner.probe", str(request), str(answer)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise ForgeError.of_child(done.returncode, "layouts could not be measured (see above)")
        found = read_json_object(answer)
    if found.pop("ran_out"):
        raise GpuMemoryError(
            "the weights and a first step of short documents do not fit into the budget",
            remedy="a larger budget, a smaller base or a lower lora.rank",
        )
    return found


def _computed(
    workload: Workload, base: Path, work: Work, start: Plan, fixed_keys: Sequence[str], card_bytes: int
) -> dict[str, Any]:
    """Layouts for a card that is not here, by the models' assumptions."""
    sizes = _sizes_of(workload, base)
    limit = max(0, card_bytes - CONTEXT_BYTES)
    memory, speed = MemoryModel.assumed(sizes, None, start, is_on_host=False), SpeedModel(sizes)
    found = layouts(work, start, fixed_keys, memory, speed, limit)
    rows = [
        {
            "plan": layout.plan.model_dump(),
            "predicted_peak_bytes": layout.peak_bytes,
            "predicted_documents_per_second": work.num_documents / layout.seconds,
            "peak_bytes": None,
            "documents_per_second": None,
            "fits": layout.peak_bytes <= limit,
        }
        for layout in found[:_SHOWN]
    ]
    return {"rows": rows, "budget_bytes": limit, "memory": memory.describe(), "speed": speed.describe(), "seconds": 0.0}


def _sizes_of(workload: Workload, base: Path) -> Sizes:
    try:
        return Sizes.of(workload, read_json_object(base / "config.json"))
    except KeyError as missing:
        raise DataError(f"{base}/config.json has no {missing}: what a layout takes cannot be computed") from missing


def _chosen(
    backend: Backend, own: Plan, answer: dict[str, Any], budget_bytes: int | None, how: Literal["measured", "computed"]
) -> Planned:
    rows = answer["rows"]
    if not rows or not rows[0]["fits"]:
        least = min((row["predicted_peak_bytes"] or row["peak_bytes"] or 0 for row in rows), default=0)
        needed = f": the least takes {least / _GIB:.1f} GiB" if least else ""
        kind = MachineError if answer.get("is_cpu") else GpuMemoryError
        raise kind(
            f"no layout of this work fits into {answer['budget_bytes'] / _GIB:.1f} GiB for tensors{needed}",
            remedy="a lower data.max_length (long documents are divided), a smaller base or a larger card",
        )
    plan = rows[0]["plan"]
    before = own.model_dump()
    return Planned(
        backend=backend,
        plan=plan,
        changes=[f"{key}={_written(value)}" for key, value in plan.items() if before[key] != value],
        rows=rows,
        how=how,
        budget_bytes=budget_bytes,
        limit_bytes=answer["budget_bytes"],
        seconds=answer["seconds"],
        models={key: answer[key] for key in ("memory", "speed", "probes") if key in answer},
    )


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def print_planned(planned: Planned, console: Console) -> None:
    """The table of layouts, the chosen one first, and the plan as a file of plans has it.

    Kept: everything, so many GiB or little (inputs and attention's outputs, "host": in its memory). x: does not fit.
    """
    from rich.table import Table

    from forge.training.config.yaml import dump_yaml

    table = Table(box=None, pad_edge=False)
    for name in ("", "layers", "at a time", "kept", "tile", "GiB said", "measured", "documents/s"):
        table.add_column(name, justify="left" if name in ("", "layers", "kept") else "right", no_wrap=True)
    for i, row in enumerate(planned.rows):
        plan = Plan.model_validate(row["plan"])
        speed = row["documents_per_second"] or row["predicted_documents_per_second"]
        table.add_row(
            "*" if i == 0 else "" if row["fits"] else "x",
            plan.kernels,
            f"{plan.micro_batch_tokens:,} tok." if plan.micro_batch_tokens else f"{plan.micro_batch} doc.",
            _kept(plan),
            f"{plan.mlp_tile_tokens:,}" if plan.mlp_tile_tokens else "-",
            _gib(row["predicted_peak_bytes"]),
            _gib(row["peak_bytes"]),
            f"{speed:.2f}" if row["documents_per_second"] else f"({speed:.2f})",
        )
    console.print(table)
    limit = f"{planned.limit_bytes / _GIB:.1f} GiB for tensors"
    if planned.how == "computed":
        console.print(
            f"computed for a card of {(planned.budget_bytes or 0) / _GIB:g} GiB ({limit}), not measured; speeds in "
            "brackets are an H200's",
            markup=False,
        )
    else:
        console.print(f"measured on this machine within {limit}, in {planned.seconds:.0f} s", markup=False)
    if planned.changes:
        console.print(dump_yaml({planned.backend: planned.plan}).rstrip(), markup=False)
    else:
        console.print("the config's own plan is the fastest", markup=False)


def _kept(plan: Plan) -> str:
    """What is kept for the backward pass, for a person."""
    if plan.gradient_checkpointing == "none":
        kept = "all"
    else:
        kept = f"{plan.kept_activations_gib:g} GiB" if plan.kept_activations_gib else "little"
        kept += ", host" if plan.gradient_checkpointing == "offload" else ""
    return kept + (", 16-bit base" if plan.dequantize_once else "")


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / _GIB:.2f}"
