"""The plain torch kernels against definitions written out for one row at a time."""

import math

import numpy as np
import pytest
import torch

from diptych.kernels.activation import silu_and_mul
from diptych.kernels.attention import append_kv, paged_attention, plan_attention
from diptych.kernels.norm import add_rms_norm, rms_norm
from diptych.kernels.rope import apply_rope

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 6, 2, 8, 4


def attend_row(query, keys, values, position, window):
    """One row, one head: softmax over the visible positions, in float64."""
    first = 0 if window is None else max(0, position - window + 1)
    scores = keys[first : position + 1].double() @ query.double() * HEAD_DIM**-0.5
    return scores.softmax(0) @ values[first : position + 1].double()


class Pool:
    """Sequences of known K and V of which the first `computed` positions are in a NaN-filled cache."""

    def __init__(self, lengths, computed):
        generator = torch.Generator().manual_seed(0)

        def draw(count, heads):
            return torch.randn(count, heads, HEAD_DIM, generator=generator)

        self.queries = [draw(length, HEADS) for length in lengths]
        self.keys = [draw(length, KV_HEADS) for length in lengths]
        self.values = [draw(length, KV_HEADS) for length in lengths]
        # Two layers, so that one layer's cache is a strided view.
        self.pool = torch.full((40, 2, 2, KV_HEADS, BLOCK, HEAD_DIM), math.nan)
        self.tables = np.random.default_rng(0).permutation(40).astype(np.int32).reshape(len(lengths), -1)
        self.append([(index, 0, stop) for index, stop in enumerate(computed) if stop])

    @property
    def cache(self):
        return self.pool[:, 1]

    def plan(self, chunks, window=None):
        counts = [stop - start for _, start, stop in chunks]
        return plan_attention(
            positions=np.concatenate([np.arange(start, stop, dtype=np.int32) for _, start, stop in chunks]),
            query_starts=np.cumsum([0, *counts]),
            block_tables=self.tables[[index for index, _, _ in chunks]],
            tokens_per_block=BLOCK,
            sliding_window=window,
            device=torch.device("cpu"),
        )

    def append(self, chunks):
        if chunks:
            append_kv(rows(self.keys, chunks), rows(self.values, chunks), self.cache, self.plan(chunks))


def rows(tensors, chunks):
    return torch.cat([tensors[index][start:stop] for index, start, stop in chunks])


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_attention_of_a_mixed_step(window):
    computed, lengths = [0, 12, 5, 0, 7], [13, 13, 18, 1, 8]
    pool = Pool(lengths, computed)
    chunks = [(index, computed[index], lengths[index]) for index in (2, 0, 4, 1, 3)]
    pool.append(chunks)
    actual = paged_attention(
        rows(pool.queries, chunks), pool.cache, pool.plan(chunks, window), HEAD_DIM**-0.5
    )
    expected = torch.stack(
        [
            torch.stack(
                [
                    attend_row(
                        pool.queries[index][position, head],
                        pool.keys[index][:, head // (HEADS // KV_HEADS)],
                        pool.values[index][:, head // (HEADS // KV_HEADS)],
                        position,
                        window,
                    )
                    for head in range(HEADS)
                ]
            )
            for index, start, stop in chunks
            for position in range(start, stop)
        ]
    )
    assert torch.allclose(actual.double(), expected, atol=1e-6)


def test_append_touches_only_its_slots():
    pool = Pool([6, 6], [0, 0])
    pool.append([(0, 3, 6)])
    written = ~pool.pool.isnan().any(-1)
    assert written.sum() == 3 * 2 * KV_HEADS
    block, slot = pool.tables[0, 1], 5 - BLOCK
    assert torch.equal(pool.pool[block, 1, 0, :, slot], pool.keys[0][5])
    assert torch.equal(pool.pool[block, 1, 1, :, slot], pool.values[0][5])


def test_cache_of_another_dtype():
    pool = Pool([9], [0])
    exact = Pool([9], [9])
    pool.pool = pool.pool.bfloat16()
    pool.append([(0, 0, 9)])
    chunk = [(0, 0, 9)]
    actual = paged_attention(pool.queries[0], pool.cache, pool.plan(chunk), HEAD_DIM**-0.5)
    expected = paged_attention(exact.queries[0], exact.cache, exact.plan(chunk), HEAD_DIM**-0.5)
    assert actual.dtype == torch.float32
    assert torch.allclose(actual, expected, atol=0.03)


def test_rms_norm():
    x, weight = torch.randn(3, 16), torch.rand(16)
    expected = torch.stack([row / math.sqrt(sum(v * v for v in row.tolist()) / 16 + 1e-5) for row in x])
    assert torch.allclose(rms_norm(x, weight, 1e-5), expected * weight, atol=1e-6)


def test_add_rms_norm_keeps_the_wide_residual():
    x, weight = torch.randn(3, 16).bfloat16(), torch.rand(16).bfloat16()
    residual = torch.randn(3, 16)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert total.dtype == torch.float32
    assert torch.equal(total, residual + x.float())
    assert normed.dtype == torch.bfloat16
    assert torch.equal(normed, rms_norm(total, weight, 1e-5))


def test_rope_turns_pairs():
    x, angles = torch.randn(5, 3, 8), torch.rand(5, 4) * 6
    turned = apply_rope(x, angles.cos(), angles.sin())
    for row in range(5):
        for pair in range(4):
            number = torch.complex(x[row, :, pair], x[row, :, pair + 4])
            expected = number * torch.polar(torch.tensor(1.0), angles[row, pair])
            assert torch.allclose(turned[row, :, pair], expected.real, atol=1e-5)
            assert torch.allclose(turned[row, :, pair + 4], expected.imag, atol=1e-5)


def test_silu_and_mul():
    gate, up = torch.randn(4, 6), torch.randn(4, 6)
    expected = gate / (1 + (-gate).exp()) * up
    assert torch.allclose(silu_and_mul(torch.cat((gate, up), 1)), expected, atol=1e-6)
    narrow = silu_and_mul(torch.cat((gate, up), 1).bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert torch.allclose(narrow.float(), expected, atol=0.05)
