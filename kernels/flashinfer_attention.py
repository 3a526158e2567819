"""Attention of a step through flashinfer: planned once on the host, run for every layer.

flashinfer is imported when a wrapper is built, and compiles its kernels then (minutes the first time, later from its
own cache). Caches are `[num_blocks, 2, kv heads, tokens per block, dim]`, strided views of the block-major pool.
Two plans alternate, each with its own host buffer: the copy of the last plan to the device may still be under way.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_WORKSPACE_BYTES = 384 << 20
_HEAD_DIMS = (64, 128, 256)

Int32s = npt.NDArray[np.int32]


def is_installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def supports(head_dim: int, dtype: torch.dtype) -> bool:
    return head_dim in _HEAD_DIMS and dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tokens_per_block: int
    scale: float
    window: int | None
    dtype: torch.dtype
    kv_dtype: torch.dtype  # of the cache: dtype or float8_e4m3fn

    def arguments(self) -> dict[str, Any]:
        return {
            "sm_scale": self.scale,
            "window_left": -1 if self.window is None else self.window - 1,
            "q_data_type": self.dtype,
            "kv_data_type": self.kv_dtype,
        }


@dataclass(frozen=True, slots=True)
class PagedContext:
    """Whose blocks are where, on the host: sequence s has `block_ids[starts[s]:starts[s + 1]]`."""

    starts: Int32s  # [S + 1]
    block_ids: Int32s
    lengths: Int32s  # [S] tokens of context, this step's included

    @classmethod
    def of(cls, blocks: list[list[int]], lengths: Int32s, tokens_per_block: int) -> "PagedContext":
        counts = -(-lengths // tokens_per_block)
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        used = [table[:count] for table, count in zip(blocks, counts.tolist(), strict=True)]
        return cls(starts, np.concatenate(used).astype(np.int32), lengths)

    def tensors(self, tokens_per_block: int) -> tuple[Tensor, Tensor, Tensor]:
        """As flashinfer takes them: starts, ids, tokens in the last block of each."""
        last = (self.lengths - 1) % tokens_per_block + 1
        return torch.from_numpy(self.starts), torch.from_numpy(self.block_ids), torch.from_numpy(last)


def workspace(device: torch.device) -> Tensor:
    """For all wrappers of a device that never run at the same time."""
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class FlashInferPrefill:
    """Runs of rows, each the last positions of its sequence's context.

    Where these are all positions, contexts need no cache: keys and values one after the other are a quarter faster.
    """

    def __init__(self, shape: AttentionShape, space: Tensor, backend: str = "auto") -> None:
        import flashinfer

        self._shape = shape
        self._paged = [
            flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "HND", backend=backend) for _ in range(2)
        ]
        self._whole = [
            flashinfer.BatchPrefillWithRaggedKVCacheWrapper(space, "NHD", backend=backend) for _ in range(2)
        ]
        self._is_whole = False

    def plan(self, query_starts: Int32s, context: PagedContext) -> bool:
        """Rows `query_starts[s]` to `query_starts[s + 1]` are sequence s's.

        Says whether `run` wants the rows' own K and V in place of the cache.
        """
        shape = self._shape
        heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
        starts = torch.from_numpy(query_starts)
        is_whole = bool((np.diff(query_starts) == context.lengths).all())
        self._is_whole = is_whole and shape.kv_dtype == shape.dtype
        if self._is_whole:
            self._whole.reverse()
            self._whole[0].plan(starts, starts, *heads, causal=True, **shape.arguments())
        else:
            self._paged.reverse()
            size = shape.tokens_per_block
            self._paged[0].plan(
                starts, *context.tensors(size), *heads, size, causal=True, **shape.arguments()
            )
        return self._is_whole

    def run(self, query: Tensor, keys_values: Tensor, out: Tensor) -> None:
        """`keys_values`: the cache, or the rows' own `[2, T, kv heads, dim]`, as the plan wants it."""
        if self._is_whole:
            self._whole[0].run(query, *keys_values, out=out)
        else:
            self._paged[0].run(query, keys_values, out=out)
