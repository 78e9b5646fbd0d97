"""A pytest plugin (``-p tests.support.cpu_ladder``): a parity ladder small enough for a CPU that seems to be a GPU.

Settings that a CPU needs are in LADDER_OVERRIDES (JSON list of ``key=value``) and LADDER_FIELDS (JSON object: other
fields of :class:`harness.parity.session.Ladder`).
"""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

from harness.parity import session
from tests.support import fake_gpu  # noqa: F401 - NVML's answer

OVERRIDES = [
    *("model.quantization=none", "data.max_length=256", "data.sample=160", "training.max_steps=100"),
    *("evaluation.num_answers=2", "evaluation.max_new_tokens=24"),
]

fields: dict[str, Any] = {"base": "tiny", "num_positions": 4, "num_side_by_side": 2}
fields |= {"overrides": tuple(json.loads(os.environ.get("LADDER_OVERRIDES", json.dumps(OVERRIDES))))}
for name, value in json.loads(os.environ.get("LADDER_FIELDS", "{}")).items():
    fields[name] = tuple(map(tuple, value)) if name == "layouts" else tuple(value) if isinstance(value, list) else value
session.Ladder = partial(session.Ladder, **fields)  # type: ignore[misc]
