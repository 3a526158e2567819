"""Triton kernel for steps of one row a sequence: from the products to attended values, planned on the device.

Flash decoding (Dao, Haziza, Massa, Sizov 2023): a context is cut into equal shares, one program computes one share for
the query heads of one kv head, and the program that ends last joins the shares. How long a share is follows from the
row's position when the kernel runs, so that a CUDA graph serves every length, with no plan made on the host.

Each program turns its queries itself (rope_triton.py). The row's own key and value come from the products, too: the
first share starts with them and puts them into the cache, so nobody waits for the cache to be written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.attention_tile_triton import LOG2E, places_of, take_tile
from diptych.kernels.dependent_launch_triton import follow, release, wait
from diptych.kernels.gpu import chained
from diptych.kernels.rope_triton import HeadInputs, head_values, stored, turned

_MIN_GROUP = 16  # the least rows of the matrix unit
_SHARE_TOKENS = 1024  # of a share of the longest context, where there are enough programs without


@triton.jit
def _shares(position, WINDOW: tl.constexpr, SHARES: tl.constexpr, TILE: tl.constexpr):
    """First visible token before the row, tokens of a share (a multiple of TILE), and how many shares are used."""
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, position + 1 - WINDOW) // TILE * TILE
    length = tl.maximum(tl.cdiv(tl.cdiv(position - begin, TILE), SHARES), 1) * TILE
    return begin, length, tl.maximum(tl.cdiv(position - begin, length), 1)


@triton.jit
def _join(
    partial, log_sums, out, first_line, used,
    GROUP: tl.constexpr, DIM: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """The mean of the shares by their masses. Other multiprocessors wrote them: never from the nearest cache."""
    shares = tl.arange(0, SHARES)
    dims = tl.arange(0, DIM)
    inside = shares < used
    for member in tl.static_range(GROUP):
        part = (first_line + member) * SHARES + shares
        sums = tl.load(log_sums + part, mask=inside, other=-float("inf"), cache_modifier=".cg")
        weights = tl.exp2(sums - tl.max(sums, 0))
        values = tl.load(
            partial + part[:, None] * DIM + dims[None, :],
            mask=inside[:, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        total = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
        tl.store(out + (first_line + member) * DIM + dims, total)


@triton.jit(do_not_specialize=["table_stride"])
def _decode(
    parts, bias, q_norm, k_norm, cos, sin, positions, slots, tables, cache, out, partial, log_sums, arrivals,
    split_stride, table_stride, block_stride, kv_stride, head_stride, eps, scale,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, GROUP: tl.constexpr, GROUP_LANES: tl.constexpr,
    DIM: tl.constexpr, LANES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, SHARES: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if SHARES > 1:  # the programs do not fill the device
        follow(PDL)
    else:
        wait(PDL)
    kv_head = tl.program_id(0)
    share = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    position = tl.load(positions + row)
    begin, length, used = _shares(position, WINDOW, SHARES, TILE)
    group = tl.arange(0, GROUP_LANES)
    dims = tl.arange(0, DIM)
    mine = (group < GROUP)[:, None]
    first_line = row * num_heads + kv_head * GROUP
    to = out + (first_line + group)[:, None] * DIM + dims[None, :]
    if position < 0:
        if share == 0:  # padding: what follows must not meet numbers that are none
            tl.store(to, tl.zeros([GROUP_LANES, DIM], tl.float32), mask=mine)
    elif share < used:
        table = tables + tl.load(slots + row).to(tl.int64) * table_stride
        head = cache + kv_head * head_stride
        start = begin + share * length
        stop = tl.minimum(start + length, position)
        line = row * (num_heads + 2 * num_kv_heads) * DIM
        query = turned(
            parts, bias, q_norm, k_norm, cos, sin, line, position, kv_head * GROUP + group, dims, True, True, mine,
            split_stride, eps, DIM, SPLITS, HAS_BIAS, HAS_NORM,
        ).to(out.dtype.element_ty)  # fmt: skip
        own = num_heads + kv_head + tl.arange(0, 1)
        all_dims = (dims < DIM)[None, :]
        key = turned(
            parts, bias, q_norm, k_norm, cos, sin, line, position, own, dims, False, True, all_dims,
            split_stride, eps, DIM, SPLITS, HAS_BIAS, HAS_NORM,
        )  # fmt: skip
        key = stored(key, cache)
        value = head_values(
            parts, bias, line, own + num_kv_heads, dims, all_dims, split_stride, DIM, SPLITS, HAS_BIAS
        )
        value = stored(value, cache)
        if share == 0:
            block = tl.load(table + position // BLOCK_TOKENS).to(tl.int64)
            slot = head + block * block_stride + (position % BLOCK_TOKENS) * DIM + dims[None, :]
            tl.store(slot, key)
            tl.store(slot + kv_stride, value)
        factor = scale * LOG2E
        own_score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * factor
        highest = tl.where(share == 0, own_score, -float("inf"))
        mass = tl.where(share == 0, 1.0, tl.zeros([GROUP_LANES], tl.float32))
        total = tl.where(share == 0, value.to(tl.float32), tl.zeros([GROUP_LANES, DIM], tl.float32))
        for at in tl.range(start, stop, TILE, num_stages=STAGES):
            tokens = at + tl.arange(0, TILE)
            inside = tokens < stop
            places = places_of(head, table, tokens, inside, at, block_stride, DIM, BLOCK_TOKENS, TILE)
            visible = inside
            if WINDOW > 0:
                visible = inside & (tokens > position - WINDOW)
            highest, mass, total = take_tile(
                query,
                places,
                kv_stride,
                dims,
                inside,
                visible[None, :],
                factor,
                highest,
                mass,
                total,
                PRECISION,
            )
        if SHARES == 1:
            release(PDL)
        total = total / mass[:, None]
        if SHARES == 1:
            tl.store(to, total, mask=mine)
        elif used == 1:
            tl.store(to, total, mask=mine)
        else:
            part = (first_line + group) * SHARES + share
            tl.store(partial + part[:, None] * DIM + dims[None, :], total, mask=mine)
            tl.store(log_sums + part, highest + tl.log2(mass), mask=group < GROUP)
            tl.debug_barrier()  # the program's stores come before its arrival
            counter = arrivals + row * num_kv_heads + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
                tl.store(counter, 0)
                _join(partial, log_sums, out, first_line, used, GROUP, DIM, SHARES)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Shares for each context, and how the kernel is compiled."""

    shares: int  # a power of two
    tile: int = 64  # tokens
    stages: int = (
        3  # a look-up in the table within a tile takes two of them: from 5 on, two tiles are on their way
    )
    num_warps: int = 4

    @classmethod
    def choose(cls, num_rows: int, num_kv_heads: int, num_sms: int, max_tokens: int) -> "DecodePlan":
        """What was fastest on an H200 with 8 kv heads of 128, for 1, 8, 64 and 256 rows, and contexts of 256 to 1088.

        `max_tokens`: of any context. A wide join costs short ones 4 us: eight shares, unless contexts can be long.
        """
        programs = num_rows * num_kv_heads
        most = min(32, max(8, triton.next_power_of_2(max_tokens // _SHARE_TOKENS)))
        shares = min(most, triton.next_power_of_2(triton.cdiv(7 * num_sms, 2 * programs)))
        if 4 * programs <= num_sms:
            return cls(shares, tile=32, num_warps=2)
        if shares > 1:
            return cls(shares, tile=128)
        return cls(1, tile=64, num_warps=2) if programs < 8 * num_sms else cls(1, tile=32, num_warps=1)


def decode_attention(
    parts: Tensor,
    inputs: HeadInputs,
    cache: Tensor,
    *,
    positions: Tensor,
    slots: Tensor,
    tables: Tensor,
    scale: float,
    window: int | None,
    plan: DecodePlan,
    arrivals: Tensor,
    out: Tensor,
) -> None:
    """`[S, T, (heads + 2 kv heads) * dim]` products to attended values `out` [T, heads, dim]; K and V into `cache`.

    Row r is at `positions[r]` of the sequence with the blocks `tables[slots[r]]`; a row with a negative position is
    padding and gives zeros. `cache` is `[num_blocks, 2, kv heads, tokens per block, dim]`, strided. `dim` is a
    power of two. Integers are int32. `arrivals` [at least T * kv heads] is zero before and after.
    """
    splits, rows, _ = parts.shape
    layout = inputs.layout
    heads, kv_heads, dim = layout.num_heads, layout.num_kv_heads, layout.head_dim
    shape = (rows, heads, plan.shares) if plan.shares > 1 else (0,)
    log_sums = torch.empty(shape, dtype=torch.float32, device=out.device)
    partial = torch.empty(*shape, dim if plan.shares > 1 else 0, dtype=torch.float32, device=out.device)
    group = heads // kv_heads
    _decode[(kv_heads, plan.shares, rows)](
        parts, *inputs.tensors(out), positions, slots, tables, cache, out, partial, log_sums, arrivals,
        parts.stride(0), tables.stride(0), *cache.stride()[:3], layout.eps, scale,
        GROUP=group, GROUP_LANES=max(_MIN_GROUP, triton.next_power_of_2(group)),
        BLOCK_TOKENS=cache.shape[3], TILE=plan.tile, SPLITS=splits, SHARES=plan.shares,
        WINDOW=window or 0, STAGES=plan.stages,
        PRECISION="ieee" if out.dtype == torch.float32 else "tf32",
        num_warps=plan.num_warps, **inputs.constants(), **chained(out.device),
    )  # fmt: skip
