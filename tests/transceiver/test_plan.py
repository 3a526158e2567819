"""A plan copies what a plain gather over the same pools would, whatever the two layouts are."""

import time
from itertools import pairwise, product

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.errors import TransferError
from diptych.kv_layout import KvLayout
from diptych.transceiver.owners import Part, choose_parts
from diptych.transceiver.plan import CopyPlan, plan_copy

LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=2, tokens_per_block=2)  # blocks of 16 bytes
LLAMA_8B = KvLayout(num_layers=32, num_kv_heads=8, head_dim=128, tokens_per_block=32)
POOL_BLOCKS = 24
NUM_LAYERS, HEAD_DIM = 5, 2


def ranks(num_heads: int, tp_size: int, stages: list[range], tokens_per_block: int) -> list[KvLayout]:
    """Every rank of a model of NUM_LAYERS layers; more ranks than heads hold copies."""
    return [
        KvLayout(
            num_layers=len(stage),
            first_layer=stage.start,
            num_kv_heads=max(1, num_heads // tp_size),
            total_kv_heads=num_heads,
            head_dim=HEAD_DIM,
            tokens_per_block=tokens_per_block,
            tp_rank=tp_rank,
            tp_size=tp_size,
            pp_rank=pp_rank,
            pp_size=len(stages),
        )
        for (pp_rank, stage), tp_rank in product(enumerate(stages), range(tp_size))
    ]


@st.composite
def stages(draw) -> list[range]:
    cuts = sorted(draw(st.sets(st.integers(1, NUM_LAYERS - 1), max_size=2)))
    return [range(a, b) for a, b in zip([0, *cuts], [*cuts, NUM_LAYERS], strict=True)]


def as_pool(layout: KvLayout, data: np.ndarray) -> np.ndarray:
    shape = (-1, layout.num_layers, 2, layout.num_kv_heads, layout.tokens_per_block, layout.head_dim)
    return data.view(np.int16).reshape(shape)


def fill(layout: KvLayout, blocks: list[int], kv: np.ndarray, data: np.ndarray) -> None:
    """Write the KV of a sequence, `[layers, 2, heads, tokens, head_dim]`, token by token."""
    pool = as_pool(layout, data)
    for token in range(kv.shape[3]):
        block, slot = blocks[token // layout.tokens_per_block], token % layout.tokens_per_block
        pool[block, :, :, :, slot] = kv[layout.layers][:, :, layout.kv_heads, token]


def run(plan: CopyPlan, source: np.ndarray, destination: np.ndarray) -> None:
    spans = plan.pieces(64)
    for src, dst, n in zip(spans.source_offset, spans.destination_offset, spans.length, strict=True):
        destination[dst : dst + n] = source[src : src + n]


@given(
    data=st.data(),
    num_heads=st.sampled_from([1, 2, 4, 8]),
    sizes=st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 2),
    splits=st.tuples(stages(), stages()),
    tokens_per_block=st.tuples(*[st.sampled_from([2, 3, 4, 8])] * 2),
    num_tokens=st.integers(1, 40),
)
def test_every_reader_gets_what_a_plain_gather_gives(
    data, num_heads, sizes, splits, tokens_per_block, num_tokens
):
    rng = np.random.default_rng(0)
    kv = rng.integers(-999, 999, (NUM_LAYERS, 2, num_heads, num_tokens, HEAD_DIM), np.int16)
    owners = ranks(num_heads, sizes[0], splits[0], tokens_per_block[0])
    count = -(-num_tokens // tokens_per_block[0])
    source_blocks = data.draw(st.permutations(range(POOL_BLOCKS)))[:count]
    pools = [rng.integers(0, 256, POOL_BLOCKS * owner.block_bytes, np.uint8) for owner in owners]
    for owner, pool in zip(owners, pools, strict=True):
        fill(owner, source_blocks, kv, pool)

    reader = data.draw(st.sampled_from(ranks(num_heads, sizes[1], splits[1], tokens_per_block[1])))
    blocks = data.draw(st.permutations(range(POOL_BLOCKS)))[: -(-num_tokens // tokens_per_block[1])]
    cached = data.draw(st.integers(0, len(blocks)))
    before = rng.integers(0, 256, POOL_BLOCKS * reader.block_bytes, np.uint8)
    expected, found = before.copy(), before.copy()
    fill(reader, blocks, kv, expected)
    as_pool(reader, expected)[blocks[:cached]] = as_pool(reader, before)[blocks[:cached]]
    for part in choose_parts(owners, reader):
        plan = plan_copy(
            owners[part.owner],
            reader,
            source_blocks,
            range(cached, len(blocks)),
            blocks[cached:],
            num_tokens=num_tokens,
            part=part,
        )
        run(plan, pools[part.owner], found)
        check_bookkeeping(plan, source_blocks)

    last = num_tokens - (len(blocks) - 1) * reader.tokens_per_block  # tokens in the last block
    for pool in (expected, found):  # what lies behind the sequence's end is nobody's
        as_pool(reader, pool)[blocks[-1], :, :, :, last:] = 0
    assert np.array_equal(found, expected)


def check_bookkeeping(plan: CopyPlan, source_blocks: list[int]) -> None:
    assert plan.source_blocks.tolist() == [source_blocks[position] for position in plan.positions]
    assert np.array_equal(plan.source_blocks[plan.row_block], plan.row_source // plan.source_block_bytes)
    assert plan.spans().num_bytes == plan.num_bytes
    copied = np.zeros(POOL_BLOCKS * plan.source_block_bytes, np.uint8)
    spans = plan.spans()
    for offset, length in zip(spans.source_offset, spans.length, strict=True):
        copied[offset : offset + length] += 1
    by_block = copied.reshape(POOL_BLOCKS, -1)[plan.source_blocks]
    assert np.array_equal(plan.complete, np.all(by_block == 1, axis=1))
    assert not plan.whole_blocks or np.all(plan.complete)


@given(st.data(), st.integers(1, 100))
def test_equal_layouts_copy_whole_blocks_in_runs(data, max_bytes):
    source = data.draw(st.permutations(range(POOL_BLOCKS)))
    indices = data.draw(st.lists(st.integers(0, POOL_BLOCKS - 1), max_size=20))
    blocks = data.draw(st.permutations(range(POOL_BLOCKS)))[: len(indices)]
    plan = plan_copy(LAYOUT, LAYOUT, source, indices, blocks, num_tokens=2 * POOL_BLOCKS)
    pairs = [(source[index], block) for index, block in zip(indices, blocks, strict=True)]
    breaks = sum((a + 1, x + 1) != (b, y) for (a, x), (b, y) in pairwise(pairs))
    assert len(plan.spans().length) == (breaks + 1 if pairs else 0)
    pieces = plan.pieces(max_bytes)
    assert pieces.num_bytes == plan.num_bytes == len(pairs) * LAYOUT.block_bytes
    assert all(n <= max(max_bytes, LAYOUT.block_bytes) for n in pieces.length)
    assert not np.any(pieces.length % LAYOUT.block_bytes)
    rng = np.random.default_rng(0)
    pools = rng.integers(0, 256, (2, POOL_BLOCKS * LAYOUT.block_bytes), np.uint8)
    expected = pools[1].reshape(POOL_BLOCKS, -1).copy()
    expected[list(blocks)] = pools[0].reshape(POOL_BLOCKS, -1)[[s for s, _ in pairs]]
    run(plan, *pools)
    assert np.array_equal(pools[1].reshape(POOL_BLOCKS, -1), expected)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_kv_heads": 4, "tp_size": 2},
        {"tokens_per_block": 16},
        {"tokens_per_block": 64, "num_kv_heads": 4, "tp_size": 2, "num_layers": 7, "first_layer": 9},
    ],
)
def test_a_plan_of_32k_tokens_takes_less_than_five_milliseconds(change):
    reader = msgspec.structs.replace(LLAMA_8B, **change)
    rng = np.random.default_rng(0)
    num_blocks = 2**15 // reader.tokens_per_block
    source, destination = rng.permutation(4096)[:1024].tolist(), rng.permutation(4096)[:num_blocks].tolist()
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (part,) = choose_parts([LLAMA_8B], reader)
        plan = plan_copy(
            LLAMA_8B, reader, source, range(num_blocks), destination, num_tokens=2**15, part=part
        )
        best = min(best, time.perf_counter() - started)
    assert plan.num_bytes == 2**15 * reader.bytes_per_token
    assert best < 5e-3


def test_readers_spread_over_the_ranks_that_hold_the_same_heads():
    owners = ranks(2, 8, [range(NUM_LAYERS)], 4)
    readers = ranks(2, 8, [range(NUM_LAYERS)], 4)
    chosen = [choose_parts(owners, reader) for reader in readers]
    assert [[part.owner for part in parts] for parts in chosen] == [[0], [1], [2], [3], [4], [5], [6], [7]]


def test_missing_and_doubled_pieces_are_refused():
    owners = ranks(4, 2, [range(0, 2), range(2, NUM_LAYERS)], 4)
    (reader,) = ranks(4, 1, [range(NUM_LAYERS)], 4)
    assert len(choose_parts(owners, reader)) == 4
    doubled = msgspec.structs.replace(owners[3], first_layer=1, num_layers=4)
    for wrong in (owners[:3], [*owners[:3], doubled], []):
        with pytest.raises(TransferError, match="layers 0 to 4 and KV heads 0 to 3 once") as caught:
            choose_parts(wrong, reader)
        assert caught.value.code == "layout"


def test_different_models_are_refused_by_name():
    other = msgspec.structs.replace(LAYOUT, tokens_per_block=4, dtype="float16")
    with pytest.raises(TransferError) as caught:
        plan_copy(other, LAYOUT, [0], [0], [0], num_tokens=2)
    assert caught.value.code == "layout"
    assert caught.value.message == "KV layouts differ: dtype is 'float16' there and 'bfloat16' here"


def test_tiles_of_the_cpu_kernels_are_not_cut():
    ours = msgspec.structs.replace(LAYOUT, inner="vnni")
    theirs = msgspec.structs.replace(ours, tokens_per_block=4)
    with pytest.raises(TransferError, match="tokens_per_block is 4 there and 2 here"):
        plan_copy(theirs, ours, [0], [0], [0], num_tokens=2)
    halves = msgspec.structs.replace(ours, num_kv_heads=2)
    plan = plan_copy(halves, ours, [1], [0], [0], num_tokens=2, part=Part(0, range(1), range(1)))
    assert plan.num_bytes == ours.block_bytes


@pytest.mark.parametrize(("indices", "blocks"), [([0], []), ([0, 1], [2, 2]), ([2], [0]), ([-1], [0])])
def test_lists_that_do_not_match_are_refused(indices, blocks):
    with pytest.raises(TransferError) as caught:
        plan_copy(LAYOUT, LAYOUT, [7, 8], indices, blocks, num_tokens=4)
    assert caught.value.code == "layout"


@pytest.mark.parametrize(("source", "destination"), [([8], [0]), ([0], [8]), ([-1], [0])])
def test_blocks_outside_a_pool_are_refused(source, destination):
    plan = plan_copy(LAYOUT, LAYOUT, source, [0], destination, num_tokens=2)
    with pytest.raises(TransferError, match="outside a pool of 8"):
        plan.require_within(source_blocks=8, destination_blocks=8)
