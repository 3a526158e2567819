"""Self-attention over the paged KV cache: projections, optional q/k norms, rotation, attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.kernels.attention import append_kv, paged_attention
from diptych.worker.layers.linear import Linear
from diptych.worker.layers.norm import RmsNorm
from diptych.worker.layers.rope import rotate
from diptych.worker.step import StepContext


@dataclass(frozen=True, slots=True)
class Attention:
    layer: int
    num_heads: int  # of this rank, as num_kv_heads
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv: Linear  # rows: all query heads, all key heads, all value heads
    o: Linear
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], context: StepContext) -> Tensor:
        heads = self.qkv(x).view(len(x), -1, self.head_dim)
        counts = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        query, key, value = torch.split(heads, counts, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, key, angles)
        cache = context.layer_cache(self.layer)
        append_kv(key, value, cache, context.attention)
        attended = paged_attention(query, cache, context.attention, self.scale)
        return self.o(attended.reshape(len(x), -1))
