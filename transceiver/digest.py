"""Digests of blocks: what a ticket promises and what a reader finds after the copy.

A digest finds torn copies, wrong blocks and flipped bits, and no adversary. The owner's pool says which kind it
computes and the ticket names it. Knows nothing of how the bytes travelled.
"""

import importlib
from collections.abc import Callable, Sequence

import numpy as np

from diptych.errors import TransferError
from diptych.transceiver.pool import Bytes, DigestKind, Digests, Generations, KvPool
from diptych.transceiver.spans import Int64s

# Kind -> digest of bytes in host memory, imported on use.
_ON_HOST: dict[DigestKind, str] = {
    "xxh3_64": "xxhash:xxh3_64_intdigest",
    "nh_64": "diptych.kernels.block_digest:digest_bytes",
}


class OwnerDigests:
    """Digests of the owner's blocks.

    A full block never changes within a generation, so it is read once for all tickets that name it: offering
    a prompt again costs nothing but its last block.
    """

    def __init__(self, memory: KvPool, tokens_per_block: int) -> None:
        self._memory = memory
        self._tokens_per_block = tokens_per_block
        self._known: dict[int, tuple[int, int]] = {}  # block -> (generation, digest)

    def of(self, block_ids: Sequence[int], generations: Sequence[int], num_tokens: int) -> list[int]:
        full = dict(zip(block_ids[: num_tokens // self._tokens_per_block], generations, strict=False))
        unknown = [block for block in dict.fromkeys(block_ids) if not self._knows(block, full.get(block))]
        fresh = dict(zip(unknown, self._memory.digest(unknown), strict=True)) if unknown else {}
        for block, digest in fresh.items():
            if block in full:
                self._known[block] = (full[block], digest)
        return [fresh[block] if block in fresh else self._known[block][1] for block in block_ids]

    def _knows(self, block: int, generation: int | None) -> bool:
        return generation is not None and self._known.get(block, (None, 0))[0] == generation


class LandedDigests:
    """Digests the reader's blocks as they land, while they are still in a cache of the CPU."""

    def __init__(self, kind: DigestKind, block_bytes: int) -> None:
        module, _, name = _ON_HOST[kind].partition(":")
        self._digest: Callable[[Bytes], int] = getattr(importlib.import_module(module), name)
        self._block_bytes = block_bytes
        self._found: dict[int, int] = {}  # destination block -> digest

    def landed(self, offset: int, data: Bytes) -> None:
        for start in range(0, len(data), self._block_bytes):
            block = data[start : start + self._block_bytes]
            self._found[(offset + start) // self._block_bytes] = self._digest(block)

    def of(self, destination_blocks: Int64s) -> Digests:
        return np.array([self._found[block] for block in destination_blocks.tolist()], np.uint64)


def known_kind(name: str) -> DigestKind:
    for kind in _ON_HOST:
        if kind == name:
            return kind
    raise TransferError(
        f"the ticket's digests are {name}, this worker knows {', '.join(_ON_HOST)}", code="layout"
    )


def require_digests(found: Digests, expected: Digests, complete: np.ndarray) -> None:
    """`complete`: blocks that were copied whole; the others cannot be checked."""
    wrong = int(np.count_nonzero((found != expected) & complete))
    if wrong:
        raise TransferError(
            f"{wrong} of {len(expected)} blocks arrived with other bytes than the ticket promises",
            code="corrupt",
        )


def require_generations(found: Generations, expected: Generations) -> None:
    reused = int(np.count_nonzero(found != expected))
    if reused:
        raise TransferError(
            f"{reused} of {len(expected)} blocks were reused by their owner before the copy was done",
            code="stale",
        )
