"""The step that every walk over a paged context repeats: one tile of keys and values into a running softmax.

Flash attention (Dao 2023): `highest`, `mass` and `total` are the largest score, the sum of weights and the weighted
sum of values so far, all relative to `highest`; scores are in powers of two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def places_of(
    cache, table, tokens, inside, at, block_stride, DIM, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr
):
    """Pointers to the keys of `tokens`, which are the TILE from `at` on, of one kv head."""
    if BLOCK_TOKENS % TILE == 0:
        block = tl.load(table + at // BLOCK_TOKENS).to(tl.int64)
    else:
        block = tl.load(table + tokens // BLOCK_TOKENS, mask=inside, other=0).to(tl.int64)
    return cache + block * block_stride + (tokens % BLOCK_TOKENS) * DIM


@triton.jit
def take_tile(
    query, places, kv_stride, dims, inside, visible, factor, highest, mass, total, PRECISION: tl.constexpr
):
    """`query` [rows, dim], `visible` [rows or 1, tile]; the running softmax afterwards."""
    if places.dtype.element_ty.is_fp8():
        query = query.to(tl.float16)  # holds every number of FP8, and is one instruction away from it
    k = tl.load(places[None, :] + dims[:, None], mask=inside[None, :], other=0.0).to(query.dtype)
    scores = tl.dot(query, k, input_precision=PRECISION) * factor
    scores = tl.where(visible, scores, -float("inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    # A tile that the window hides wholly leaves nothing to subtract from.
    base = tl.where(higher == -float("inf"), 0.0, higher)
    kept = tl.exp2(highest - base)
    weights = tl.exp2(scores - base[:, None])
    v = tl.load(places[:, None] + kv_stride + dims[None, :], mask=inside[:, None], other=0.0).to(query.dtype)
    total = total * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return higher, mass * kept + tl.sum(weights, 1), total
