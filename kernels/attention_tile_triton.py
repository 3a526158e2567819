"""The step that every walk over a paged context repeats: one tile of keys and values into a running softmax.

Flash attention (Dao 2023): `highest`, `mass` and `total` are the largest score, the sum of weights and the weighted
sum of values so far, all relative to `highest`; scores are in powers of two.

TURNED: keys are the left operand of their product and values of theirs, so that few queries are the matrix unit's
columns, of which eight are enough, and not its rows, of which it takes sixteen at least.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(
    cache, table, at, stop, block_stride, kv_stride,
    DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys and values `[tile, dim]` of one kv head, the TILE tokens from `at` on.

    From `stop` on they are zeros. WHOLE: there are none of those, which saves a third of the instructions.
    """
    tokens = at + tl.arange(0, TILE)
    dims = tl.arange(0, DIM)
    if BLOCK_TOKENS % TILE == 0:  # one look-up, and addresses that differ by constants
        block = tl.load(table + at // BLOCK_TOKENS).to(tl.int64)
        places = cache + (block * block_stride + at % BLOCK_TOKENS * DIM) + tl.arange(0, TILE) * DIM
    else:
        block = tl.load(table + tokens // BLOCK_TOKENS, mask=tokens < stop, other=0).to(tl.int64)
        places = cache + block * block_stride + tokens % BLOCK_TOKENS * DIM
    keys = places[:, None] + dims[None, :]
    if WHOLE:
        return tl.load(keys), tl.load(keys + kv_stride)
    inside = (tokens < stop)[:, None]
    return tl.load(keys, mask=inside, other=0.0), tl.load(keys + kv_stride, mask=inside, other=0.0)


@triton.jit
def take_tile(
    query, k, v, visible, factor, highest, mass, total,
    HIDES: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`query` and `total` [rows, dim], `visible` [rows or 1, tile], all three turned if TURNED; a tile as `load_tile`
    gives it. The running softmax afterwards. Without HIDES everything is visible.
    """
    tokens: tl.constexpr = 0 if TURNED else 1  # the axis of scores
    if k.dtype.is_fp8():
        query = query.to(tl.float16)  # holds every number of FP8, and is one instruction away from it
    k = k.to(query.dtype)
    v = v.to(query.dtype)
    if TURNED:
        scores = tl.dot(k, query, input_precision=PRECISION) * factor
    else:
        scores = tl.dot(query, k.T, input_precision=PRECISION) * factor
    if HIDES:
        scores = tl.where(visible, scores, -float("inf"))
    higher = tl.maximum(highest, tl.max(scores, tokens))
    base = higher
    if HIDES:  # a tile that the window hides wholly leaves nothing to subtract from
        base = tl.where(higher == -float("inf"), 0.0, higher)
    kept = tl.exp2(highest - base)
    weights = tl.exp2(scores - tl.expand_dims(base, tokens))
    mass = mass * kept + tl.sum(weights, tokens)
    total *= tl.expand_dims(kept, tokens)
    if TURNED:
        total += tl.dot(v.T, weights.to(v.dtype), input_precision=PRECISION)
    else:
        total += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return higher, mass, total
