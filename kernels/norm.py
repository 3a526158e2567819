"""Root-mean-square normalisation, in plain torch. Computes in float32, whatever the dtypes."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last axis, in the dtype of `weight`."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(weight.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream; the normalised sum, and the sum in the residual's dtype."""
    total = residual + x
    return rms_norm(total, weight, eps), total
