"""Pool memory is what it says, and a reader finds out when it is not."""

import mmap
import os

import msgspec
import numpy as np
import pytest
import torch
from kv_nodes import LAYOUT

from diptych.errors import StartupError, TransferError
from diptych.transceiver.pool_memory import PoolIdentity, PoolMemory, open_pool


@pytest.fixture
def memory():
    memory = PoolMemory.create(LAYOUT, 5, "me")
    yield memory
    memory.close()


def test_shape_and_alignment(memory: PoolMemory):
    assert memory.blocks.shape == (5, LAYOUT.block_bytes)
    assert memory.generations.tolist() == [0] * 5
    assert memory.blocks.ctypes.data % mmap.PAGESIZE == 0
    assert memory.blocks.flags.writeable
    assert memory.populate_s >= 0


def test_torch_shares_the_memory(memory: PoolMemory):
    tensor = torch.frombuffer(memory.data, dtype=torch.uint8).view(5, -1)
    tensor[3, 7] = 42
    assert memory.blocks[3, 7] == 42


def test_a_reader_sees_writes_and_cannot_write(memory: PoolMemory):
    view = open_pool(memory.fd, memory.identity)
    memory.blocks[2] = 9
    memory.generations[2] += 1
    assert np.all(view.blocks[2] == 9)
    assert view.generations.tolist() == [0, 0, 1, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        view.blocks[0, 0] = 1


def test_the_pool_cannot_shrink_under_a_reader(memory: PoolMemory):
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 0)


@pytest.mark.parametrize("change", [{"incarnation": "another"}, {"fingerprint": "0" * 16}, {"num_blocks": 4}])
def test_another_identity_is_refused(memory: PoolMemory, change: dict[str, object]):
    expected: PoolIdentity = msgspec.structs.replace(memory.identity, **change)
    with pytest.raises(TransferError) as caught:
        open_pool(memory.fd, expected)
    assert caught.value.code == "peer_gone"


def test_any_other_descriptor_is_refused(memory: PoolMemory, tmp_path):
    path = tmp_path / "pool"
    path.write_bytes(bytes(memory.identity.total_bytes))
    with path.open("rb") as file, pytest.raises(TransferError, match="not a sealed memfd"):
        open_pool(file.fileno(), memory.identity)


@pytest.mark.parametrize(("num_blocks", "incarnation"), [(0, "me"), (1, ""), (1, "x" * 65), (1 << 60, "me")])
def test_what_cannot_be_created_says_so(num_blocks: int, incarnation: str):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StartupError, match=r"num_blocks|incarnation|GiB"):
        PoolMemory.create(LAYOUT, num_blocks, incarnation)
    assert len(os.listdir("/proc/self/fd")) == before


def test_close_twice_and_arrays_outlive_it():
    memory = PoolMemory.create(LAYOUT, 2, "me")
    kept = memory.blocks
    memory.close()
    memory.close()
    kept[1] = 3
    assert np.all(kept[1] == 3)
    assert len(memory.blocks) == 0
