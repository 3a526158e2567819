"""Digests of blocks: what a ticket promises and what a reader finds after the copy.

xxh3_64 over a block's bytes: it finds torn copies, wrong blocks and flipped bits, and no adversary. Knows
nothing of how the bytes travelled.
"""

from collections.abc import Sequence

import numpy as np
import xxhash

from diptych.errors import TransferError
from diptych.transceiver.plan import Int64s
from diptych.transceiver.pool_memory import Bytes, PoolMemory


class OwnerDigests:
    """Digests of the owner's blocks.

    A full block never changes within a generation, so it is read once for all tickets that name it: offering
    a prompt again costs nothing but its last block.
    """

    def __init__(self, memory: PoolMemory, tokens_per_block: int) -> None:
        self._memory = memory
        self._tokens_per_block = tokens_per_block
        self._known: dict[int, tuple[int, int]] = {}  # block -> (generation, digest)

    def of(self, block_ids: Sequence[int], generations: Sequence[int], num_tokens: int) -> list[int]:
        num_full = num_tokens // self._tokens_per_block
        return [
            self._of_full(block, generation) if i < num_full else self._read(block)
            for i, (block, generation) in enumerate(zip(block_ids, generations, strict=True))
        ]

    def _of_full(self, block: int, generation: int) -> int:
        known = self._known.get(block)
        if known is not None and known[0] == generation:
            return known[1]
        digest = self._read(block)
        self._known[block] = (generation, digest)
        return digest

    def _read(self, block: int) -> int:
        return xxhash.xxh3_64_intdigest(self._memory.blocks[block].data)


class LandedDigests:
    """Digests the reader's blocks as they land, while they are still in a cache of the CPU."""

    def __init__(self, destination: Bytes, block_bytes: int) -> None:
        self._destination = destination
        self._block_bytes = block_bytes
        self._found: dict[int, int] = {}  # destination block -> digest

    def landed(self, offset: int, length: int) -> None:
        for start in range(offset, offset + length, self._block_bytes):
            block = self._destination[start : start + self._block_bytes]
            self._found[start // self._block_bytes] = xxhash.xxh3_64_intdigest(block.data)

    def require(self, destination_blocks: Int64s, expected: Sequence[int]) -> None:
        pairs = zip(destination_blocks.tolist(), expected, strict=True)
        wrong = [block for block, digest in pairs if self._found.get(block) != digest]
        if wrong:
            raise TransferError(
                f"{len(wrong)} of {len(expected)} blocks arrived with other bytes than the ticket promises",
                code="corrupt",
            )


def require_generations(found: Sequence[int] | np.ndarray, expected: Sequence[int]) -> None:
    reused = int(np.count_nonzero(np.asarray(found, np.uint64) != np.asarray(expected, np.uint64)))
    if reused:
        raise TransferError(
            f"{reused} of {len(expected)} blocks were reused by their owner before the copy was done",
            code="stale",
        )
