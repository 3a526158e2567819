"""Rotary position embedding: the table of angles for a RopeConfig, and the layer that turns queries and keys.

The table is fixed for a model: K in the cache was turned with it, so an angle may depend on a position but
never on how long a sequence is by now.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.kernels.rope import apply_rope
from diptych.worker.models.config import RopeConfig


@dataclass(frozen=True, slots=True)
class RotaryEmbedding:
    cos: Tensor  # [max_positions, head_dim / 2] float32
    sin: Tensor

    @classmethod
    def build(
        cls, rope: RopeConfig, head_dim: int, max_positions: int, device: torch.device
    ) -> "RotaryEmbedding":
        frequencies = inverse_frequencies(rope, head_dim, max_positions)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
        return cls(cos.to(device), sin.to(device))

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' angles, once for all layers of a step."""
        return self.cos[positions], self.sin[positions]


def rotate(query: Tensor, key: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = angles
    return apply_rope(query, cos, sin), apply_rope(key, cos, sin)


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_positions: int) -> Tensor:
    """Radians per position of each pair of elements, `[head_dim / 2]` float32."""
    theta = rope.theta
    if rope.kind == "dynamic" and max_positions > rope.original_max_positions:
        # Stretched for the longest sequence that may come: see the module's docstring.
        stretch = rope.factor * max_positions / rope.original_max_positions - (rope.factor - 1)
        theta *= stretch ** (head_dim / (head_dim - 2))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "llama3":
        plain = _llama3(plain, rope)
    elif rope.kind == "yarn":
        plain = _yarn(plain, rope, head_dim)
    if rope.frequency_divisors:
        plain = plain / torch.tensor(rope.frequency_divisors)
    return plain


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Slow frequencies divided by the factor, fast ones kept, a ramp over the number of turns between."""
    turns = rope.original_max_positions * plain / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = ramp.clamp(0.0, 1.0)
    return plain * kept + plain / rope.factor * (1 - kept)


def _yarn(plain: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """As llama3, but the ramp is linear in the index of the pair."""

    def pair_with(turns: float) -> float:
        period = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(period) / (2 * math.log(rope.theta))

    first, last = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    stretched = ((pairs - first) / max(last - first, 0.001)).clamp(0.0, 1.0)
    return plain / rope.factor * stretched + plain * (1 - stretched)
