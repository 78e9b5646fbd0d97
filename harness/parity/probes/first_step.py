"""One optimizer step on frozen documents, as a backend's own trainer takes it, or in float32 (``reference``).

    python -m harness.parity.probes.first_step WORKLOAD --backend unsloth --out DIR [--tag NAME]
        [--step QUANTIZATION:LAYOUT:PADDING[:KEY=VALUE,...] ...] [--dropout] [--inputs] [--set ...] [--plan ...]

One process measures as many steps as it is asked for, since it spends most of its time on imports: ``--step
nf4:8x1:none`` is all eight documents as one micro-batch without padding, on a base in NF4; what follows the padding is
more of the plan. For the reference (``--backend reference``) a step is a quantisation alone.

Eight of the workload's documents, the longest and an even spread of the others by length, are one step. The same
adapter is put into every backend, B drawn rather than zero, and dropout is off, since a stack's own masks differ
between layouts. With ``--dropout`` it is the workload's, and the masks those of the counter
(forge/training/kernels/dropout.py): Forge's layers have them, and the stacks' and the reference's own layers are given
them as whole masks (masks.py). Inside the backend's own training loop the step is taken as planned, then measured with
the same micro-batches. The tensors that this leaves in ``--out``, and their shapes, are in
``harness/parity/first_step/compare.py``.

``--inputs`` takes the workload as it is (its dropout, its documents, its steps) and stops before the first step.
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

from forge.training.backends import BACKENDS, load_backend, load_plan
from forge.training.backends.job import StepObserver, TrainingJob
from forge.training.config.workload import Workload, load_workload
from forge.training.system.errors import CheckError, ConfigurationError
from forge.training.system.files import sha256_file
from forge.training.train.run import base_directory
from harness.measurement.probe_main import add_settings, probe_main
from harness.parity.probes.batch import NUM_DOCUMENTS, NUM_POSITIONS, draw_adapter, freeze_step
from harness.parity.probes.faults import planted

LAYOUTS = {"8x1": 8, "4x2": 4, "2x4": 2, "1x8": 1}  # documents a micro-batch x micro-batches
_FROZEN = (f"data.sample={NUM_DOCUMENTS}", f"training.effective_batch={NUM_DOCUMENTS}")
_NO_DROPOUT = ("lora.dropout=0.0",)
_QUIET = (
    *("report_to=[]", "training.save_every_steps=null"),
    *("training.evaluate_every_steps=null", "training.early_stopping_patience=null"),
)


def frozen_workload(source: str, overrides: list[str], *, inputs_only: bool = False, dropout: bool = False) -> Workload:
    """The workload of the frozen step, or with ``inputs_only`` the workload itself, without what only writes.

    ``dropout``: the workload's own stays on. Raises :class:`ConfigurationError` where it has none.
    """
    more = () if inputs_only else _FROZEN if dropout else (*_FROZEN, *_NO_DROPOUT)
    workload = load_workload(source, [*overrides, *_QUIET, *more])
    if dropout and not workload.lora.dropout:
        raise ConfigurationError(
            f"{source} has no dropout to measure", remedy="set lora.dropout, or leave --dropout out"
        )
    return workload


def measure(
    workload: Workload,
    backend: str,
    plan_overrides: list[str],
    *,
    fault: str | None = None,
    looks_for_leaks: bool = True,
    inputs_only: bool = False,
    num_positions: int = NUM_POSITIONS,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and facts of the frozen step.

    ``backend``: of :data:`BACKENDS`, or ``reference``. ``fault``: of ``faults.FAULTS``, planted in the trainer.
    """
    if backend not in ("reference", *BACKENDS):
        raise ConfigurationError(f"no backend {backend!r}", remedy=f"take reference or {', '.join(BACKENDS)}")
    name: Any = "trl" if backend == "reference" else backend
    plan = load_plan(workload, name, plan_overrides)
    module = load_backend(name)
    module.refuse(workload, plan)
    base = base_directory(workload)
    if not (name == "unsloth" and "unsloth" in sys.modules):  # imported for a step before this one
        module.prepare(plan)
    import torch

    from forge.training.data.inputs import prepare_inputs

    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
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
            "dropout": workload.lora.dropout,
            "fault": fault,
            "base_sha256": inputs.described.base_sha256,
            "tokenizer_sha256": inputs.described.tokenizer_sha256,
            "train_examples_sha256": inputs.described.train_examples_sha256,
        }
        if backend == "reference":
            from harness.parity.probes.reference import measure_reference

            tensors, measured = measure_reference(job, step)
        else:
            if torch.cuda.is_available():
                torch.backends.cuda.enable_cudnn_sdp(plan.attention == "default")
            from harness.parity.probes.loop import Done, Observer

            trainer = module.build(job, StepObserver())
            adapter = draw_adapter(trainer.model, workload.training.seed)
            if plan.kernels == "forge" and trainer.layers is None:
                raise CheckError("the stack's own layers train in place of Forge's", remedy="see the message above")
            observer = Observer(trainer, job, step, looks_for_leaks=looks_for_leaks, inputs_only=inputs_only)
            trainer.training_step = observer
            with planted(fault, trainer), suppress(Done):
                trainer.train()
            tensors, measured = observer.tensors, {"adapter_sha256": adapter, **observer.facts}
    if not inputs_only:
        facts |= {"num_trained_tokens": step.num_trained_tokens, "lengths": [len(i) for i in inputs.train.input_ids]}
        tensors |= {"positions": step.positions, "num_trained": step.num_trained}
    facts |= {"seconds": time.perf_counter() - started}
    if torch.cuda.is_available():
        facts["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
    return tensors, facts | measured


def write(tensors: dict[str, np.ndarray], facts: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write both into one safetensors file, the facts as its metadata. Returns the facts with the file's digest."""
    from safetensors.numpy import save_file

    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, partial, metadata={"facts": json.dumps(facts)})
    partial.replace(path)
    return {**facts, "file": path.name, "file_sha256": sha256_file(path)}


def parse_step(step: str, backend: str) -> tuple[str, str | None, list[str]]:
    """Quantisation, layout for people and plan overrides of ``QUANTIZATION[:LAYOUT[:PADDING[:KEY=VALUE,...]]]``.

    Raises :class:`ConfigurationError`.
    """
    quantization, *others = step.split(":")
    layout, padding, more = (*others, None, None, None)[:3]
    known = len(others) <= 3 and layout in (None, *LAYOUTS) and padding in (None, "longest", "none")
    if not known or (backend == "reference") != (not others) or quantization not in ("nf4", "none"):
        raise ConfigurationError(
            f"--step {step}: no such step of {backend}",
            remedy=f"write nf4 or none, and but for reference {'|'.join(LAYOUTS)}, longest or none: nf4:8x1:none",
        )
    settings = more.split(",") if more else []
    plan = [f"micro_batch={LAYOUTS[layout]}"] if layout else []
    plan += [f"padding={padding}"] if padding else []
    return quantization, f"{layout} ({', '.join(settings)})" if settings else layout, plan + settings


def _release() -> None:
    """Forget a step's model before the next is loaded."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def answer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what the arguments ask for: facts in the answer, tensors in files."""
    backend = arguments.backend
    if arguments.steps and arguments.out is None:
        raise ConfigurationError("--out DIR is missing", remedy="say where the tensors go")
    if not arguments.steps and not arguments.inputs:
        raise ConfigurationError("nothing to measure", remedy="name a --step, or --inputs")
    if arguments.positions < 2:
        raise ConfigurationError("--positions: a document's first and last are measured", remedy="take 2 or more")
    parsed = [parse_step(step, backend) for step in arguments.steps]
    result: dict[str, Any] = {"backend": backend, "inputs": None, "steps": []}
    if arguments.inputs:
        workload = frozen_workload(arguments.workload, arguments.overrides, inputs_only=True)
        _, result["inputs"] = measure(workload, backend, arguments.plan_overrides, inputs_only=True)
        _release()
    for step, (quantization, layout, plan) in zip(arguments.steps, parsed, strict=True):
        overrides = [*arguments.overrides, f"model.quantization={quantization}"]
        workload = frozen_workload(arguments.workload, overrides, dropout=arguments.dropout)
        plan = [*arguments.plan_overrides, *plan]
        tensors, facts = measure(workload, backend, plan, num_positions=arguments.positions)
        path = arguments.out / f"{arguments.tag}-{backend}-{step.replace(':', '-')}.safetensors"
        result["steps"].append(write(tensors, {**facts, "layout": layout}, path))
        del tensors
        _release()
    return result


def main() -> int:
    """Print the facts as JSON."""
    parser = argparse.ArgumentParser(prog="harness.parity.probes.first_step", description="Frozen optimizer steps.")
    parser.add_argument("workload")
    parser.add_argument("--backend", choices=("reference", *BACKENDS), required=True)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the tensors go, one file per step")
    parser.add_argument("--tag", default="step", help="what the files' names begin with")
    parser.add_argument("--attempt", type=int, default=0, help="tells repeated measurements apart, nothing else")
    parser.add_argument("--step", action="append", default=[], dest="steps", metavar="STEP")
    parser.add_argument("--dropout", action="store_true", help="steps have the workload's dropout")
    parser.add_argument("--inputs", action="store_true", help="also the inputs and settings of the workload's own run")
    parser.add_argument("--positions", type=int, default=NUM_POSITIONS, help="tokens per document measured singly")
    add_settings(parser)
    return probe_main(parser, answer)


if __name__ == "__main__":
    sys.exit(main())
