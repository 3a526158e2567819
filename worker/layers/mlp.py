"""The gated feed-forward block."""

from dataclasses import dataclass

from torch import Tensor

from diptych.kernels.activation import silu_and_mul
from diptych.worker.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class GatedMlp:
    gate_up: Linear  # rows: gate, then up
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(silu_and_mul(self.gate_up(x)))
