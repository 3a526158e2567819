"""Root-mean-square normalisation with a learned weight."""

from dataclasses import dataclass

from torch import Tensor

from diptych.kernels.norm import add_rms_norm, rms_norm


@dataclass(frozen=True, slots=True)
class RmsNorm:
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add `x` to the residual stream; the normalised sum and the sum."""
        return add_rms_norm(x, residual, self.weight, self.eps)
