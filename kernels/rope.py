"""Rotary position embedding in plain torch, "half-split" convention: element i turns with element i +
head_dim / 2."""

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `[T, heads, head_dim]` by the rows' angles, `[T, head_dim / 2]`; float32 inside, x's dtype out."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
