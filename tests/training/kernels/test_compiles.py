"""Claim: every kernel compiles for the GPUs named here, within their shared memory and with next to no spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# Of one block, bytes. 90: H100 and H200. 86 and 89: the cards with 8 GB.
SHARED_BYTES = {90: 232_448, 89: 101_376, 86: 101_376}


def compiled(capability: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.support.compiled_kernels", str(capability)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_compiles(capability: int) -> None:
    launches = compiled(capability)
    assert len({launch["kernel"] for launch in launches}) == 11
    for launch in launches:
        assert launch["shared_bytes"] <= SHARED_BYTES[capability], launch
        if launch["is_16_bit"]:
            assert launch["spilled_bytes"] <= 64, launch
