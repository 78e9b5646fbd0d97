"""Claim: every row of the table of GGUF types says what llama.cpp itself says, and everything else derives from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from typing import Any, get_args

import pytest
import typer
from pydantic import ValidationError

from forge.training.cli import app
from forge.training.config.quantizations import GGUF_TYPES, QUANTIZED, Quantization, gguf_type, gguf_types
from forge.training.config.workload import Workload
from forge.training.system.errors import ConfigurationError

_ASK = """
import json
from forge.training.llamacpp.native import import_gguf, import_llama_cpp
gguf, llama_cpp = import_gguf(), import_llama_cpp()
blocks = {kind.name: gguf.GGML_QUANT_SIZES[kind] for kind in gguf.GGMLQuantizationType if kind in gguf.GGML_QUANT_SIZES}
print(json.dumps({"files": [kind.name for kind in gguf.LlamaFileType], "library": dir(llama_cpp), "blocks": blocks}))
"""


@cache
def llama_cpp() -> dict[str, Any]:
    """Names of file types and, by tensor type, weights and bytes of a block; asked in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_a_row_agrees_with_llama_cpp(name: str) -> None:
    row = GGUF_TYPES[name]
    whole = "ALL" if name == "f32" else "MOSTLY"
    assert f"{whole}_{name.upper()}" in llama_cpp()["files"]
    assert f"LLAMA_FTYPE_{whole}_{name.upper()}" in llama_cpp()["library"]
    weights, num_bytes = llama_cpp()["blocks"][row.tensor_type]
    assert row.block == weights
    assert 8 * num_bytes / weights <= row.bits_per_weight < 8 * num_bytes / weights + 1
    assert row.fallbacks <= llama_cpp()["blocks"].keys()
    assert row.tensor_type not in row.fallbacks
    assert bool(row.fallbacks) == (row.block > 1) == row.is_quantized


def test_schema_help_and_quantiser_name_exactly_the_rows() -> None:
    assert get_args(Quantization) == tuple(GGUF_TYPES)
    listed = Workload.model_json_schema()["$defs"]["ExportSection"]["properties"]["quantizations"]["items"]
    assert listed["enum"] == list(GGUF_TYPES)
    assert set(QUANTIZED) < set(GGUF_TYPES)
    (option,) = (o for o in typer.main.get_command(app).commands["export"].params if "--quant" in o.opts)
    assert ",".join(GGUF_TYPES) in option.help


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Q4_K_M", "q4_k_m"),
        ("q4km", "q4_k_m"),
        ("Q8_0", "q8_0"),
        ("q8-0", "q8_0"),
        ("BF16", "bf16"),
        ("q2_K", "q2_k"),
        ("IQ4_XS", "iq4_xs"),
        ("iq3m", "iq3_m"),
    ],
)
def test_a_type_is_known_by_its_usual_spellings(written: str, name: str) -> None:
    assert gguf_type(written) == name
    assert gguf_types(f" {written}, f32,") == [name, "f32"]
    content = {"name": "w", "data": {"train": "x"}, "export": {"quantizations": [written]}}
    assert Workload.model_validate(content).export.quantizations == (name,)


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("q4_2", "did you mean q4_k_m or q4_k_s or q4_1 or q4_0?"),
        ("q5kl", "did you mean q5_k_m or q5_k_s or q5_1 or q5_0?"),
        ("fp16", "did you mean f16?"),
        ("TQ1_0", "f32, f16,"),
        ("", "f32, f16,"),
    ],
)
def test_an_unknown_type_is_refused_with_the_nearest(written: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(hint)):
        gguf_type(written)
    content = {"name": "w", "data": {"train": "x"}, "export": {"quantizations": ["f16", written]}}
    with pytest.raises(ValidationError, match=re.escape(hint)):
        Workload.model_validate(content)
    if written:
        with pytest.raises(ConfigurationError, match=re.escape(hint)):
            gguf_types(f"f16,{written}")
