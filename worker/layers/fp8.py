"""Linear layers on a GPU whose weight stays in FP8: few rows keep their digits, many are quantized, too."""

from dataclasses import dataclass

from torch import Tensor

from diptych.kernels.activation_triton import silu_and_mul
from diptych.kernels.fp8_linear_triton import fp8_linear
from diptych.kernels.skinny_linear_triton import (
    FP8_GATED,
    choose_fp8,
    skinny_gated,
    skinny_linear,
)

_MAX_ROWS = 64  # of a product without the matrix unit's FP8; above, that is faster
_MAX_WIDE_ROWS = 32  # as _MAX_ROWS, for gate and up


@dataclass(frozen=True, slots=True)
class Fp8PartsLinear:
    """`x @ (weight * scale).T + bias` as `[S, T, outputs]` partial sums, for a kernel that adds them up anyway."""

    weight: Tensor  # [outputs, inputs] float8_e4m3fn
    scale: Tensor  # [outputs] float32
    bias: Tensor | None
    num_sms: int

    def __call__(self, x: Tensor) -> Tensor:
        rows, inputs = x.shape
        if rows <= _MAX_ROWS:
            plan = choose_fp8(rows, len(self.weight), inputs, self.num_sms)
            parts = skinny_linear(x, self.weight, plan, self.scale)
        else:
            parts = fp8_linear(x, self.weight, self.scale)[None]
        if self.bias is not None:
            parts[0] += self.bias
        return parts

    def gated(self, x: Tensor) -> Tensor:
        """`silu(gate) * up` of a gate and up weight, in x's dtype."""
        rows = len(x)
        if rows == 1:
            return skinny_gated(x, self.weight, FP8_GATED, self.scale)
        parts = self(x) if rows <= _MAX_WIDE_ROWS else fp8_linear(x, self.weight, self.scale)[None]
        return silu_and_mul(parts, x.dtype)
