"""Triton kernels of rope.py with what surrounds it: sum of partial products, bias, q/k norm, rotation, KV append.

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

_HEADS = 16  # of one program
_FP8_MAX = tl.constexpr(448.0)


@dataclass(frozen=True, slots=True)
class HeadLayout:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float  # of the q and k norms


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What makes heads of products `[S, T, (heads + 2 kv heads) * dim]`, partial sums: q before k before v."""

    layout: HeadLayout
    bias: Tensor | None  # [(heads + 2 kv heads) * dim]
    norms: tuple[Tensor, Tensor] | None  # weights of the q and k norms, [dim] each
    angles: tuple[Tensor, Tensor]  # cos and sin, [max positions, dim / 2] float32

    def tensors(self, nothing: Tensor) -> tuple[Tensor, ...]:
        """As the kernels take them; `nothing` stands for what there is not."""
        norms = (nothing, nothing) if self.norms is None else self.norms
        return nothing if self.bias is None else self.bias, *norms, *self.angles

    def constants(self) -> dict[str, int | bool]:
        layout = self.layout
        return {
            "num_heads": layout.num_heads,
            "num_kv_heads": layout.num_kv_heads,
            "DIM": layout.head_dim,
            "LANES": triton.next_power_of_2(layout.head_dim),
            "HAS_BIAS": self.bias is not None,
            "HAS_NORM": self.norms is not None,
        }


@triton.jit
def head_values(parts, bias, line, heads, dims, mask, split_stride, DIM, SPLITS: tl.constexpr, HAS_BIAS):
    """`[N, lanes]` float32: the heads of one row, which begins at `line` of each of the parts."""
    at = heads[:, None] * DIM + dims[None, :]
    total = tl.load(parts + line + at, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * split_stride + line + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def turned(
    parts, bias, q_norm, k_norm, cos, sin, line, position, heads, dims, is_query, turns, mask, split_stride, eps,
    DIM: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """`head_values`, of which those that `turns` are normed, as queries or as keys, and turned by the position."""
    half: tl.constexpr = DIM // 2
    partners = tl.where(dims < half, dims + half, dims - half)
    plain = head_values(parts, bias, line, heads, dims, mask, split_stride, DIM, SPLITS, HAS_BIAS)
    other = head_values(parts, bias, line, heads, partners, mask, split_stride, DIM, SPLITS, HAS_BIAS)
    found = plain
    inside = dims < DIM
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(plain * plain, 1) / DIM + eps)[:, None]
        found = plain * scale * _norm_weights(q_norm, k_norm, dims, inside, is_query)
        other = other * scale * _norm_weights(q_norm, k_norm, partners, inside, is_query)
    angle = position.to(tl.int64) * half + dims % half
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    found = found * c[None, :] + other * tl.where(dims < half, -s, s)[None, :]
    return tl.where(turns, found, plain)


@triton.jit
def _norm_weights(q_norm, k_norm, dims, inside, is_query):
    of_query = tl.load(q_norm + dims, mask=inside, other=0.0).to(tl.float32)
    of_key = tl.load(k_norm + dims, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_query, of_query[None, :], of_key[None, :])


@triton.jit
def stored(values, cache):
    """As the cache holds them: what is beyond the range of FP8 becomes its largest number."""
    if cache.dtype.element_ty.is_fp8():
        values = tl.clamp(values, -_FP8_MAX, _FP8_MAX)
    return values.to(cache.dtype.element_ty)


@triton.jit(do_not_specialize=["table_stride"])
def _rope_append(
    parts, bias, q_norm, k_norm, cos, sin, positions, slots, tables, cache, query, own,
    split_stride, table_stride, block_stride, kv_stride, head_stride, own_stride, eps,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, HAS_OWN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, LANES)
    mask = (heads < num_heads + 2 * num_kv_heads)[:, None] & (dims < DIM)[None, :]
    line = row * (num_heads + 2 * num_kv_heads) * DIM
    position = tl.load(positions + row)
    is_query = (heads < num_heads)[:, None]
    turns = (heads < num_heads + num_kv_heads)[:, None]
    values = turned(
        parts, bias, q_norm, k_norm, cos, sin, line, tl.maximum(position, 0), heads, dims, is_query, turns, mask,
        split_stride, eps, DIM, SPLITS, HAS_BIAS, HAS_NORM,
    )  # fmt: skip
    to = query + (row * num_heads + heads)[:, None] * DIM + dims[None, :]
    tl.store(to, values, mask=mask & is_query)
    which = tl.maximum(heads - num_heads, 0)
    if HAS_OWN:
        at = (which // num_kv_heads).to(tl.int64) * own_stride + (
            row * num_kv_heads + which % num_kv_heads
        ) * DIM
        tl.store(own + at[:, None] + dims[None, :], values, mask=mask & (heads >= num_heads)[:, None])
    if position >= 0:
        slot = tl.load(slots + row).to(tl.int64)
        block = tl.load(tables + slot * table_stride + position // BLOCK_TOKENS).to(tl.int64)
        at = block * block_stride + (which // num_kv_heads).to(tl.int64) * kv_stride
        at += (which % num_kv_heads) * head_stride + (position % BLOCK_TOKENS) * DIM
        place = cache + at[:, None] + dims[None, :]
        tl.store(place, stored(values, cache), mask=mask & (heads >= num_heads)[:, None])


def rope_append(
    parts: Tensor,
    inputs: HeadInputs,
    *,
    positions: Tensor,
    slots: Tensor,
    tables: Tensor,
    cache: Tensor,
    dtype: torch.dtype,
    own: Tensor | None = None,
) -> Tensor:
    """`[S, T, (heads + 2 kv heads) * dim]` products to `[T, heads, dim]` turned queries; K and V into `cache`.

    Queries are of `dtype`, `cache` is of it or float8_e4m3fn, `[num_blocks, 2, kv heads, tokens per block, dim]`
    (strided); row r's block is `tables[slots[r], positions[r] // tokens per block]`. All integers are int32; rows of
    `parts` are contiguous. `own` [2, T, kv heads, dim] of `dtype`, contiguous, gets the rows' K and V, too.
    """
    splits, rows, _ = parts.shape
    layout = inputs.layout
    query = torch.empty(rows, layout.num_heads, layout.head_dim, dtype=dtype, device=cache.device)
    total = layout.num_heads + 2 * layout.num_kv_heads
    _rope_append[(rows, triton.cdiv(total, _HEADS))](
        parts, *inputs.tensors(query), positions, slots, tables, cache, query, query if own is None else own,
        parts.stride(0), tables.stride(0), *cache.stride()[:3], 0 if own is None else own.stride(0), layout.eps,
        BLOCK_TOKENS=cache.shape[3], SPLITS=splits, HEADS=_HEADS, HAS_OWN=own is not None, num_warps=4,
        **inputs.constants(), **chained(cache.device),
    )  # fmt: skip
    return query
