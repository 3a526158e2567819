"""Triton kernel of rope.py with what surrounds it: sum of partial products, q/k norm, rotation, KV append.

One pass over the query, key and value rows of a step: the query comes out turned, key and value go straight into the
paged cache. A row with a negative position is padding: nothing is appended for it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.dependent_launch_triton import follow
from diptych.kernels.gpu import chained


@dataclass(frozen=True, slots=True)
class HeadLayout:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float  # of the q and k norms


@triton.jit
def _half(parts, at, num_rows, width, lanes, inside, SPLITS: tl.constexpr):
    total = tl.load(parts + at + lanes, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        shifted = at + split * tl.cast(num_rows, tl.int64) * width
        total += tl.load(parts + shifted + lanes, mask=inside, other=0.0).to(tl.float32)
    return total


# Not specialised: numbers of rows and blocks differ from step to step.
@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def _rope_append(
    parts,
    bias,
    q_norm,
    k_norm,
    cos,
    sin,
    positions,
    slots,
    tables,
    cache,
    query,
    num_rows,
    table_stride,
    block_stride,
    kv_stride,
    head_stride,
    eps,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    lanes = tl.arange(0, LANES)
    inside = lanes < HALF
    width = (num_heads + 2 * num_kv_heads) * 2 * HALF
    at = row * width + head * 2 * HALF
    low = _half(parts, at, num_rows, width, lanes, inside, SPLITS)
    high = _half(parts, at + HALF, num_rows, width, lanes, inside, SPLITS)
    if HAS_BIAS:
        low += tl.load(bias + head * 2 * HALF + lanes, mask=inside, other=0.0).to(tl.float32)
        high += tl.load(bias + head * 2 * HALF + HALF + lanes, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(positions + row)
    if head < num_heads + num_kv_heads:
        if HAS_NORM:
            weight = q_norm if head < num_heads else k_norm
            scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / (2 * HALF) + eps)
            low = low * scale * tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
            high = high * scale * tl.load(weight + HALF + lanes, mask=inside, other=0.0).to(tl.float32)
        angle = tl.maximum(position, 0).to(tl.int64) * HALF + lanes
        c = tl.load(cos + angle, mask=inside, other=0.0)
        s = tl.load(sin + angle, mask=inside, other=0.0)
        turned = low * c - high * s
        high = high * c + low * s
        low = turned
    if head < num_heads:
        to = query + (row * num_heads + head) * 2 * HALF + lanes
        tl.store(to, low, mask=inside)
        tl.store(to + HALF, high, mask=inside)
    elif position >= 0:
        slot = tl.load(slots + row).to(tl.int64)
        block = tl.load(tables + slot * table_stride + position // BLOCK_TOKENS).to(tl.int64)
        which = head - num_heads
        value = which // num_kv_heads
        kv_head = which % num_kv_heads
        to = cache + block * block_stride + value.to(tl.int64) * kv_stride + kv_head * head_stride
        to += (position % BLOCK_TOKENS) * 2 * HALF + lanes
        tl.store(to, low, mask=inside)
        tl.store(to + HALF, high, mask=inside)


def rope_append(
    parts: Tensor,
    layout: HeadLayout,
    *,
    bias: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    angles: tuple[Tensor, Tensor],
    positions: Tensor,
    slots: Tensor,
    tables: Tensor,
    cache: Tensor,
) -> Tensor:
    """`[S, T, (heads + 2 kv heads) * dim]` products to `[T, heads, dim]` turned queries; K and V into `cache`.

    `cache` is `[num_blocks, 2, kv heads, tokens per block, dim]` (strided); row r's block is
    `tables[slots[r], positions[r] // tokens per block]`. `angles` are cos and sin, `[max positions, dim / 2]`
    float32; `norms` the weights of the q and k norms, `[dim]` each. All integers are int32.
    """
    splits, rows, _ = parts.shape
    heads, kv_heads, half = layout.num_heads, layout.num_kv_heads, layout.head_dim // 2
    query = torch.empty(rows, heads, layout.head_dim, dtype=cache.dtype, device=cache.device)
    q_norm, k_norm = norms or (query, query)
    _rope_append[(rows, heads + 2 * kv_heads)](
        parts,
        query if bias is None else bias,
        q_norm,
        k_norm,
        *angles,
        positions,
        slots,
        tables,
        cache,
        query,
        rows,
        tables.stride(0),
        *cache.stride()[:3],
        layout.eps,
        num_heads=heads,
        num_kv_heads=kv_heads,
        HALF=half,
        LANES=triton.next_power_of_2(half),
        BLOCK_TOKENS=cache.shape[3],
        SPLITS=splits,
        HAS_BIAS=bias is not None,
        HAS_NORM=norms is not None,
        num_warps=1,
        **chained(cache.device),
    )
    return query
