"""Claims about where a model under test is put."""

from __future__ import annotations

from typing import Any

import pytest

from forge.training.evaluation.neutral_model import choose_placement
from forge.training.models.weights import read_weights
from forge.training.system.errors import ConfigurationError, MachineError
from tests.support.tiny_model import shared_base


def test_a_device_that_is_not_there_is_refused() -> None:
    base = read_weights(shared_base())
    with pytest.raises(ConfigurationError, match="unknown device"):
        choose_placement(base, 144, "tpu")
    with pytest.raises(MachineError, match="do not fit"):
        choose_placement(base.__class__(base.directory, base.config, base.shards, Enormous(base.tensors)), 144, "cpu")


class Enormous(dict[str, Any]):
    """The tensors of a model too large for any machine."""

    def values(self) -> Any:
        return [tensor.__class__(tensor.name, tensor.dtype, (1 << 30, 1 << 20), 0, 0) for tensor in super().values()]
