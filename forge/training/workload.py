"""Workload: everything that defines the work, and never how a machine carries it out.

A workload is a YAML file plus ``key=value`` overrides. All errors are reported at once, with
the nearest known key where one is misspelt. Two runs with equal :meth:`Workload.digest`, equal
examples digests and equal base-weight digests do the same mathematics; file paths are left out
of the digest because data and weights are identified by their content.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from forge.training.errors import ConfigurationError
from forge.training.files import sha256_json
from forge.training.yaml_strict import load_yaml, parse_scalar

WORKLOADS = Path(__file__).resolve().parents[2] / "workloads"

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelSection(_Section):
    """The base model. ``path``: a directory, a hub name, or ``tiny``, ``small``, ``qwen2-7b`` (made on the spot)."""

    path: str = "tiny"
    revision: str | None = None
    quantization: Literal["none", "nf4"] = "none"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    offline: bool | None = None  # None: offline where the path is local


class InstructionRule(_Section):
    """Documents whose path begins with ``prefix`` get ``text``, in which ``{path}`` is replaced."""

    prefix: str
    text: str


class DataSection(_Section):
    """The documents and how examples are made from them. ``max_length`` in tokens."""

    documents: str | None = None  # a directory, or "embedded"
    train: str | None = None  # instruction/input/output or messages, JSONL
    validation: str | None = None
    validation_share: Share = 0.1
    instructions: tuple[InstructionRule, ...] = Field(default=(), strict=False)
    system_prompt: str | None = None
    max_length: Positive = 2048
    long_documents: Literal["divide", "cut"] = "divide"
    sample: Positive | None = None  # train on so many only: the longest and, by length, an even spread of the others
    loss_on: Literal["answer", "all"] = "answer"
    control_tokens: Literal["neutralise", "drop", "fail"] = "neutralise"

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if (self.documents is None) == (self.train is None):
            raise ValueError("give either data.documents or data.train, not both and not neither")
        return self


class LoraSection(_Section):
    """Low-rank adaptation, Hu et al. 2021; scale = alpha / rank (alpha / sqrt(rank) with rsLoRA)."""

    rank: Positive = 16
    alpha: Positive = 32
    dropout: Share = 0.0
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        strict=False,
    )
    use_rslora: bool = False


class OptimizerSection(_Section):
    """Names are those of ``transformers.TrainingArguments``."""

    name: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Share = 0.03
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class TrainingSection(_Section):
    """One optimizer step trains on ``effective_batch`` examples. ``max_steps`` overrides ``epochs``."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Positive | None = None
    effective_batch: Positive = 8
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    evaluate_every_steps: Positive | None = None
    early_stopping_patience: Positive | None = None
    save_every_steps: Positive | None = None

    @model_validator(mode="after")
    def _stopping_needs_evaluation(self) -> TrainingSection:
        if self.early_stopping_patience and not self.evaluate_every_steps:
            raise ValueError("training.early_stopping_patience needs training.evaluate_every_steps")
        return self


class Fact(_Section):
    """A question whose greedy answer must contain ``answer`` after training and not before."""

    question: str
    answer: str


class EvaluationSection(_Section):
    """``num_answers``: greedy answers scored by ROUGE against their documents; 0 = none."""

    num_answers: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Positive = 64
    facts: tuple[Fact, ...] = Field(default=(), strict=False)


class GateSection(_Section):
    """What the acceptance gate measures of this workload, fixed before the first measurement.

    ``num_steps`` optimizer steps a run, of which the first ``num_warmup_steps`` are not timed.
    """

    num_pairs: Annotated[int, Field(ge=2)] = 5
    num_steps: Positive = 10
    num_warmup_steps: Positive = 2


Quantization = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"]


class ExportSection(_Section):
    """GGUF files to make and the Modelfile's PARAMETER lines."""

    quantizations: tuple[Quantization, ...] = Field(default=("f16", "q8_0", "q4_k_m"), min_length=1, strict=False)
    parameters: dict[str, int | float | str | list[str]] = Field(default_factory=dict)


class Workload(_Section):
    """A whole workload; ``name`` is also the default run directory's name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    model: ModelSection = ModelSection()
    data: DataSection
    lora: LoraSection = LoraSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    export: ExportSection = ExportSection()
    gate: GateSection = GateSection()
    report_to: tuple[str, ...] = Field(default=("tensorboard",), strict=False)

    def digest(self) -> str:
        """SHA-256 of what changes the mathematics; paths and output settings are left out."""
        content = self.model_dump(mode="json")
        for key in ("name", "description", "report_to", "export", "evaluation", "gate"):
            del content[key]
        for section, key in (("model", "path"), ("model", "offline"), ("model", "revision")):
            del content[section][key]
        for key in ("documents", "train", "validation", "instructions", "validation_share"):
            del content["data"][key]
        del content["training"]["save_every_steps"]
        return sha256_json(content)

    def to_yaml(self) -> str:
        """The resolved workload, every field written out."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line ``key: old -> new`` for each key of two dumped workloads that differs."""
    lines = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            lines += [f"  {name}.{key}: {old.get(key)} -> {new}" for key, new in value.items() if old.get(key) != new]
        elif old != value:
            lines.append(f"  {name}: {old} -> {value}")
    return lines


_PATHS = (("model", "path"), ("data", "documents"), ("data", "train"), ("data", "validation"))
_WORDS = {"tiny", "small", "qwen2-7b", "embedded"}


def load_workload(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Workload:
    """Read a workload from a YAML file, or from ``workloads/`` by name, with ``key=value`` overrides.

    Relative paths in the file are relative to the file's folder, those in overrides to the
    current directory. Raises :class:`ConfigurationError` listing every error found.
    """
    path = _find(source)
    content = load_yaml(path)
    _resolve_paths(content, path.parent)
    errors = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            errors.append(f"--set {override}: expected key=value, for example training.seed=7")
            continue
        value = parse_scalar(text)
        parts = key.strip().split(".")
        node = content
        for part in parts[:-1]:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                errors.append(f"--set {override}: {part} is not a section")
                break
            node = child
        else:
            node[parts[-1]] = value
            if parts[0] == "data" and parts[-1] in ("documents", "train") and value is not None:
                content["data"].pop("train" if parts[-1] == "documents" else "documents", None)
    _resolve_paths(content, Path.cwd())
    try:
        workload = Workload.model_validate(content)
    except ValidationError as invalid:
        errors += [_readable(error) for error in invalid.errors()]
    if errors:
        raise ConfigurationError(
            f"{path}: {len(errors)} error{'s' * (len(errors) > 1)}\n" + "\n".join(f"  - {e}" for e in errors),
            remedy="`python -m forge.training schema` prints every key with its type and default",
        )
    return workload


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path.absolute()
    named = WORKLOADS / f"{source}.yaml"
    if "/" not in str(source) and named.is_file():
        return named
    known = sorted(p.stem for p in WORKLOADS.glob("*.yaml") if "." not in p.stem)
    near = difflib.get_close_matches(str(source), known, 1)
    raise ConfigurationError(
        f"no workload {str(source)!r}: neither a file nor one of {', '.join(known) or '(none)'}",
        remedy=f"did you mean {near[0]}?" if near else "name a YAML file or one of those",
    )


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    for section, key in _PATHS:
        part = content.get(section)
        if not isinstance(part, dict):
            continue
        value = part.get(key)
        if not isinstance(value, str) or value in _WORDS or Path(value).is_absolute():
            continue
        candidate = (folder / Path(value).expanduser()).absolute()
        looks_local = value.startswith((".", "~")) or candidate.exists()
        if section == "data" or looks_local:  # anything else is a hub name
            part[key] = str(candidate)


def _readable(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _keys_beside(error["loc"]), 1)
        return f"{where}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where}: required, and not given"
    given = "" if error["type"].startswith("value_error") else f" (given: {error['input']!r:.60})"
    return f"{where}: {message}{given}" if where else message


def _keys_beside(location: tuple[Any, ...]) -> list[str]:
    model: Any = Workload
    for part in location[:-1]:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field is not None else None
    return list(model.model_fields) if hasattr(model, "model_fields") else []
