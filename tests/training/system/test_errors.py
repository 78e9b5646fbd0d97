"""Claim: what a child process ended with is what its parent ends with, where the code has a documented meaning."""

from __future__ import annotations

import pytest

from forge.training.system.errors import ForgeError


@pytest.mark.parametrize(
    ("ended", "exit_code"),
    [
        *((code, code) for code in range(1, 10)),
        *((130, 130), (143, 143), (-2, 130), (-15, 143)),  # interrupted: as a shell says it, as subprocess does
        *((10, 1), (124, 1), (255, 1), (-9, 1), (-11, 1)),  # no code of ours, killed, crashed
    ],
)
def test_a_child_s_exit_code_is_passed_on(ended: int, exit_code: int) -> None:
    error = ForgeError.of_child(ended, "the step failed", remedy="do it again")
    assert (error.exit_code, error.message, error.remedy) == (exit_code, "the step failed", "do it again")
