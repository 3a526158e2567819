"""Triton kernels of attention.py for steps of one row a sequence, planned on the device.

Flash decoding (Dao, Haziza, Massa, Sizov 2023): a context is cut into equal shares, one program computes one share for
the query heads of one kv head, a second kernel joins the shares. How long a share is follows from the row's position
when the kernel runs, so that a CUDA graph serves every length, with no plan made on the host.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.dependent_launch_triton import follow
from diptych.kernels.gpu import chained

_LOG2E = tl.constexpr(1.4426950408889634)
_MIN_GROUP = 16  # the least rows of the matrix unit
_MAX_SPLITS = 32


@triton.jit
def _bounds(position, window: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """First visible token, end of the context, tokens of a share (a multiple of TILE)."""
    end = position + 1
    begin = 0
    if window > 0:
        begin = tl.maximum(0, end - window) // TILE * TILE
    tiles = tl.cdiv(end - begin, TILE)
    return begin, end, tl.cdiv(tiles, SPLITS) * TILE


@triton.jit(do_not_specialize=["table_stride"])
def _share(
    query,
    cache,
    positions,
    slots,
    tables,
    out,
    partial,
    log_sums,
    scale,
    table_stride,
    block_stride,
    kv_stride,
    head_stride,
    num_kv_heads: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_LANES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    position = tl.load(positions + row)
    begin, end, share = _bounds(position, WINDOW, SPLITS, TILE)
    start = begin + split * share
    if start < end:
        stop = tl.minimum(start + share, end)
        slot = tl.load(slots + row).to(tl.int64)
        table = tables + slot * table_stride
        group = tl.arange(0, GROUP_LANES)
        dims = tl.arange(0, DIM)
        heads = kv_head * GROUP + group
        line = row.to(tl.int64) * num_kv_heads * GROUP + heads
        q = tl.load(query + line[:, None] * DIM + dims[None, :], mask=(group < GROUP)[:, None], other=0.0)
        highest = tl.full([GROUP_LANES], -float("inf"), tl.float32)
        mass = tl.zeros([GROUP_LANES], tl.float32)
        total = tl.zeros([GROUP_LANES, DIM], tl.float32)
        factor = scale * _LOG2E
        head = cache + kv_head * head_stride
        for at in tl.range(start, stop, TILE, num_stages=STAGES):
            tokens = at + tl.arange(0, TILE)
            inside = tokens < stop
            block = tl.load(table + tokens // BLOCK_TOKENS, mask=inside, other=0).to(tl.int64)
            places = head + block * block_stride + (tokens % BLOCK_TOKENS) * DIM
            k = tl.load(places[None, :] + dims[:, None], mask=inside[None, :], other=0.0)
            scores = tl.dot(q, k, input_precision=PRECISION) * factor
            visible = inside
            if WINDOW > 0:
                visible = inside & (tokens > position - WINDOW)
            scores = tl.where(visible[None, :], scores, -float("inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            # A tile that the window hides wholly leaves nothing to subtract from.
            base = tl.where(higher == -float("inf"), 0.0, higher)
            kept = tl.exp2(highest - base)
            weights = tl.exp2(scores - base[:, None])
            v = tl.load(places[:, None] + kv_stride + dims[None, :], mask=inside[:, None], other=0.0)
            total = total * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            mass = mass * kept + tl.sum(weights, 1)
            highest = higher
        total = total / mass[:, None]
        mask = (group < GROUP)[:, None]
        if SPLITS == 1:
            tl.store(out + line[:, None] * DIM + dims[None, :], total, mask=mask)
        else:
            part = line * SPLITS + split
            tl.store(partial + part[:, None] * DIM + dims[None, :], total, mask=mask)
            tl.store(log_sums + part, highest + tl.log2(mass), mask=group < GROUP)
    elif SPLITS == 1:
        # A padding row: what follows must not meet numbers that are none.
        group = tl.arange(0, GROUP_LANES)
        dims = tl.arange(0, DIM)
        line = row.to(tl.int64) * num_kv_heads * GROUP + kv_head * GROUP + group
        zero = tl.zeros([GROUP_LANES, DIM], tl.float32)
        tl.store(out + line[:, None] * DIM + dims[None, :], zero, mask=(group < GROUP)[:, None])


@triton.jit
def _join(
    partial,
    log_sums,
    positions,
    out,
    num_heads: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    head = tl.program_id(0)
    row = tl.program_id(1)
    begin, end, share = _bounds(tl.load(positions + row), WINDOW, SPLITS, TILE)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM)
    used = begin + splits * share < end
    line = row.to(tl.int64) * num_heads + head
    part = line * SPLITS + splits
    sums = tl.load(log_sums + part, mask=used, other=-float("inf"))
    highest = tl.max(sums, 0)  # of a padding row: minus infinity, which nothing is subtracted from
    weights = tl.exp2(sums - tl.where(highest == -float("inf"), 0.0, highest))
    values = tl.load(partial + part[:, None] * DIM + dims[None, :], mask=used[:, None], other=0.0)
    mass = tl.sum(weights, 0)
    total = tl.sum(values * weights[:, None], 0) / tl.where(mass > 0, mass, 1.0)
    tl.store(out + line * DIM + dims, total)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Shares for each context, and how the first kernel is compiled."""

    splits: int  # a power of two
    tile: int = 64  # tokens
    stages: int = 3  # the table's look-up takes two of them: from 5 on, two tiles are on their way
    num_warps: int = 4

    @classmethod
    def choose(cls, num_rows: int, num_kv_heads: int, num_sms: int) -> "DecodePlan":
        """What was fastest on an H200 with 8 kv heads of 128, for 1, 8, 64 and 256 rows."""
        programs = num_rows * num_kv_heads
        if programs <= num_sms:
            few = 4 * programs <= num_sms
            splits = 1
            while splits < _MAX_SPLITS and 2 * splits * programs <= (2 if few else 1) * num_sms:
                splits *= 2
            return cls(splits, tile=64 if few else 128, stages=5)
        return cls(max(1, triton.next_power_of_2(triton.cdiv(8 * num_sms, programs))))


def decode_attention(
    query: Tensor,
    cache: Tensor,
    *,
    positions: Tensor,
    slots: Tensor,
    tables: Tensor,
    scale: float,
    window: int | None,
    plan: DecodePlan,
    out: Tensor,
) -> None:
    """`[T, heads, dim]` queries into `out`; row r is at `positions[r]` of the sequence with `tables[slots[r]]`.

    `cache` is `[num_blocks, 2, kv heads, tokens per block, dim]`, strided, with K and V of the row itself already in
    it; a row with a negative position is padding and gives zeros. `dim` is a power of two. Integers are int32.
    """
    rows, heads, dim = query.shape
    kv_heads, block_tokens = cache.shape[2:4]
    group = heads // kv_heads
    shape = (rows, heads, plan.splits) if plan.splits > 1 else (0,)
    log_sums = torch.empty(shape, dtype=torch.float32, device=query.device)
    partial = torch.empty(*shape, dim if plan.splits > 1 else 0, dtype=torch.float32, device=query.device)
    _share[(kv_heads, plan.splits, rows)](
        query,
        cache,
        positions,
        slots,
        tables,
        out,
        partial,
        log_sums,
        scale,
        tables.stride(0),
        *cache.stride()[:3],
        num_kv_heads=kv_heads,
        GROUP=group,
        GROUP_LANES=max(_MIN_GROUP, triton.next_power_of_2(group)),
        DIM=dim,
        BLOCK_TOKENS=block_tokens,
        TILE=plan.tile,
        SPLITS=plan.splits,
        WINDOW=window or 0,
        STAGES=plan.stages,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=plan.num_warps,
        **chained(query.device),
    )
    if plan.splits > 1:
        _join[(heads, rows)](
            partial,
            log_sums,
            positions,
            out,
            num_heads=heads,
            DIM=dim,
            TILE=plan.tile,
            SPLITS=plan.splits,
            WINDOW=window or 0,
            num_warps=1,
            **chained(query.device),
        )
