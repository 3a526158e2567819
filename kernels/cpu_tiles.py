"""Converts KV blocks between the CPU kernels' tile order and row-major tiles, the order of every GPU pool.

The two orders have the same size and are described in kernels/cpu_step.py. Knows nothing
of pools or transfers.
"""

import torch


def to_rows(tiles: torch.Tensor) -> torch.Tensor:
    """Blocks ``[..., 2, num_kv_heads, tokens_per_block, head_dim]`` from tile order to row-major."""
    keys, values = tiles.select(-4, 0), tiles.select(-4, 1)
    lead, (tokens, dim) = keys.shape[:-2], keys.shape[-2:]
    by_token = keys.reshape(*lead, tokens // 16, dim // 2, 16, 2).transpose(-3, -2).reshape(keys.shape)
    by_dim = values.reshape(*lead, dim // 16, tokens // 2, 16, 2).movedim((-3, -1, -4, -2), (-4, -3, -2, -1))
    return torch.stack((by_token, by_dim.reshape(values.shape)), dim=-4)


def from_rows(rows: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_rows`."""
    keys, values = rows.select(-4, 0), rows.select(-4, 1)
    lead, (tokens, dim) = keys.shape[:-2], keys.shape[-2:]
    by_token = keys.reshape(*lead, tokens // 16, 16, dim // 2, 2).transpose(-3, -2).reshape(keys.shape)
    by_dim = values.reshape(*lead, tokens // 2, 2, dim // 16, 16).movedim((-2, -4, -1, -3), (-4, -3, -2, -1))
    return torch.stack((by_token, by_dim.reshape(values.shape)), dim=-4)
