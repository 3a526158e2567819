"""The chain of block hashes: what it depends on, and that its keys travel."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.block_hash import (
    block_key,
    block_keys,
    first_parent,
    hash_block,
    num_reusable_blocks,
    pack_keys,
    unpack_keys,
)
from diptych.wire import SamplingParams, Submit
from diptych.worker.sequence import Sequence

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def test_a_hash_depends_on_the_whole_prefix_and_the_salt():
    first = hash_block(b"", [1, 2])
    assert len(first) == 16
    assert hash_block(first, [3, 4]) != hash_block(b"", [3, 4])
    assert block_keys([1, 2, 3, 4], 2, "a") != block_keys([1, 2, 3, 4], 2, "b")
    assert block_keys([1, 2], 2, "x" * 64 + "a") != block_keys([1, 2], 2, "x" * 64 + "b")


def test_a_salt_cannot_pose_as_a_block():
    salt = "sixteen bytes ok"
    assert first_parent(salt) != salt.encode()
    assert hash_block(first_parent(salt), [1]) != hash_block(salt.encode(), [1])


@given(tokens, st.integers(1, 8), st.sampled_from(["", "salt"]))
def test_a_router_names_blocks_as_an_engine_does(token_ids, size, salt):
    params = SamplingParams(max_tokens=1)
    submit = Submit(request_id="r", prompt_token_ids=token_ids, params=params, cache_salt=salt)
    sequence = Sequence(submit, 0.0)
    sequence.extend_hashes(size, len(token_ids))
    assert block_keys(token_ids, size, salt) == [block_key(block_hash) for block_hash in sequence.hashes]


def test_one_token_is_left_to_compute():
    assert [num_reusable_blocks(count, 4) for count in (1, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_packed_keys_come_back(keys):
    assert list(unpack_keys(pack_keys(keys))) == keys


def test_packed_keys_are_whole():
    with pytest.raises(ValueError):
        unpack_keys(b"seven b")
