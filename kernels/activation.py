"""The gated activation of the MLP, in plain torch."""

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[T, 2 * intermediate]`, gate half first; float32 inside, same dtype out."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
