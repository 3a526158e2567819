import pytest

from diptych.block_hash import hash_block
from diptych.worker.blocks import BlockPool


def test_allocation_is_all_or_nothing():
    pool = BlockPool(4)
    first = pool.allocate(3)
    assert first is not None and len(first) == 3
    assert pool.allocate(2) is None
    assert pool.counts().free == 1
    pool.release(first)
    assert pool.counts().free == 4
    pool.check()


def test_generation_grows_when_a_block_gets_a_new_owner():
    pool = BlockPool(1)
    (block,) = pool.allocate(1) or []
    before = pool.generations[block]
    pool.release([block])
    assert pool.generations[block] == before
    pool.allocate(1)
    assert pool.generations[block] == before + 1


def test_published_blocks_are_matched_and_evicted_oldest_first():
    pool = BlockPool(3)
    blocks = pool.allocate(3) or []
    hashes = [hash_block(b"", [0]), hash_block(b"", [1]), hash_block(b"", [2])]
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.publish(block, block_hash)
    pool.release([blocks[1]])
    pool.release([blocks[0], blocks[2]])
    assert pool.counts().cached == 3
    assert pool.match([hashes[0], hashes[1]]) == [blocks[0], blocks[1]]
    pool.allocate(1)
    assert pool.match([hashes[1]]) == [], "the block released first goes first"
    pool.allocate(1)
    assert pool.match([hashes[2]]) == [], "of one release the tail goes before the head"
    assert pool.match([hashes[0]]) == [blocks[0]]
    pool.check()


def test_a_block_is_leased_until_the_last_lease_ends():
    pool = BlockPool(2)
    blocks = pool.allocate(2) or []
    pool.lease(blocks)
    pool.lease(blocks[:1])
    pool.release(blocks)
    assert pool.counts().leased == 2
    pool.unlease(blocks)
    assert pool.counts().leased == 1 and pool.counts().free == 1
    pool.unlease(blocks[:1])
    assert pool.counts().free == 2
    pool.check()


def test_a_leased_block_can_be_matched_and_used():
    pool = BlockPool(1)
    blocks = pool.allocate(1) or []
    pool.publish(blocks[0], b"h" * 16)
    pool.lease(blocks)
    pool.release(blocks)
    pool.take(pool.match([b"h" * 16]))
    assert pool.counts().active == 1
    pool.unlease(blocks)
    assert pool.counts().active == 1
    pool.release(blocks)
    assert pool.counts().cached == 1
    pool.check()


def test_reuse_off_keeps_nothing():
    pool = BlockPool(1, reuse=False)
    blocks = pool.allocate(1) or []
    pool.publish(blocks[0], b"h" * 16)
    pool.release(blocks)
    assert pool.match([b"h" * 16]) == [] and pool.counts().free == 1


def test_check_notices_a_block_returned_twice():
    pool = BlockPool(1)
    blocks = pool.allocate(1) or []
    pool.release(blocks)
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.check()
