"""Triton kernel of attention.py for any step: runs of rows over their sequences' paged context.

The portable path where flashinfer is not installed. Flash attention (Dao 2023): one program takes some rows of one
sequence and one query head, and walks over the context that they see.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.attention_tile_triton import LOG2E, load_tile, take_tile

_ROWS = 64
_TILE = 64
# Of a tile of keys: fastest on an H200, and GPUs with 99 KiB of shared memory have room for it.
_TILE_BYTES = 16 << 10

Int32s = npt.NDArray[np.int32]


@triton.jit(do_not_specialize=["table_stride"])
def _attend(
    query, cache, runs, slots, tables, out, scale, table_stride, block_stride, kv_stride, head_stride,
    num_heads: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    run = tl.program_id(1)
    first_row = tl.load(runs + 3 * run)
    count = tl.load(runs + 3 * run + 1)
    first_position = tl.load(runs + 3 * run + 2)
    slot = tl.load(slots + first_row).to(tl.int64)
    table = tables + slot * table_stride
    lanes = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    here = lanes < count
    line = (first_row + lanes).to(tl.int64) * num_heads + head
    q = tl.load(query + line[:, None] * DIM + dims[None, :], mask=here[:, None], other=0.0)
    at_position = first_position + lanes
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, DIM], tl.float32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, first_position + 1 - WINDOW) // TILE * TILE
    end = first_position + count
    start = cache + (head // GROUP) * head_stride
    factor = scale * LOG2E
    whole = begin
    if WINDOW == 0:  # of these tiles every row sees all
        whole = tl.minimum(first_position, end) // TILE * TILE
    for at in range(begin, whole, TILE):
        k, v = load_tile(start, table, at, end, block_stride, kv_stride, DIM, BLOCK_TOKENS, TILE, True)
        highest, mass, total = take_tile(q, k, v, True, factor, highest, mass, total, False, False, PRECISION)
    for at in range(whole, end, TILE):
        tokens = at + tl.arange(0, TILE)
        visible = tokens[None, :] <= at_position[:, None]
        if WINDOW > 0:
            visible = visible & (tokens[None, :] > at_position[:, None] - WINDOW)
        k, v = load_tile(start, table, at, end, block_stride, kv_stride, DIM, BLOCK_TOKENS, TILE, False)
        highest, mass, total = take_tile(
            q, k, v, visible, factor, highest, mass, total, True, False, PRECISION
        )
    total = total / tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(out + line[:, None] * DIM + dims[None, :], total, mask=here[:, None])


def num_runs(count: int) -> int:
    """Of so many rows of one sequence."""
    return -(-count // _ROWS)


def runs_of(query_starts: Int32s, first_positions: Int32s) -> Int32s:
    """`[N, 3]` runs (`PrefillPlan`) of rows `query_starts[s]` to `query_starts[s + 1]`, consecutive positions of
    one sequence from `first_positions[s]` on.
    """
    runs = [
        (row, min(_ROWS, stop - row), position + row - start)
        for start, stop, position in zip(
            query_starts[:-1].tolist(), query_starts[1:].tolist(), first_positions.tolist(), strict=True
        )
        for row in range(start, stop, _ROWS)
    ]
    # The last ones see most: they start first.
    runs.sort(key=lambda run: -run[2])
    return np.array(runs, np.int32).reshape(-1, 3)


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    # [N, 3] int32: first row, number of rows (at most _ROWS; 0 at row 0: nothing to do), position of the first row
    runs: Tensor

    @classmethod
    def of(cls, query_starts: Int32s, first_positions: Int32s, device: torch.device) -> "PrefillPlan":
        return cls(torch.from_numpy(runs_of(query_starts, first_positions)).to(device, non_blocking=True))


def prefill_attention(
    query: Tensor,
    cache: Tensor,
    plan: PrefillPlan,
    *,
    slots: Tensor,
    tables: Tensor,
    scale: float,
    window: int | None,
    out: Tensor,
) -> None:
    """`[T, heads, dim]` queries into `out`, same shape; the rows' K and V are in the cache already.

    `cache` is `[num_blocks, 2, kv heads, tokens per block, dim]`, strided; the blocks of row r's sequence are
    `tables[slots[r]]`. `dim` is a power of two, at least 16. Integers are int32.
    """
    _, heads, dim = query.shape
    kv_heads, block_tokens = cache.shape[2:4]
    _attend[(heads, len(plan.runs))](
        query,
        cache,
        plan.runs,
        slots,
        tables,
        out,
        scale,
        tables.stride(0),
        *cache.stride()[:3],
        num_heads=heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        BLOCK_TOKENS=block_tokens,
        ROWS=_ROWS,
        TILE=min(_TILE, _TILE_BYTES // (dim * query.itemsize)),
        WINDOW=window or 0,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=2,
    )
