"""The KV pool as the model sees it: a view on memory that the transceiver can share with peers."""

import torch
from torch import Tensor

from diptych.kv_layout import KvLayout


def pool_tensor(data: Tensor, layout: KvLayout) -> Tensor:
    """The uint8 bytes of a pool as `[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]` of
    the layout's dtype, no copy.
    """
    flat = data.view(-1).view(getattr(torch, layout.dtype))
    return flat.view(-1, layout.num_layers, 2, layout.num_kv_heads, layout.tokens_per_block, layout.head_dim)
