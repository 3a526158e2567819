"""The KV pool as a tensor: a view on memory that the transceiver can share with peers."""

import torch
from torch import Tensor

from diptych.kv_layout import KvLayout
from diptych.transceiver.pool_memory import PoolMemory


def pool_tensor(memory: PoolMemory, layout: KvLayout) -> Tensor:
    """`[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]` of the layout's dtype, no copy."""
    flat = torch.from_numpy(memory.blocks.reshape(-1)).view(getattr(torch, layout.dtype))
    return flat.view(-1, layout.num_layers, 2, layout.num_kv_heads, layout.tokens_per_block, layout.head_dim)
