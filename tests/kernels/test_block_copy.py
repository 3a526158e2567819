"""Block copies and digests: host, torch and GPU agree, and every change of a block shows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.kernels.block_copy import CopyGrid, copy_reference
from diptych.kernels.block_digest import digest_blocks, digest_bytes

POOL_BLOCKS = 12


def random_pool(block_bytes: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (POOL_BLOCKS, block_bytes), np.uint8))


def grid_of(block_bytes: int, cells: list[int], length: int) -> CopyGrid:
    """Blocks 7, 2, 9 to 1, 0, 4; the cells in reversed order."""
    source, destination = np.array([7, 2, 9]), np.array([1, 0, 4])
    rows = np.stack([source * block_bytes, destination * block_bytes, np.zeros(3, np.int64), np.arange(3)])
    return CopyGrid.of(rows, np.array(cells, np.int64), np.array(cells[::-1], np.int64), length, num_blocks=3)


def as_unsigned(digests: torch.Tensor) -> list[int]:
    return [int(digest) % 2**64 for digest in digests]


@given(st.integers(0, 2**32), st.sampled_from([16, 48, 4096, 40_000]))
def test_torch_and_numpy_give_one_digest(seed, block_bytes):
    pool = random_pool(block_bytes, seed)
    ids = torch.tensor([3, 0, 11, 3])
    expected = [digest_bytes(pool[block].numpy()) for block in ids]
    assert as_unsigned(digest_blocks(pool, ids)) == expected
    assert expected[0] == expected[3]


@given(st.data())
def test_every_change_shows(data):
    block = random_pool(4096, 0)[0].numpy()
    before = digest_bytes(block)
    changed = block.copy()
    kind = data.draw(st.sampled_from(["bit", "words", "halves", "shift", "zero"]))
    at, other = data.draw(st.lists(st.integers(0, 511), min_size=2, max_size=2, unique=True))
    words = changed.view(np.uint64)
    if kind == "bit":
        changed[8 * at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "words":
        words[[at, other]] = words[[other, at]]
    elif kind == "halves":
        words[at] = words[at] << np.uint64(32) | words[at] >> np.uint64(32)
    elif kind == "shift":
        changed[:] = np.roll(block, 8 * at + 8 * (at == 0))
    else:
        words[at] = 0
    assert digest_bytes(changed) != before


def test_zeros_and_constants_have_digests_of_their_own():
    blocks = [np.full(4096, value, np.uint8) for value in range(256)]
    assert len({digest_bytes(block) for block in blocks}) == 256


@pytest.mark.parametrize(
    ("block_bytes", "cells", "length"), [(8192, [0], 8192), (5120, [0, 2560], 1280), (768, [0, 384], 384)]
)
def test_the_reference_copies_and_digests(block_bytes, cells, length):
    source, destination = random_pool(block_bytes, 1), random_pool(block_bytes, 2)
    expected = destination.clone()
    for old, new in ((7, 1), (2, 0), (9, 4)):
        for start, end in zip(cells, cells[::-1], strict=True):
            expected[new, end : end + length] = source[old, start : start + length]
    digests = copy_reference(source.view(-1), destination.view(-1), grid_of(block_bytes, cells, length))
    assert torch.equal(destination, expected)
    if length * len(cells) == block_bytes:
        assert torch.equal(digests, digest_blocks(source, torch.tensor([7, 2, 9])))


@pytest.mark.parametrize("offset", [8, 4])
def test_what_is_not_aligned_says_so(offset):
    assert grid_of(4096, [0], 4096).is_aligned
    assert not grid_of(4096, [offset], 64).is_aligned
    assert not grid_of(4096, [0], 64 + offset).is_aligned


@pytest.mark.parametrize(
    ("block_bytes", "cells", "length"),
    [
        (1 << 20, [0], 1 << 20),
        (40_960, [0], 40_960),
        (65_536, [0, 32_768], 32_768),
        (65_536, list(range(0, 65_536, 4096)), 2048),
        (5120, [0, 2560], 1280),
        (768, [0, 384], 384),
        (96, [0, 32, 64], 16),
    ],
)
@pytest.mark.parametrize("programs", [1, 32])
@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_gpu_copies_as_the_reference_does(block_bytes, cells, length, programs, digest):
    from diptych.kernels.block_copy_triton import BlockMover

    source, expected = random_pool(block_bytes, 1).cuda(), random_pool(block_bytes, 2).cuda()
    before = expected.clone()
    grid = grid_of(block_bytes, cells, length)
    wanted = copy_reference(source.view(-1), expected.view(-1), grid)
    packed = np.empty(grid.num_numbers, np.int64)
    grid.pack_into(packed)
    numbers = torch.from_numpy(packed).cuda()
    mover, stream = BlockMover(), torch.cuda.current_stream()
    for _ in range(2):  # by Triton, then by the driver
        found, digests = before.clone(), torch.zeros(len(wanted) + 1, dtype=torch.int64, device="cuda")
        mover.copy(
            source.data_ptr(),
            found.data_ptr(),
            numbers.data_ptr(),
            digests.data_ptr(),
            grid,
            num_programs=programs,
            digest=digest,
            stream=stream,
        )
        assert torch.equal(found, expected)
        assert torch.equal(digests[:-1], wanted if digest else torch.zeros_like(wanted))


@pytest.mark.parametrize("block_bytes", [96, 5120, 40_960, 1 << 20])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_gpu_digests_as_the_host_does(block_bytes):
    pool = random_pool(block_bytes, 3)
    ids = torch.tensor([5, 0, 11, 5])
    assert torch.equal(digest_blocks(pool.cuda(), ids.cuda()).cpu(), digest_blocks(pool, ids))
    assert len(digest_blocks(pool.cuda(), ids[:0].cuda())) == 0
