"""The step that every walk over a paged context repeats: one tile of keys and values into a running softmax.

Flash attention (Dao 2023): `highest`, `mass` and `total` are the largest score, the sum of weights and the weighted
sum of values so far, all relative to `highest`; scores are in powers of two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(
    cache, table, at, stop, block_stride, kv_stride,
    DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys `[dim, tile]` and values `[tile, dim]` of one kv head: the TILE tokens from `at` on, zeros from `stop` on.

    WHOLE: there are no such zeros, which saves a third of the instructions.
    """
    tokens = at + tl.arange(0, TILE)
    dims = tl.arange(0, DIM)
    if BLOCK_TOKENS % TILE == 0:  # one look-up, and addresses that differ by constants
        block = tl.load(table + at // BLOCK_TOKENS).to(tl.int64)
        places = cache + (block * block_stride + at % BLOCK_TOKENS * DIM) + tl.arange(0, TILE) * DIM
    else:
        block = tl.load(table + tokens // BLOCK_TOKENS, mask=tokens < stop, other=0).to(tl.int64)
        places = cache + block * block_stride + tokens % BLOCK_TOKENS * DIM
    keys = places[None, :] + dims[:, None]
    values = places[:, None] + kv_stride + dims[None, :]
    if WHOLE:
        return tl.load(keys), tl.load(values)
    return (
        tl.load(keys, mask=(tokens < stop)[None, :], other=0.0),
        tl.load(values, mask=(tokens < stop)[:, None], other=0.0),
    )


@triton.jit
def take_tile(
    query, k, v, visible, factor, highest, mass, total, HIDES: tl.constexpr, PRECISION: tl.constexpr
):
    """`query` [rows, dim], a tile as `load_tile` gives it, `visible` [rows or 1, tile]; the running softmax afterwards.

    Without HIDES everything is visible.
    """
    if k.dtype.is_fp8():
        query = query.to(tl.float16)  # holds every number of FP8, and is one instruction away from it
    scores = tl.dot(query, k.to(query.dtype), input_precision=PRECISION) * factor
    if HIDES:
        scores = tl.where(visible, scores, -float("inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    base = higher
    if HIDES:  # a tile that the window hides wholly leaves nothing to subtract from
        base = tl.where(higher == -float("inf"), 0.0, higher)
    kept = tl.exp2(highest - base)
    weights = tl.exp2(scores - base[:, None])
    added = tl.dot(weights.to(query.dtype), v.to(query.dtype), input_precision=PRECISION)
    return higher, mass * kept + tl.sum(weights, 1), total * kept[:, None] + added
