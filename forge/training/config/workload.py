"""The config that a user writes: everything that defines the work, never how a machine carries it out.

A config is a YAML file plus ``key=value`` overrides. All errors are reported at once, with
the nearest known key where one is misspelt. Two runs with equal :meth:`Workload.digest`, equal
examples digests and equal base-weight digests do the same mathematics; file paths are left out
of the digest because data and weights are identified by their content.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from forge.training.config.find import find_config
from forge.training.config.overrides import apply_overrides, listed, unusable_text, validation_errors
from forge.training.config.quantizations import Quantization, gguf_type
from forge.training.config.yaml import dump_yaml, load_yaml
from forge.training.system.errors import ConfigurationError
from forge.training.system.files import sha256_json

# Bounds far above any use: a slip of the finger is an error here, and not a loop of 10^12 rounds later.
Positive = Annotated[int, Field(gt=0, le=100_000_000)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def _refuse_impossible(path: str) -> str:
    if len(path.encode()) > 4000 or any(len(part.encode()) > 255 for part in Path(path).parts):
        raise ValueError(f"the path is too long ({len(path):,} characters)")
    return path


PathText = Annotated[str, AfterValidator(_refuse_impossible)]


class _Section(BaseModel):
    """The text below a key is its comment in `forge init`, `forge schema` and an editor."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ModelSection(_Section):
    """The base model."""

    path: PathText = "tiny"
    """a directory, a hub name (OWNER/NAME), smollm2 (small and real), or tiny, small, qwen2-7b (for trials)"""
    revision: str | None = None
    """of the hub: a branch, tag or commit"""
    quantization: Literal["none", "nf4"] = "none"
    """nf4: the base in 4 bits (QLoRA), on a CUDA GPU"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the computation; bfloat16 on Ampere or newer, float32 on a CPU"""
    offline: bool | None = None
    """never (true) or always (false) ask the hub; null: what HF_HUB_OFFLINE says"""


class InstructionRule(_Section):
    """Documents whose path begins with ``prefix`` get ``text``, in which ``{path}`` and ``{title}`` are replaced.

    ``{title}``: the heading that the document begins with. It is asked, so it is no part of the answer.
    """

    prefix: str
    text: str


class DataSection(_Section):
    """The documents, or records that are made already, and how examples are made from them."""

    documents: PathText | None = None
    """the folder of your documents, relative to this file; or embedded, those of the demo"""
    include: tuple[str, ...] = Field(default=(), strict=False)
    """files of documents to take although their kind is skipped, in gitignore syntax: ["*.lock"]"""
    exclude: tuple[str, ...] = Field(default=(), strict=False)
    """files of documents to leave out, in gitignore syntax: [drafts/]"""
    allow: tuple[str, ...] = Field(default=(), strict=False)
    """files of documents to take with the credentials in them, by their paths"""
    train: PathText | None = None
    """instead of documents: records in JSONL, a JSON array, CSV or Parquet"""
    validation: PathText | None = None
    """with train: the records held out, in a file of their own"""
    columns: dict[Literal["instruction", "input", "output", "messages", "conversations"], str] = Field(
        default_factory=dict
    )
    """what train and validation call these, where they call them otherwise: {instruction: question, output: answer}"""
    validation_share: Share = 0.1
    """share of the documents held out of training, to judge by"""
    instructions: tuple[InstructionRule, ...] = Field(default=(), strict=False)
    """by the beginning of the path: [{prefix: docs/, text: "Explain `{path}`"}]; "{title}" asks the first heading"""
    questions: Literal["none", "rules"] = "none"
    """rules: of documents, questions, sections and completions are trained too, all cut out of them"""
    wordings: Annotated[int, Field(ge=1, le=4)] = 3
    """with questions: in so many wordings each document and each question is asked"""
    system_prompt: str | None = None
    """stands before every example, and in the Modelfile"""
    max_length: Positive = 2048
    """tokens of the longest example: memory grows with it"""
    long_documents: Literal["divide", "cut"] = "divide"
    """a document longer than that is divided at headings, nothing lost; or cut, the rest lost"""
    sample: Positive | None = None
    """train on so many only: the longest and, by length, an even spread of the others"""
    loss_on: Literal["answer", "all"] = "answer"
    """learn the answers only, or the questions too"""
    control_tokens: Literal["neutralise", "drop", "fail"] = "neutralise"
    """chat markers that stand in a document: read as text, drop the document, or refuse"""
    on_unrepresentable: Literal["error", "leave_out"] = "error"
    """a record that the chat template refuses or rewrites: refuse, or leave it out and say so"""

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if (self.documents is None) == (self.train is None):
            raise ValueError("give one of data.documents and data.train")
        return self


class LoraSection(_Section):
    """Low-rank adaptation, Hu et al. 2021."""

    rank: Positive = 16
    """of the adapter's matrices: more can hold more, and takes more memory"""
    alpha: Positive = 32
    """the adapter's weight is alpha / rank (alpha / sqrt(rank) with use_rslora)"""
    dropout: Share = 0.0
    """share of the adapter's inputs left out at random while training"""
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        strict=False,
    )
    """the base's linear layers that get an adapter"""
    use_rslora: bool = False
    """rank-stabilised scale, for high ranks"""


class OptimizerSection(_Section):
    """Names are those of ``transformers.TrainingArguments``."""

    name: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch"
    """the 8-bit ones take a quarter of the memory, on a CUDA GPU"""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """the highest one, at the end of the warm-up"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's"""
    adam_beta1: Share = 0.9
    """decay of the mean of the gradients"""
    adam_beta2: Share = 0.999
    """decay of the mean of their squares"""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """added to the root of that mean"""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """how the learning rate falls"""
    warmup_ratio: Share = 0.03
    """share of the steps in which it rises"""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """a longer gradient is shortened to this"""

    @property
    def is_8bit(self) -> bool:
        """Whether its state is quantised: by bitsandbytes, on a CUDA GPU."""
        return "8bit" in self.name

    @property
    def state_bytes_per_parameter(self) -> float:
        """Of AdamW's two moments: float32, or a byte each and a float32 scale per block of 256."""
        return 2 * (1 + 4 / 256) if self.is_8bit else 8.0


class TrainingSection(_Section):
    """How long, and when to save and to judge."""

    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3.0
    """how often every example is trained"""
    max_steps: Positive | None = None
    """optimizer steps, instead of epochs"""
    effective_batch: Annotated[int, Field(gt=0, le=100_000)] = 8
    """examples of one optimizer step; how many at a time is the plan's micro_batch"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """of the adapter's first values, the order and the dropout"""
    evaluate_every_steps: Positive | None = None
    """held-out loss while training; the best adapter is kept"""
    early_stopping_patience: Positive | None = None
    """end the run when so many of those did not improve it"""
    save_every_steps: Positive | None = None
    """a checkpoint, so that an interrupted run resumes"""
    save_every_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    """a checkpoint as often: a kill costs at most so much"""
    spike_limit: Positive | None = None
    """end the run at this many loss spikes in a row; null: only report them"""
    sample_answers: bool = True
    """at each evaluation the model being trained answers one fixed question"""

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
    """A question whose greedy answer must hold ``answer`` after training, and before it only where ``known``."""

    question: str
    answer: str
    known: bool = False
    """the base answers it, and must still do so after training: has it forgotten anything?"""


class EvaluationSection(_Section):
    """What the base, the adapter, the merged model and the GGUF are asked."""

    num_answers: Annotated[int, Field(ge=0)] = 0
    """held-out documents whose greedy answer is scored by ROUGE"""
    max_new_tokens: Positive = 64
    """of each answer"""
    forgetting: bool = True
    """the loss on general text too, before and after training: about 3,000 tokens for each model"""
    facts: tuple[Fact, ...] = Field(default=(), strict=False)
    """[{question: ..., answer: ...}], found where a reply holds its words; known: true: by the base too"""
    min_facts: Annotated[int, Field(ge=0)] | None = None
    """so many of the facts that are not known beforehand suffice; null: all of them"""
    require_facts: bool = True
    """`forge run` fails (exit code 8) where that is not so, or held-out loss did not fall; false: only says so"""


class GateSection(_Section):
    """What the acceptance gate measures of this config, fixed before the first measurement."""

    num_pairs: Annotated[int, Field(ge=2)] = 5
    """of runs that are compared"""
    num_steps: Positive = 10
    """optimizer steps of each"""
    num_warmup_steps: Positive = 2
    """of them, the first that are not timed"""


Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "clearml", "neptune", "swanlab"]


class ExportSection(_Section):
    """The GGUF files and the Modelfile."""

    quantizations: tuple[Annotated[Quantization, BeforeValidator(gguf_type)], ...] = Field(
        default=("f16", "q8_0", "q4_k_m"), min_length=1, strict=False
    )
    """GGUF files to make; q4_k_m is about a third of f16"""
    parameters: dict[str, int | float | str | list[str]] = Field(default_factory=dict)
    """the Modelfile's PARAMETER lines: {temperature: 0.7, num_ctx: 4096}"""


class Workload(_Section):
    """A whole config. Made of a file, it knows which: its plan lies beside it (:attr:`plans_path`)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """of the run directory (runs/NAME-BACKEND) and of the GGUF files"""
    description: str = ""
    """one line, for the model card"""
    model: ModelSection = ModelSection()
    data: DataSection
    lora: LoraSection = LoraSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    export: ExportSection = ExportSection()
    gate: GateSection = GateSection()
    report_to: tuple[Tracker, ...] = Field(default=("tensorboard",), strict=False)
    """who keeps the curves: tensorboard, wandb, mlflow, ..., or none: []"""
    _path: Path | None = PrivateAttr(default=None)

    @property
    def path(self) -> Path | None:
        """The file that it was read from, absolute."""
        return self._path

    @property
    def plans_path(self) -> Path | None:
        """The file of plans of the file it was read from: ``mine.plans.yaml`` beside ``mine.yaml``."""
        return self._path.with_name(f"{self._path.stem}.plans.yaml") if self._path else None

    def digest(self) -> str:
        """SHA-256 of what changes the mathematics; paths and output settings are left out."""
        content = self.model_dump(mode="json")
        for key in ("name", "description", "report_to", "export", "evaluation", "gate"):
            del content[key]
        for section, key in (("model", "path"), ("model", "offline"), ("model", "revision")):
            del content[section][key]
        for key in (
            *("documents", "include", "exclude", "allow", "train", "validation", "columns", "instructions"),
            *("questions", "wordings", "validation_share", "on_unrepresentable"),
        ):
            del content["data"][key]
        for key in ("save_every_steps", "save_every_minutes", "spike_limit", "sample_answers"):
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
_WORDS = {"tiny", "small", "qwen2-7b", "smollm2", "embedded"}
# Of transformers, peft and the configs of other tools.
_NAMES_ELSEWHERE = {
    **dict.fromkeys(("base_model", "model_name_or_path", "model_id"), "model.path"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "model.quantization"),
    **dict.fromkeys(("dataset", "datasets", "train_file"), "data.train"),
    **dict.fromkeys(("max_seq_length", "sequence_len", "cutoff_len", "max_seq_len"), "data.max_length"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "lora.rank"),
    **dict.fromkeys(("lora_target_modules", "target_modules"), "lora.targets"),
    **{"lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout"},
    **{"lr": "optimizer.learning_rate", "lr_scheduler_type": "optimizer.schedule", "optim": "optimizer.name"},
    **dict.fromkeys(("warmup_steps", "warmup"), "optimizer.warmup_ratio"),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), "training.epochs"),
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps"), "training.effective_batch"),
    **{"eval_steps": "training.evaluate_every_steps", "save_steps": "training.save_every_steps"},
    "per_device_train_batch_size": "micro_batch of the plan (--plan micro_batch=...)",
    "output_dir": "the option --out",
}


def load_workload(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Workload:
    """Read a config from a YAML file, or from ``forge/workloads/`` by name, with ``key=value`` overrides.

    Relative paths in the file are relative to the file's folder, those in overrides to the
    current directory. Raises :class:`ConfigurationError` listing every error found.
    """
    path = find_config(source)
    content = load_yaml(path)
    _refuse_unusable_text(path, content)
    _resolve_paths(content, path.parent)
    errors = apply_overrides(content, overrides, "--set")
    _refuse_unusable_text(path, content)
    _choose_source(content, overrides)
    _resolve_paths(content, Path.cwd())
    try:
        workload = Workload.model_validate(content)
        workload._path = path
    except ValidationError as invalid:
        errors += validation_errors(Workload, invalid, other_names=_other_names())
    if errors:
        raise _invalid(path, errors)
    return workload


def _other_names() -> dict[str, str]:
    """What other tools call our keys, and the plan's keys, which stand in no config."""
    from forge.training.config.plan import Plan

    return _NAMES_ELSEWHERE | {key: f"{key} of the plan (--plan {key}=...)" for key in Plan.model_fields}


def _refuse_unusable_text(path: Path, content: dict[str, Any]) -> None:
    """Before anything could print such a text or look for a file of that name."""
    unusable = list(unusable_text(content))
    if unusable:
        raise _invalid(path, unusable)


def _invalid(path: Path, errors: list[str]) -> ConfigurationError:
    return ConfigurationError(
        f"{path}: {len(errors):,} error{'s' * (len(errors) > 1)}\n{listed(errors)}",
        remedy="`forge schema --key SECTION` prints a section's keys, with what they mean and their defaults",
    )


def _choose_source(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Documents chosen by an override replace the file's own training records, and the other way round."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    chosen = [source for key in keys for source in _SOURCES if key == f"data.{source}"]
    data = content.get("data")
    if chosen and isinstance(data, dict) and data.get(chosen[-1]) is not None:
        data.pop(next(other for other in _SOURCES if other != chosen[-1]), None)


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
