"""A PEFT adapter's ``adapter_config.json``, read strictly: only what can be merged, as plain numbers and names.

Names and rules are those of peft 0.21. The file may come from elsewhere and holds regular expressions,
which can keep Python busy for ever: it is read in a child process first (:func:`.lora.check_adapter`).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from forge.training.system.errors import DataError
from forge.training.system.files import read_json_object, sha256_json

CONFIG = "adapter_config.json"

# Fields that say nothing about the mathematics of the trained weights.
_NEUTRAL = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config"),
    *("eva_config", "ensure_weight_tying"),
}


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
        re.compile(_ending(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


_Name = Annotated[StrictStr, Field(min_length=1)]
_Pattern = Annotated[_Name, AfterValidator(_compiles)]
_Rank = Annotated[StrictInt, Field(gt=0, le=1 << 20)]
_Alpha = Annotated[float, Field(strict=True, gt=0, le=1e9, allow_inf_nan=False)]
_Layer = Annotated[StrictInt, Field(ge=0)]


class AdapterConfig(BaseModel):
    """The fields that decide what an adapter does to its base. ``init_lora_weights``: those that leave the base alone.

    PiSSA, OLoRA, CorDA, LoftQ and others change the base's weights too and are refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: _Alpha
    target_modules: _Pattern | Annotated[list[_Name], Field(min_length=1)]
    exclude_modules: _Pattern | list[_Name] = Field(default_factory=list)
    use_rslora: StrictBool = False
    rank_pattern: dict[_Pattern, _Rank] = Field(default_factory=dict)
    alpha_pattern: dict[_Pattern, _Alpha] = Field(default_factory=dict)
    layers_to_transform: _Layer | list[_Layer] | None = None
    bias: Literal["none"] = "none"
    init_lora_weights: StrictBool | Literal["gaussian", "eva", "orthogonal"] = True

    def digest(self) -> str:
        """Hex SHA-256 of what the configuration says, whatever the order of its names."""
        content = self.model_dump(mode="json")
        for key in ("target_modules", "exclude_modules"):
            if isinstance(content[key], list):
                content[key] = sorted(content[key])
        return sha256_json(content)

    def for_peft(self) -> dict[str, Any]:
        """Arguments of ``peft.LoraConfig``."""
        return {key: value for key, value in self.model_dump(exclude={"peft_type"}).items() if value not in ([], None)}

    def targets(self, module: str) -> bool:
        """Whether a module is changed: PEFT's own rule, tuners_utils.check_target_module_exists."""
        if _matches(self.exclude_modules, module) or not _matches(self.target_modules, module):
            return False
        if self.layers_to_transform is None:
            return True
        layers = self.layers_to_transform
        number = re.search(r"\.layers\.(\d{1,9})\.", module)
        return number is not None and int(number[1]) in ([layers] if isinstance(layers, int) else layers)

    def rank(self, module: str) -> int:
        """The rank of a module's factors."""
        return int(_of_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """By what ``B @ A`` is multiplied: alpha / rank, with rsLoRA alpha / sqrt(rank)."""
        rank, alpha = self.rank(module), float(_of_pattern(self.alpha_pattern, module, self.lora_alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_adapter_config(adapter_dir: Path) -> AdapterConfig:
    """Read an adapter's configuration. Raises :class:`DataError` naming what cannot be merged or is no value."""
    path = adapter_dir / CONFIG
    given = read_json_object(path)
    remedy = "train with plain LoRA; this export carries nothing else"
    unknown = sorted(
        key for key, value in given.items() if value and key not in _NEUTRAL | set(AdapterConfig.model_fields)
    )
    if unknown:
        listed = ", ".join(f"{key:.60} = {given[key]!r:.60}" for key in unknown[:5])
        raise DataError(f"{path}: uses what cannot be merged: {listed}", remedy=remedy)
    known = {key: given[key] for key in AdapterConfig.model_fields if given.get(key) is not None}
    try:
        return AdapterConfig.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        value = f"{known[key]!r:.80}" if key in known else "missing"
        raise DataError(f"{path}: {key} is {value}: {first['msg']}", remedy=remedy) from error


def _matches(patterns: str | list[str], module: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in patterns)


def _of_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule, peft.utils.get_pattern_key: the first pattern that matches the end of the name."""
    for pattern, value in patterns.items():
        if re.match(_ending(pattern), module):
            return value
    return default
