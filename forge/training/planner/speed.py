"""How long a micro-batch takes in a layout: what ranks the layouts of which the best are then measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from forge.training.planner.memory import Probed, least_squares
from forge.training.planner.sizes import Sizes


@dataclass(frozen=True)
class SpeedModel:
    """Seconds of launches per micro-batch, and of products, attention and dequantisation by their rates.

    The defaults are those of an H200; probes fit launches and rates. ``product_rate`` and ``attention_rate`` in
    floating-point operations per second, ``byte_rate`` in bytes per second.
    """

    sizes: Sizes
    launch_seconds: float = 0.06
    product_rate: float = 6.0e14
    attention_rate: float = 5.0e14
    byte_rate: float = 2.5e12
    host_byte_rate: float = 2.0e11  # what copies to and from the host delay; most of it is hidden

    def seconds(
        self, num_tokens: int, tokens_squared: int, num_kept: int, tile_tokens: int | None, offload: bool, dense: bool
    ) -> float:
        """Of one micro-batch, forwards and backwards. ``tokens_squared``: sum over its documents."""
        products, attention = self._operations(num_tokens, tokens_squared, num_kept)
        computed = products / self.product_rate + attention / self.attention_rate
        again = 1 - num_kept / self.sizes.num_layers
        if self.sizes.is_nf4 and not dense:
            tiles = -(-num_tokens // (tile_tokens or num_tokens))
            computed += (2 + again) * tiles * 2.5 * self.sizes.num_linear / self.byte_rate
        if offload:
            layers = self.sizes.num_layers * again
            computed += 2 * layers * num_tokens * self.sizes.passed_bytes / self.host_byte_rate
        return self.launch_seconds + computed

    def _operations(self, num_tokens: int, tokens_squared: int, num_kept: int) -> tuple[float, float]:
        """Of the products (weights have no gradient: 2 forwards, 2 backwards) and of attention (causal: 2 and 5)."""
        sizes, again = self.sizes, 1 - num_kept / self.sizes.num_layers
        products = num_tokens * (4.0 * sizes.num_linear + 2.0 * again * (sizes.num_linear - sizes.num_down))
        head = 6.0 * num_tokens * sizes.vocabulary * sizes.hidden
        return products + head, 7.0 * tokens_squared * sizes.queries * sizes.num_layers

    def fitted(self, probes: Sequence[Probed]) -> SpeedModel:
        """With launches and rate of what was measured, two micro-batches or more.

        Attention keeps its rate relative to the products': few lengths do not tell the two apart.
        """
        ratio = self.product_rate / self.attention_rate
        rows = []
        for probe in probes:
            products, attention = self._operations(probe.num_tokens, probe.tokens_squared, probe.num_kept)
            rows.append([1.0, products + ratio * attention])
        launch, per_operation = least_squares(rows, [probe.seconds for probe in probes])
        rate = 1 / per_operation if per_operation else self.product_rate
        return replace(self, launch_seconds=launch, product_rate=rate, attention_rate=rate / ratio)

    def describe(self) -> dict[str, Any]:
        """The coefficients, for a record."""
        return {key: value for key, value in asdict(self).items() if key != "sizes"}
