"""A first step as the probe left it on disk, and how far two of them are from one another. numpy, no torch.

A step is one safetensors file, written by ``harness.parity.probes.first_step`` with its facts as the metadata. D is the
step's number of documents, in the order of the examples; P the number of tokens per document whose loss is measured by
itself; MATRIX a LoRA matrix such as ``0.self_attn.q_proj.lora_A``. NaN: not measured.

- ``num_trained``: int64 (D,), tokens that the model is trained to predict;
- ``positions``: int32 (D, P), the tokens measured by themselves, as places in their document; -1 where there is none;
- ``step/MATRIX``: float32, shape of the matrix: the gradient that the loop itself accumulated, with the divisor that it
  chose (for the reference the sum over documents);
- ``document/N/MATRIX``: float32, shape of the matrix: document N's share of that gradient, all other labels masked and
  the loss divided by the trained tokens of the whole step;
- ``document_losses``: float64 (D,), each document's loss in nats, summed over its trained tokens;
- ``token_losses``: float64 (D, P), the loss in nats of each token of ``positions``, all labels masked but that one: no
  backend needs to return logits for it;
- ``repeated_losses``, ``replaced_losses``: float64 (D, P), of the first micro-batch's documents and the first few of
  their positions: the token losses measured once more, and with one document replaced by another of its length. Only a
  backend's files have them, and only where that micro-batch holds more than one document.

Errors of gradients are relative and count every matrix the same, however large its gradient is: the root mean square,
over matrices, of the norm of the difference over the norm of the reference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from forge.training.system.errors import CheckError, DataError

# Unit roundoffs: half the distance from 1 to the next number.
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class MeasuredStep:
    """``facts``: what the probe printed. Tensors: the module's docstring; gradients are read one at a time."""

    path: Path
    facts: dict[str, Any]

    @cached_property
    def matrices(self) -> list[str]:
        """Names of the adapter's matrices, sorted."""
        with self._open() as file:
            return sorted(name.removeprefix("step/") for name in file.keys() if name.startswith("step/"))  # noqa: SIM118

    @cached_property
    def small(self) -> dict[str, np.ndarray]:
        """Every tensor but the gradients, by name."""
        with self._open() as file:
            return {name: file.get_tensor(name) for name in file.keys() if "/" not in name}  # noqa: SIM118

    def gradient(self, matrix: str) -> np.ndarray:
        """What the loop accumulated: ``step/MATRIX`` as float64."""
        with self._open() as file:
            return np.asarray(file.get_tensor(f"step/{matrix}"), np.float64)

    def document_gradients(self, matrix: str) -> np.ndarray:
        """Each document's share: ``document/N/MATRIX`` as float64 of shape (D, ...)."""
        count = len(self.small["num_trained"])
        with self._open() as file:
            parts = [file.get_tensor(f"document/{number}/{matrix}") for number in range(count)]
        return np.stack(parts).astype(np.float64)

    @property
    def name(self) -> str:
        """For people: backend, layout, padding."""
        layout = self.facts.get("layout") or f"micro-batches of {self.facts['plan']['micro_batch']}"
        packed = "packed" if self.facts["plan"]["padding"] == "none" else "padded"
        dropout = ", with dropout" if self.facts.get("dropout") else ""
        arm = "float32" if self.facts["backend"] == "reference" else f"{self.facts['backend']} {layout} {packed}"
        return arm + dropout

    @contextmanager
    def _open(self) -> Iterator[Any]:
        from safetensors import safe_open

        with safe_open(self.path, framework="numpy") as file:
            yield file


def read_step(path: Path) -> MeasuredStep:
    """Read what the probe wrote. Raises :class:`DataError` for another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return MeasuredStep(path, json.loads(file.metadata()["facts"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} holds no first step: {error}", remedy="measure it again") from error


_SAME = ("workload_sha256", "base_sha256", "tokenizer_sha256", "train_examples_sha256", "adapter_sha256")


def check_same_step(*steps: MeasuredStep) -> None:
    """Raise :class:`CheckError` with both values unless all are of one batch, one base and one adapter."""
    first = steps[0]
    for other in steps[1:]:
        pairs = {key: (first.facts[key], other.facts[key]) for key in _SAME}
        differing = [f"  {key}: {a} | {b}" for key, (a, b) in pairs.items() if a != b]
        if first.matrices != other.matrices:
            differing.append(f"  matrices: {len(first.matrices)} | {len(other.matrices)}")
        if not differing and not np.array_equal(first.small["positions"], other.small["positions"]):
            differing.append("  positions of the tokens looked at")
        if differing:
            raise CheckError(
                f"not the same step: {first.name} | {other.name}\n" + "\n".join(differing),
                remedy="measure both from the same workload, documents and base",
            )


def token_error(step: MeasuredStep, reference: MeasuredStep) -> float:
    """Root mean square error of the single tokens' losses, nats; at least what float32 can tell apart."""
    is_measured = reference.small["positions"] >= 0
    exact = reference.small["token_losses"][is_measured]
    error = step.small["token_losses"][is_measured] - exact
    resolution = ROUNDOFF["float32"] * float(np.sqrt(np.mean(exact**2)))
    return float(np.maximum(np.sqrt(np.mean(error**2)), resolution))  # NaN stays NaN


def root_mean_square(values: Iterable[float]) -> float:
    """Of the values of all matrices."""
    return float(np.sqrt(np.mean(np.square(list(values)))))


def document_errors(step: MeasuredStep, reference: MeasuredStep) -> dict[str, float]:
    """For every matrix the relative error of the documents' gradients, all documents as one vector."""
    errors = {}
    for matrix in reference.matrices:
        exact = reference.document_gradients(matrix)
        errors[matrix] = _relative(step.document_gradients(matrix) - exact, exact)
    return errors


def sum_error(step: MeasuredStep, reference: MeasuredStep) -> float:
    """Relative error of the documents' gradients added up: each token weighs the same, whatever the loop did."""
    exact = {matrix: reference.gradient(matrix) for matrix in reference.matrices}
    return root_mean_square(_relative(step.document_gradients(m).sum(0) - exact[m], exact[m]) for m in exact)


def difference(first: MeasuredStep, second: MeasuredStep, reference: MeasuredStep) -> float:
    """Difference of what two steps' loops accumulated, relative to the reference. ``second`` may be the reference."""
    return root_mean_square(
        _relative(first.gradient(m) - second.gradient(m), reference.gradient(m)) for m in reference.matrices
    )


def cosines(step: MeasuredStep, reference: MeasuredStep) -> dict[str, float]:
    """For every matrix the cosine between the accumulated gradient and the reference's; 0 where there is none."""
    by_matrix = {}
    for matrix in reference.matrices:
        a, b = step.gradient(matrix).ravel(), reference.gradient(matrix).ravel()
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        by_matrix[matrix] = float(a @ b) / norms if norms else 0.0
    return by_matrix


def _relative(error: np.ndarray, exact: np.ndarray) -> float:
    norm = float(np.linalg.norm(exact))
    return float(np.linalg.norm(error)) / norm if norm else float("inf")


def noise(step: MeasuredStep, baseline: MeasuredStep, reference: MeasuredStep) -> float:
    """What rounding may do to an accumulated gradient in ``step``'s layout, relative to the reference.

    Three parts, taken as independent: the rounding of the arithmetic, which is the baseline's, seen in its documents'
    gradients added up here (never ``step``'s own: a fault would raise its own bar); that of adding documents up in
    float32 inside a product; and that of adding micro-batches up in the dtype that the backend keeps gradients in. Sums
    are off by their unit roundoff times the square root of the number of terms (Higham and Mary 2019, section 2: errors
    grow with the root, not with the number).
    """
    micro_batches = ROUNDOFF[step.facts["gradient_dtype"]] * len(step.facts["divisors"]) ** 0.5
    documents = ROUNDOFF["float32"] * len(step.small["num_trained"]) ** 0.5
    return math.hypot(sum_error(baseline, reference), documents, micro_batches)
