"""The config that a user writes: everything that defines the work, never how a machine carries it out.

A config is a YAML file plus ``key=value`` overrides. All errors are reported at once, with
the nearest known key where one is misspelt. Two runs with equal :meth:`Workload.digest`, equal
examples digests and equal base-weight digests do the same mathematics; file paths are left out
of the digest because data and weights are identified by their content.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from forge.training.config.overrides import apply_overrides, listed, shown, unusable_text, validation_errors
from forge.training.config.quantizations import Quantization
from forge.training.config.yaml import dump_yaml, load_yaml
from forge.training.system.errors import ConfigurationError
from forge.training.system.files import sha256_json

WORKLOADS = Path(__file__).resolve().parents[3] / "workloads"

# Bounds far above any use: a slip of the finger is an error here, and not a loop of 10^12 rounds later.
Positive = Annotated[int, Field(gt=0, le=100_000_000)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def _refuse_impossible(path: str) -> str:
    if len(path.encode()) > 4000 or any(len(part.encode()) > 255 for part in Path(path).parts):
        raise ValueError(f"the path is too long ({len(path):,} characters)")
    return path


PathText = Annotated[str, AfterValidator(_refuse_impossible)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)


class ModelSection(_Section):
    """The base model. ``path``: a directory, a hub name, or ``tiny``, ``small``, ``qwen2-7b`` (made on the spot)."""

    path: PathText = "tiny"
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

    documents: PathText | None = None  # a directory, or "embedded"
    train: PathText | None = None  # instruction/input/output or messages, JSONL
    validation: PathText | None = None
    validation_share: Share = 0.1
    instructions: tuple[InstructionRule, ...] = Field(default=(), strict=False)
    system_prompt: str | None = None
    max_length: Positive = 2048
    long_documents: Literal["divide", "cut"] = "divide"
    sample: Positive | None = None  # train on so many only: the longest and, by length, an even spread of the others
    loss_on: Literal["answer", "all"] = "answer"
    control_tokens: Literal["neutralise", "drop", "fail"] = "neutralise"
    on_unrepresentable: Literal["error", "leave_out"] = "error"  # a record that the chat template refuses or rewrites

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if (self.documents is None) == (self.train is None):
            raise ValueError("give one of data.documents and data.train")
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

    @property
    def is_8bit(self) -> bool:
        """Whether its state is quantised: by bitsandbytes, on a CUDA GPU."""
        return "8bit" in self.name

    @property
    def state_bytes_per_parameter(self) -> float:
        """Of AdamW's two moments: float32, or a byte each and a float32 scale per block of 256."""
        return 2 * (1 + 4 / 256) if self.is_8bit else 8.0


class TrainingSection(_Section):
    """One optimizer step trains on ``effective_batch`` examples. ``max_steps`` overrides ``epochs``."""

    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3.0
    max_steps: Positive | None = None
    effective_batch: Annotated[int, Field(gt=0, le=100_000)] = 8
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    evaluate_every_steps: Positive | None = None
    early_stopping_patience: Positive | None = None
    save_every_steps: Positive | None = None
    save_every_minutes: Annotated[float, Field(gt=0)] | None = 10.0  # a kill costs at most so much
    spike_limit: Positive | None = None  # end the run at this many loss spikes in a row; None: only report them

    @model_validator(mode="after")
    def _is_a_run_of_this_world(self) -> TrainingSection:
        if self.max_steps and self.max_steps * self.effective_batch > 100_000_000:
            raise ValueError("training.max_steps times training.effective_batch is more than 100,000,000 examples")
        return self

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
    """What the acceptance gate measures of this config, fixed before the first measurement.

    ``num_steps`` optimizer steps per run, of which the first ``num_warmup_steps`` are not timed.
    """

    num_pairs: Annotated[int, Field(ge=2)] = 5
    num_steps: Positive = 10
    num_warmup_steps: Positive = 2


Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "clearml", "neptune", "swanlab"]


class ExportSection(_Section):
    """GGUF files to make and the Modelfile's PARAMETER lines."""

    quantizations: tuple[Quantization, ...] = Field(default=("f16", "q8_0", "q4_k_m"), min_length=1, strict=False)
    parameters: dict[str, int | float | str | list[str]] = Field(default_factory=dict)


class Workload(_Section):
    """A whole config; ``name`` is also the default run directory's name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    description: str = ""
    model: ModelSection = ModelSection()
    data: DataSection
    lora: LoraSection = LoraSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    export: ExportSection = ExportSection()
    gate: GateSection = GateSection()
    report_to: tuple[Tracker, ...] = Field(default=("tensorboard",), strict=False)

    def digest(self) -> str:
        """SHA-256 of what changes the mathematics; paths and output settings are left out."""
        content = self.model_dump(mode="json")
        for key in ("name", "description", "report_to", "export", "evaluation", "gate"):
            del content[key]
        for section, key in (("model", "path"), ("model", "offline"), ("model", "revision")):
            del content[section][key]
        for key in ("documents", "train", "validation", "instructions", "validation_share", "on_unrepresentable"):
            del content["data"][key]
        for key in ("save_every_steps", "save_every_minutes", "spike_limit"):
            del content["training"][key]
        return sha256_json(content)

    def to_yaml(self) -> str:
        """The resolved config, every field written out."""
        return dump_yaml(self.model_dump(mode="json"))


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line ``key: old -> new`` for each key that differs in two dumped configs."""
    lines = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            lines += [f"  {name}.{key}: {old.get(key)} -> {new}" for key, new in value.items() if old.get(key) != new]
        elif old != value:
            lines.append(f"  {name}: {old} -> {value}")
    return lines


_PATHS = (("model", "path"), ("data", "documents"), ("data", "train"), ("data", "validation"))
_SOURCES = ("documents", "train")
_WORDS = {"tiny", "small", "qwen2-7b", "embedded"}


def load_workload(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Workload:
    """Read a config from a YAML file, or from ``workloads/`` by name, with ``key=value`` overrides.

    Relative paths in the file are relative to the file's folder, those in overrides to the
    current directory. Raises :class:`ConfigurationError` listing every error found.
    """
    path = _find(source)
    content = load_yaml(path)
    _refuse_unusable_text(path, content)
    _resolve_paths(content, path.parent)
    errors = apply_overrides(content, overrides, "--set")
    _refuse_unusable_text(path, content)
    _choose_source(content, overrides)
    _resolve_paths(content, Path.cwd())
    try:
        workload = Workload.model_validate(content)
    except ValidationError as invalid:
        errors += validation_errors(Workload, invalid)
    if errors:
        raise _invalid(path, errors)
    return workload


def _refuse_unusable_text(path: Path, content: dict[str, Any]) -> None:
    """Before anything could print such a text or look for a file of that name."""
    unusable = list(unusable_text(content))
    if unusable:
        raise _invalid(path, unusable)


def _invalid(path: Path, errors: list[str]) -> ConfigurationError:
    return ConfigurationError(
        f"{path}: {len(errors):,} error{'s' * (len(errors) > 1)}\n{listed(errors)}",
        remedy="`forge schema` prints every key with its type and default",
    )


def _choose_source(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Documents chosen by an override replace the file's own training records, and the other way round."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    chosen = [source for key in keys for source in _SOURCES if key == f"data.{source}"]
    data = content.get("data")
    if chosen and isinstance(data, dict) and data.get(chosen[-1]) is not None:
        data.pop(next(other for other in _SOURCES if other != chosen[-1]), None)


def _find(source: str | Path) -> Path:
    path = Path(source)
    try:
        if path.is_file():
            return path.absolute()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        pass
    known = sorted(p.stem for p in WORKLOADS.glob("*.yaml") if "." not in p.stem)
    if str(source) in known:
        return WORKLOADS / f"{source}.yaml"
    near = difflib.get_close_matches(str(source)[:60], known, 1)
    raise ConfigurationError(
        f"no config {shown(repr(str(source)))}: neither a file nor one of {', '.join(known) or '(none)'}",
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
        try:
            candidate = (folder / Path(value).expanduser()).absolute()
            looks_local = value.startswith((".", "~")) or candidate.exists()
        except (OSError, ValueError, RuntimeError):  # a name too long, or nobody's home
            continue
        if section == "data" or looks_local:  # anything else is a hub name
            part[key] = str(candidate)
