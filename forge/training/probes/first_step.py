"""One frozen optimizer step as a backend's own trainer takes it, or as float32 arithmetic has it.

    python -m forge.training.probes.first_step WORKLOAD --backend unsloth --out FILE.safetensors
        [--layout 8x1|4x2|1x8] [--padding longest|none] [--replace first|last|none] [--set ...] [--plan ...]
    python -m forge.training.probes.first_step WORKLOAD --backend unsloth --inputs-only

Eight of the workload's documents, the longest and an even spread of the others by length, are one step. The same
adapter is put into every backend, B drawn rather than zero, and dropout is off, since its masks differ between
layouts. Inside the backend's own training loop its step is taken as planned, then, with the same micro-batches:

- ``step/MATRIX``: the gradient that the loop itself accumulated, with the divisor that it chose;
- ``document/N/MATRIX``, ``document_losses``: each document's share of it, all other labels masked (nats, summed);
- ``token_losses``: the loss of single tokens, all labels masked but one: no stack needs to return logits for it;
- ``replaced_losses``: the same of the first micro-batch once more and with one document exchanged for another
  (``repeated_losses``: with none exchanged). What the others lose or gain by that has leaked.

``--inputs-only`` takes the workload as it is (its dropout, its documents, its steps) and stops before the first step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from forge.training.errors import ConfigurationError, ForgeError
from forge.training.files import sha256_file
from forge.training.job import TrainingJob
from forge.training.plan import BACKEND_NAMES, load_plan
from forge.training.probes.first_step_batch import NUM_DOCUMENTS, NUM_POSITIONS, FrozenStep, freeze_step
from forge.training.probes.first_step_faults import FAULTS, plant
from forge.training.session import base_directory
from forge.training.workload import Workload, load_workload

LAYOUTS = {"8x1": 8, "4x2": 4, "1x8": 1}  # documents a micro-batch x micro-batches
_FROZEN = (f"data.sample={NUM_DOCUMENTS}", f"training.effective_batch={NUM_DOCUMENTS}", "lora.dropout=0.0")
_QUIET = (
    *("report_to=[]", "training.save_every_steps=null"),
    *("training.evaluate_every_steps=null", "training.early_stopping_patience=null"),
)


def frozen_workload(source: str, overrides: list[str], *, inputs_only: bool = False) -> Workload:
    """The workload of the frozen step, or with ``inputs_only`` the workload itself, without what only writes."""
    return load_workload(source, [*overrides, *_QUIET, *(() if inputs_only else _FROZEN)])


def measure(
    workload: Workload,
    backend: str,
    plan_overrides: list[str],
    *,
    fault: str | None = None,
    replace: str = "first",
    inputs_only: bool = False,
    num_positions: int = NUM_POSITIONS,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and facts of the frozen step. ``backend``: of :data:`BACKEND_NAMES`, or ``reference``."""
    if backend not in ("reference", *BACKEND_NAMES):
        raise ConfigurationError(f"no backend {backend!r}", remedy=f"take reference or {', '.join(BACKEND_NAMES)}")
    name: Any = "trl" if backend == "reference" else backend
    plan = load_plan(workload, name, plan_overrides)
    base = base_directory(workload)
    from forge.training.backends import load_backend

    module = load_backend(name)
    module.prepare(plan)
    import torch

    from forge.training.data.inputs import prepare_inputs

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        inputs = prepare_inputs(workload, base, run_dir)
        job = TrainingJob(workload, plan, name, base, run_dir, inputs.train, None)
        step = freeze_step(inputs.train, workload.training.seed, num_positions)
        facts: dict[str, Any] = {
            "backend": backend,
            "workload": workload.name,
            "workload_sha256": workload.digest(),
            "plan": plan.model_dump(),
            "fault": fault,
            "base_sha256": inputs.described.base_sha256,
            "tokenizer_sha256": inputs.described.tokenizer_sha256,
            "train_examples_sha256": inputs.described.train_examples_sha256,
        }
        if backend == "reference":
            from forge.training.probes.first_step_reference import measure_reference

            tensors, measured = measure_reference(job, step)
        else:
            if torch.cuda.is_available():
                torch.backends.cuda.enable_cudnn_sdp(plan.attention == "default")
            tensors, measured = _measure_backend(module, job, step, fault, replace, inputs_only)
    if not inputs_only:
        facts |= {"num_trained_tokens": step.num_trained_tokens, "lengths": [len(i) for i in inputs.train.input_ids]}
        tensors |= {"positions": step.positions, "num_trained": step.num_trained}
    facts |= {"seconds": time.perf_counter() - started}
    if torch.cuda.is_available():
        facts["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
    return tensors, facts | measured


def _measure_backend(
    module: Any, job: TrainingJob, step: FrozenStep, fault: str | None, replace: str, inputs_only: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from forge.training.probes.first_step_batch import draw_adapter
    from forge.training.probes.first_step_loop import Done, Observer

    trainer = module.build(job)
    adapter = draw_adapter(trainer.model, job.workload.training.seed)
    if fault is not None:
        plant(fault, trainer)
    observer = Observer(trainer, job, step, replace=replace, inputs_only=inputs_only)
    trainer.training_step = observer
    with suppress(Done):
        trainer.train()
    return observer.tensors, {"adapter_sha256": adapter, **observer.facts}


def write(tensors: dict[str, np.ndarray], facts: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write both into one safetensors file, the facts as its metadata. Returns the facts with the file's digest."""
    from safetensors.numpy import save_file

    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(held, partial, metadata={"facts": json.dumps(facts)})
    partial.replace(path)
    return {**facts, "file": path.name, "file_sha256": sha256_file(path)}


def main() -> int:
    """Print the facts as JSON; errors as everywhere in Forge."""
    parser = argparse.ArgumentParser(prog="forge.training.probes.first_step", description="One frozen optimizer step.")
    parser.add_argument("workload")
    parser.add_argument("--backend", choices=("reference", *BACKEND_NAMES), required=True)
    parser.add_argument("--out", type=Path, metavar="FILE.safetensors")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), help="documents a micro-batch x micro-batches")
    parser.add_argument("--padding", choices=("longest", "none"))
    parser.add_argument("--replace", choices=("first", "last", "none"), default="first")
    parser.add_argument(
        "--inputs-only", nargs="?", const="yes", metavar="TAG", help="TAG: whatever tells two calls apart"
    )
    parser.add_argument("--positions", type=int, default=NUM_POSITIONS, help="tokens of a document looked at singly")
    parser.add_argument("--fault", choices=FAULTS, help="plant a fault that the gate must catch")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--plan", action="append", default=[], dest="plan_overrides", metavar="KEY=VALUE")
    told = parser.parse_args()
    try:
        if told.out is None and told.inputs_only is None:
            raise ConfigurationError("--out FILE.safetensors is missing", remedy="say where the tensors go")
        if told.positions < 2:
            raise ConfigurationError("--positions: a document's first and last are looked at", remedy="take 2 or more")
        workload = frozen_workload(told.workload, told.overrides, inputs_only=told.inputs_only is not None)
        plan = list(told.plan_overrides)
        if told.layout is not None:
            plan.append(f"micro_batch={LAYOUTS[told.layout]}")
        if told.padding is not None:
            plan.append(f"padding={told.padding}")
        tensors, facts = measure(
            workload,
            told.backend,
            plan,
            fault=told.fault,
            replace=told.replace,
            inputs_only=told.inputs_only is not None,
            num_positions=told.positions,
        )
        facts["layout"] = told.layout
        answer = write(tensors, facts, told.out) if told.out is not None else facts
        print(json.dumps(answer))
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
