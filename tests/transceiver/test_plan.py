"""A plan copies what its block lists say, in as few spans as there are runs."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.errors import TransferError
from diptych.kv_layout import KvLayout
from diptych.transceiver.plan import CopyPlan, batches, plan_copy

LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=2, tokens_per_block=2)  # blocks of 16 bytes
POOL_BLOCKS = 24


@st.composite
def block_lists(draw) -> tuple[list[int], list[int]]:
    """Scrambled runs, so that merging has something to merge."""
    destination: list[int] = []
    source: list[int] = []
    free = set(range(POOL_BLOCKS))
    for _ in range(draw(st.integers(0, 6))):
        length = draw(st.integers(1, 5))
        src, dst = draw(st.integers(0, POOL_BLOCKS - 5)), draw(st.integers(0, POOL_BLOCKS - 5))
        if free.issuperset(range(dst, dst + length)):
            free -= set(range(dst, dst + length))
            source += range(src, src + length)
            destination += range(dst, dst + length)
    return source, destination


def run(plan: CopyPlan, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
    result = destination.copy()
    for src, dst, n in zip(plan.source_offset, plan.destination_offset, plan.length, strict=True):
        result[dst : dst + n] = source[src : src + n]
    return result


def pools() -> tuple[np.ndarray, np.ndarray]:
    size = POOL_BLOCKS * LAYOUT.block_bytes
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, size, np.uint8), rng.integers(0, 256, size, np.uint8)


@given(block_lists(), st.integers(1, 100))
def test_plan_and_its_pieces_copy_block_by_block(lists, max_bytes):
    source, destination = lists
    from_pool, to_pool = pools()
    expected = to_pool.reshape(POOL_BLOCKS, -1).copy()
    expected[destination] = from_pool.reshape(POOL_BLOCKS, -1)[source]

    plan = plan_copy(LAYOUT, LAYOUT, source, destination)
    assert np.array_equal(run(plan, from_pool, to_pool), expected.reshape(-1))
    assert plan.num_bytes == len(source) * LAYOUT.block_bytes
    breaks = sum(
        (a + 1, x + 1) != (b, y)
        for (a, x), (b, y) in zip(
            zip(source, destination, strict=True),
            list(zip(source, destination, strict=True))[1:],
            strict=False,
        )
    )
    assert len(plan.length) == (breaks + 1 if source else 0)

    pieces = plan.pieces(max_bytes)
    assert np.array_equal(run(pieces, from_pool, to_pool), expected.reshape(-1))
    assert pieces.num_bytes == plan.num_bytes
    assert all(n <= max(max_bytes, LAYOUT.block_bytes) for n in pieces.length)
    assert not np.any(pieces.length % LAYOUT.block_bytes)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100), st.integers(1, 6))
def test_batches_cover_all_spans_within_their_limits(lengths, max_bytes, max_spans):
    found = list(batches(np.array(lengths, np.int64), max_bytes, max_spans))
    assert [i for batch in found for i in range(batch.start, batch.stop)] == list(range(len(lengths)))
    for batch in found:
        spans = lengths[batch]
        assert 1 <= len(spans) <= max_spans
        assert len(spans) == 1 or sum(spans) <= max_bytes


def test_different_layouts_are_refused_by_name():
    other = msgspec.structs.replace(LAYOUT, tokens_per_block=4, dtype="float16")
    with pytest.raises(TransferError) as caught:
        plan_copy(other, LAYOUT, [0], [0])
    assert caught.value.code == "layout"
    assert "tokens_per_block is 4 there and 2 here" in caught.value.message
    assert "dtype is 'float16' there and 'bfloat16' here" in caught.value.message
    assert "head_dim" not in caught.value.message


@pytest.mark.parametrize(("source", "destination"), [([0], []), ([0, 1], [2, 2])])
def test_lists_that_do_not_match_are_refused(source, destination):
    with pytest.raises(TransferError) as caught:
        plan_copy(LAYOUT, LAYOUT, source, destination)
    assert caught.value.code == "layout"


@pytest.mark.parametrize(("source", "destination"), [([8], [0]), ([0], [8]), ([-1], [0])])
def test_blocks_outside_a_pool_are_refused(source, destination):
    with pytest.raises(TransferError, match="outside a pool of 8"):
        plan_copy(LAYOUT, LAYOUT, source, destination).require_within(source_blocks=8, destination_blocks=8)
