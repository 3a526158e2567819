"""Triton kernel for steps of one row a sequence: from the products to attended values, planned on the device.

Flash decoding (Dao, Haziza, Massa, Sizov 2023): a context is cut into equal shares, one program computes one share for
the query heads of one kv head, and the program that ends last joins the shares. How long a share is follows from the
row's position when the kernel runs, so that a CUDA graph serves every length, with no plan made on the host.

Each program turns its queries itself (rope_triton.py). The row's own key and value come from the products, too: the
first share starts with them and puts them into the cache, so nobody waits for the cache to be written.

A GPU that reads at the speed of its memory is near its power limit: what counts is how few instructions a token takes.
Tiles come through a tensor descriptor where blocks hold whole ones, and only a share's last tile is masked.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diptych.kernels.attention_tile_triton import LOG2E, load_tile, take_tile
from diptych.kernels.dependent_launch_triton import follow, release, wait
from diptych.kernels.gpu import chained
from diptych.kernels.rope_triton import HeadInputs, HeadLayout, head_values, stored, turned

_MIN_GROUP = 8  # the least columns of the matrix unit
_WARP_NUMBERS = 2048  # of float32 that a warp can hold beside what it computes with
_MAX_LINES = 2**31 - 1  # the kernel counts them in 32 bits
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


@triton.jit
def _heads(
    parts, bias, q_norm, k_norm, cos, sin, row, position, kv_head, group, mine, split_stride, eps, cache, out,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """A row's queries `[lanes, dim]` of one kv head, and its key and value `[1, dim]` as the cache has them."""
    dims = tl.arange(0, DIM)
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
    value = head_values(
        parts, bias, line, own + num_kv_heads, dims, all_dims, split_stride, DIM, SPLITS, HAS_BIAS
    )
    return query, stored(key, cache), stored(value, cache)


@triton.jit
def _take(
    query, described, head, head_line, table, at, stop, position, block_stride, kv_stride, factor,
    highest, mass, total,
    DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The tile from `at` on into the running softmax; WHOLE: all of it is before `stop`.

    The descriptor shows the cache as lines of one token of one kv head, `head_line` of them before this head's.
    """
    tokens = at + tl.arange(0, TILE)
    if DESCRIBED:
        block = tl.load(table + at // BLOCK_TOKENS)
        line = block * (block_stride // DIM).to(tl.int32) + head_line + at % BLOCK_TOKENS
        k = described.load([line, 0])
        v = described.load([line + (kv_stride // DIM).to(tl.int32), 0])
        if not WHOLE:  # what hides the other keys is their score
            v = tl.where((tokens < stop)[:, None], v, 0.0)
    else:
        k, v = load_tile(head, table, at, stop, block_stride, kv_stride, DIM, BLOCK_TOKENS, TILE, WHOLE)
    hides: tl.constexpr = WINDOW > 0 or not WHOLE
    visible = tokens > position - WINDOW
    if WINDOW == 0:
        visible = tokens < stop
    elif not WHOLE:
        visible = (tokens < stop) & visible
    return take_tile(query.T, k, v, visible[:, None], factor, highest, mass, total, hides, True, PRECISION)


@triton.jit
def _walk(
    query, key, value, described, head, head_line, table, start, stop, position, is_first,
    block_stride, kv_stride, factor,
    GROUP_LANES: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The running softmax (attention_tile_triton.py, turned) over a share, and in the first one the row itself."""
    own_score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * factor
    highest = tl.where(is_first, own_score, -float("inf"))
    mass = tl.where(is_first, 1.0, tl.zeros([GROUP_LANES], tl.float32))
    total = tl.where(is_first, value.to(tl.float32).T, tl.zeros([DIM, GROUP_LANES], tl.float32))
    whole = start + (stop - start) // TILE * TILE
    for at in tl.range(start, whole, TILE, num_stages=STAGES):
        highest, mass, total = _take(
            query, described, head, head_line, table, at, stop, position, block_stride, kv_stride, factor,
            highest, mass, total, DIM, BLOCK_TOKENS, TILE, WINDOW, PRECISION, DESCRIBED, True,
        )  # fmt: skip
    if whole < stop:
        highest, mass, total = _take(
            query, described, head, head_line, table, whole, stop, position, block_stride, kv_stride, factor,
            highest, mass, total, DIM, BLOCK_TOKENS, TILE, WINDOW, PRECISION, DESCRIBED, False,
        )  # fmt: skip
    return highest, mass, total


@triton.jit(do_not_specialize=["table_stride"])
def _decode(
    parts, bias, q_norm, k_norm, cos, sin, positions, slots, tables, cache, described, out, partial, log_sums, arrivals,
    split_stride, table_stride, block_stride, kv_stride, head_stride, eps, scale,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, GROUP: tl.constexpr, GROUP_LANES: tl.constexpr,
    DIM: tl.constexpr, LANES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, SHARES: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, PDL: tl.constexpr,
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
        query, key, value = _heads(
            parts, bias, q_norm, k_norm, cos, sin, row, position, kv_head, group, mine, split_stride, eps, cache, out,
            num_heads, num_kv_heads, GROUP, DIM, SPLITS, HAS_BIAS, HAS_NORM,
        )  # fmt: skip
        if share == 0:
            block = tl.load(table + position // BLOCK_TOKENS).to(tl.int64)
            slot = head + block * block_stride + (position % BLOCK_TOKENS) * DIM + dims[None, :]
            tl.store(slot, key)
            tl.store(slot + kv_stride, value)
        highest, mass, total = _walk(
            query, key, value, described, head, kv_head * (head_stride // DIM).to(tl.int32), table,
            start, stop, position, share == 0, block_stride, kv_stride, scale * LOG2E,
            GROUP_LANES, DIM, BLOCK_TOKENS, TILE, WINDOW, STAGES, PRECISION, DESCRIBED,
        )  # fmt: skip
        if SHARES == 1:
            release(PDL)
        total = (total / mass[None, :]).T
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
    tile: int = 32  # tokens
    stages: int = 2
    num_warps: int = 1

    @classmethod
    def choose(
        cls, num_rows: int, layout: HeadLayout, itemsize: int, num_sms: int, max_tokens: int
    ) -> "DecodePlan":
        """What was fastest on an H200 with 8 kv heads of 128, for 1 to 256 rows, and contexts of 256 to 1088.

        `itemsize` of the cache in bytes: FP8, which has to be made wide, wants twice as many programs. `max_tokens` of
        any context: a wide join costs short ones 4 us, so there are at most eight shares, unless contexts can be long.
        """
        programs = num_rows * layout.num_kv_heads
        most = min(32, max(8, triton.next_power_of_2(max_tokens // _SHARE_TOKENS)))
        shares = min(most, triton.next_power_of_2(triton.cdiv(7 * num_sms, itemsize * programs)))
        numbers = _lanes(layout) * layout.head_dim  # of a program's result, which lies in registers
        return cls(shares, num_warps=min(4, max(1, numbers // _WARP_NUMBERS)))


def _lanes(layout: HeadLayout) -> int:
    return max(_MIN_GROUP, int(triton.next_power_of_2(layout.num_heads // layout.num_kv_heads)))


def _described(cache: Tensor, tile: int) -> TensorDescriptor | None:
    """One layer's cache as lines `[tokens of all kv heads of all blocks, dim]`, if tiles can be had from it so."""
    num_blocks, _, kv_heads, block_tokens, dim = cache.shape
    per_block, per_kind, per_head = (stride // dim for stride in cache.stride()[:3])
    lines = (num_blocks - 1) * per_block + per_kind + kv_heads * per_head
    if cache.itemsize > 2 or block_tokens % tile or lines > _MAX_LINES:
        return None
    return TensorDescriptor(cache, [lines, dim], [dim, 1], [tile, dim])


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
    padding and gives zeros. `cache` is `[num_blocks, 2, kv heads, tokens per block, dim]`, strided by multiples of
    `dim`, which is a power of two. Integers are int32. `arrivals` [at least T * kv heads] is zero before and after.
    """
    splits, rows, _ = parts.shape
    layout = inputs.layout
    heads, kv_heads, dim = layout.num_heads, layout.num_kv_heads, layout.head_dim
    shape = (rows, heads, plan.shares) if plan.shares > 1 else (0,)
    log_sums = torch.empty(shape, dtype=torch.float32, device=out.device)
    partial = torch.empty(*shape, dim if plan.shares > 1 else 0, dtype=torch.float32, device=out.device)
    described = _described(cache, plan.tile)
    _decode[(kv_heads, plan.shares, rows)](
        parts, *inputs.tensors(out), positions, slots, tables, cache, cache if described is None else described,
        out, partial, log_sums, arrivals, parts.stride(0), tables.stride(0), *cache.stride()[:3], layout.eps, scale,
        GROUP=heads // kv_heads, GROUP_LANES=_lanes(layout),
        BLOCK_TOKENS=cache.shape[3], TILE=plan.tile, SPLITS=splits, SHARES=plan.shares,
        WINDOW=window or 0, STAGES=plan.stages, DESCRIBED=described is not None,
        PRECISION="ieee" if out.dtype == torch.float32 else "tf32",
        num_warps=plan.num_warps, **inputs.constants(), **chained(out.device),
    )  # fmt: skip
